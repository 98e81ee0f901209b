"""For which batches, widths and skews does one expert per GPU win, at equal GPU count?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from hpcmoe.errors import UserError
from hpcmoe.paper.setup import GPUS, Setup, resized
from hpcmoe.paper.steady import Case, Steady, check_memory
from hpcmoe.paper.words import Section, layout_name, table
from hpcmoe.parallel.layout import Layout
from hpcmoe.report.plots import Panel, plot_maps

TOKENS = (256, 1024, 4096, 16384, 65536)
MANY = 16384         # tokens from which two lanes are tried too: with fewer, reading weights twice costs more than they hide
SKEWS = (None, 1.01, 1.2)
OURS = ("1", "1c")   # codes of one expert per GPU


class Contender(NamedTuple):
    code: str
    name: str
    layouts: tuple[Layout, ...]


def contenders(experts: int) -> list[Contender]:
    """All on 64 GPUs; of several layouts, fewest stages first, the first that fits in memory counts."""
    found = [Contender("1", "one expert per GPU", (Layout(1, 4, experts),)),
             Contender("1c", "one expert per GPU, with copies", tuple(Layout(1, pp, GPUS // pp, 1, "all", GPUS // pp - experts) for pp in (1, 2)))]
    found += [Contender(str(n), f"{n} experts per GPU", tuple(Layout(4 * n // pp, pp, experts // n) for pp in (1, 4))) for n in (2, 4, 8)]
    return found + [Contender("TP", "TP = 8", tuple(Layout(8 // pp, pp, 1, 8) for pp in (1, 2, 4)))]


class Cell(NamedTuple):
    """best: the fastest of each contender, by code, without those that do not fit; winner: its code, "-" where nothing fits; ratio: of one expert per
    GPU to the best of the others, NaN where either does not fit."""

    best: dict[str, Steady]

    @property
    def winner(self) -> str:
        return max(self.best, key=lambda code: self.best[code].tokens_per_s, default="-")

    @property
    def ratio(self) -> float:
        ours, others = ([s.tokens_per_s for code, s in self.best.items() if (code in OURS) == mine] for mine in (True, False))
        return max(ours) / max(others) if ours and others else float("nan")


def widths(setup: Setup) -> list[int]:
    f = setup.model.expert.f
    return [f // 8, f // 4, f // 2, f, 2 * f]


def cases_of(setup: Setup, width: int, tokens: int, skew: float | None) -> list[tuple[str, Case]]:
    """One cell's: `tokens` in flight over all replicas and stages, a micro-batch on each stage, and where they are many, also two on two lanes.
    Without contenders that do not fit."""
    model, found = resized(setup.model, f=width), []
    for c in contenders(model.router.experts):
        for lanes in (1, 2) if tokens >= MANY else (1,):
            cases = (setup.case(layout, tokens // layout.dp // layout.pp // lanes, layout.pp * lanes, lanes=lanes, model=model, skew=skew) for layout in c.layouts)
            found += [(c.code, case) for case in cases if _fits(case, setup)][:1]
    return found


def _fits(case: Case, setup: Setup) -> bool:
    try:
        check_memory(case, setup.machine)
    except UserError:
        return False
    return True


def cells(setup: Setup, keys: list[tuple[int, int, float | None]]) -> list[Cell]:
    """keys: width, tokens, skew."""
    cases = [cases_of(setup, *key) for key in keys]
    own = iter(setup.clock([case for row in cases for _, case in row]))
    found = []
    for row in cases:
        best: dict[str, Steady] = {}
        for code, _ in row:
            one = next(own)
            if one and (code not in best or one.tokens_per_s > best[code].tokens_per_s):
                best[code] = one
        found.append(Cell(best))
    return found


def crossover(setup: Setup, pictures: Path) -> Section:
    keys = [(f, tokens, skew) for skew in SKEWS for f in widths(setup) for tokens in TOKENS]
    cell = dict(zip(keys, cells(setup, keys)))
    names = contenders(setup.model.router.experts)
    codes = [c.code for c in names]
    panels = [Panel(_skew(skew), [[codes.index(cell[f, t, skew].winner) if cell[f, t, skew].best else -1 for t in TOKENS] for f in widths(setup)],
                    [[_ratio(cell[f, t, skew]) for t in TOKENS] for f in widths(setup)]) for skew in SKEWS]
    plot_maps(panels, [c.name for c in names], [f"{t:,}" for t in TOKENS], [f"{f:,}" for f in widths(setup)], ("tokens in flight", "expert width"),
              pictures / "paper-crossover.svg")
    rows = [[_skew(skew), f"{f:,}", *[f"{cell[f, t, skew].winner}: {_ratio(cell[f, t, skew])}" for t in TOKENS]] for skew in SKEWS for f in widths(setup)]
    text = f"""## 5. Where one expert per GPU wins

{GPUS} GPUs each, as many tokens in flight over all replicas and stages, one batch on each stage (from {MANY:,} tokens also two on two lanes; the faster counts): so TPOT = tokens in
flight / tokens per second, and who wins in one wins in the other. Whoever has several experts on a GPU has as many replicas of the model instead, seats planned for the load; weights of a GPU
grow accordingly. Of several layouts the first counts whose weights and cache fit in memory.

{table(["code", "what", "layout"], [[c.code, c.name, ", else ".join(map(layout_name, c.layouts))] for c in names])}
Winner, and tokens/s of one expert per GPU (the better of 1 and 1c) over the best of the others:

{table(["skew", "expert width", *[f"{t:,} tokens" for t in TOKENS]], rows)}
![Who wins](pictures/paper-crossover.svg)

{_summary(setup, cell)}
In every batch a GPU reads the weights of each expert that it has, so one expert per GPU reads least; copies mend what skew costs it. Where rows are so many that arithmetic takes
longer than weights, that counts no more, and what counts is that fewer places per replica keep rows within a node; two lanes hide the way between nodes once batches are large
enough for two. 1c has fewer stages than 1 besides, and so less to hand on.

{setup.rests()}"""
    won = [sum(cell[f, t, skew].winner in OURS for skew in SKEWS for f in widths(setup)) for t in TOKENS]
    parts = [f"{count} at {t:,}" for count, t in zip(won, TOKENS)]
    return Section(text, f"Of {len(SKEWS) * len(widths(setup))} widths and skews one expert per GPU wins {', '.join(parts)} tokens in flight.")


def _skew(skew: float | None) -> str:
    return "even" if skew is None else f"skew {skew:g}"


def _ratio(cell: Cell) -> str:
    return "-" if math.isnan(cell.ratio) else f"{cell.ratio:.2f}"


def _summary(setup: Setup, cell: dict) -> str:
    lines = []
    for skew in SKEWS:
        mine = {key: c for key, c in cell.items() if key[2] == skew}
        won = [key for key, c in mine.items() if c.winner in OURS]
        plain = sum(c.winner == "1" for c in mine.values())
        others: dict[str, int] = {}
        for c in mine.values():
            if c.winner not in OURS:
                others[c.winner] = others.get(c.winner, 0) + 1
        rest = ", ".join(f"{code}: {count}" for code, count in others.items())
        at = [f"{tokens:,}" for width, tokens, _ in won if width == setup.model.expert.f]
        ratios = [c.ratio for c in mine.values() if not math.isnan(c.ratio)] or [float("nan")]
        lines.append(f"- {_skew(skew)}: one expert per GPU wins {len(won)} of {len(mine)} cells, {plain} of them without copies{f' (the others: {rest})' if rest else ''}; "
                     f"at the assumed width with {', '.join(at) if at else 'no number of'} tokens in flight. It has {min(ratios):.2f} to "
                     f"{max(ratios):.2f} times the tokens/s of the best other.")
    return "\n".join(lines) + "\n"
