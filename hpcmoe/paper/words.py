"""Numbers and tables as Markdown."""

from __future__ import annotations

from typing import NamedTuple, Sequence

from hpcmoe.parallel.layout import Layout


class Section(NamedTuple):
    """Of the page; short: what it found, in a sentence or two."""

    text: str
    short: str


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def us(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"


def rate(tokens_per_s: float) -> str:
    """Tokens/s, in thousands or millions."""
    return f"{tokens_per_s / 1e6:.2f} M" if tokens_per_s >= 999_500 else f"{tokens_per_s / 1e3:,.0f} k"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def layout_name(layout: Layout) -> str:
    """Without what is 1; with the copies of experts."""
    parts = [f"{name}={getattr(layout, name)}" for name in ("dp", "pp", "ep", "tp") if getattr(layout, name) > 1]
    return "`" + " ".join(parts) + "`" + (f", {layout.replicas} copies" if layout.replicas else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; raises ValueError where a row has not as many cells as the head."""
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"rows of {sorted({len(row) for row in rows})} cells below a head of {len(head)}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
