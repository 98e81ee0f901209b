"""Pictures: a trace over time, a pipeline grid, points and lines, maps. Needs matplotlib, the extra [plot]."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Sequence

from hpcmoe.errors import UserError, at
from hpcmoe.files import replacing
from hpcmoe.report.record import KINDS, RankRecord, Span
from hpcmoe.report.trace import read_trace

# the exchange in blues, arithmetic in warm colours, messages between stages in greens
COLOURS = {
    "RECV": "#a6d96a", "EMBED": "#e0ecb4", "ATTEND": "#fdae61", "REDUCE_ATTEND": "#bcbddc", "GATE": "#fee08b", "COUNTS": "#c6dbef",
    "DISPATCH": "#6baed6", "EXPERT": "#d7301f", "COMBINE": "#2171b5", "MERGE": "#fcc5c0",
    "REDUCE_MERGE": "#9e9ac8", "SEND": "#1a9641", "SAMPLE": "#756bb1",
}
DARK = ("EXPERT", "COMBINE", "SEND", "SAMPLE")  # their cells have white text
WAIT = "#d9d9d9"
ABSENT = "pictures need matplotlib: pip install 'hpcmoe[plot]'"


def plot_trace(source: list[RankRecord] | str | Path, path: str | Path,
               window: tuple[float, float] | None = None) -> Path:
    """Ranks as rows over time, ops coloured by kind, waits grey; written to `path` (.svg, .png).

    source: records with spans, or a trace file. window: seconds to show, all when not given.
    Raises UserError where matplotlib is absent, nothing lies in the window, or on file errors.
    """
    ranks = read_trace(source) if isinstance(source, (str, Path)) else [
        (f"rank {r.rank} stage {r.stage} place {r.place}", r.spans)
        for r in sorted(source, key=lambda r: r.rank)]
    if window:
        ranks = [(name, [s for s in spans if s.end_s > window[0] and s.start_s < window[1]])
                 for name, spans in ranks]
    if not any(spans for _, spans in ranks):
        raise at("trace", "spans", 0, "spans in the time to be drawn")
    figure, axes = _figure(10, 0.28 * len(ranks) + 1.6)
    for row, (_, spans) in enumerate(ranks):
        for look, bars in _bars(spans).items():
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=look, linewidth=0)
    # a trace file's names end in role and host, which a picture has no room for
    axes.set_yticks(range(len(ranks)), [" ".join(name.split()[:6]) for name, _ in ranks])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    if window:
        axes.set_xlim(window[0] * 1e3, window[1] * 1e3)
    axes.set_xlabel("time since the start of the run, ms")
    seen = {s.kind for _, spans in ranks for s in spans if not s.wait}
    _legend(axes, {kind.lower(): COLOURS[kind] for kind in KINDS if kind in seen}
            | {"waiting": WAIT})
    return _save(figure, path)


def plot_grid(schedule_cells: list[tuple], path: str | Path) -> Path:
    """The pipeline as a grid of (row label, column, kind, layer, micro-batch), one op per cell.

    A cell is coloured by kind and shows its micro-batch. RECV is not drawn: it is posted in the
    slot of another op. Errors as plot_trace.
    """
    schedule_cells = [cell for cell in schedule_cells if cell[2] != "RECV"]
    if not schedule_cells:
        raise at("schedule", "cells", 0, "at least one")
    rows = list(dict.fromkeys(cell[0] for cell in schedule_cells))
    last = max(cell[1] for cell in schedule_cells)
    figure, axes = _figure(min(40.0, 0.2 * (last + 1) + 2), 0.4 * len(rows) + 1.6)
    bars = {}
    for row, column, kind, _, micro in schedule_cells:
        y = rows.index(row)
        bars.setdefault((y, kind), []).append((column + 0.03, 0.94))
        axes.text(column + 0.5, y, str(micro), ha="center", va="center", fontsize=7,
                  color="white" if kind in DARK else "black")
    for (y, kind), xs in bars.items():
        axes.broken_barh(xs, (y - 0.4, 0.8), facecolors=COLOURS[kind], linewidth=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, last + 1)
    axes.set_xlabel("op slots; the number in a cell is its micro-batch")
    seen = {cell[2] for cell in schedule_cells}
    _legend(axes, {kind.lower(): COLOURS[kind] for kind in KINDS if kind in seen})
    return _save(figure, path)


def check() -> None:
    """UserError where no picture can be made: better before long work than after."""
    _figure(1, 1)


def plot_front(points: list[tuple[float, float]], front: list[tuple[float, float]], marks: list[tuple[str, float, float]], limit_ms: float | None,
               path: str | Path) -> Path:
    """Candidates of a plan as (TPOT in ms, tokens/s per rank): all points, the front as a line, some with a name (name, ms, tokens/s), and the
    limit of TPOT. Both axes are logarithmic. Errors as plot_trace."""
    figure, axes = _figure(7, 4.5)
    axes.loglog(*zip(*points), ".", color="#969696", label="simulated")
    axes.loglog(*zip(*front), "o-", color=COLOURS["COMBINE"], markersize=4, label="no other beats these")
    for (name, ms, rate), colour in zip(marks, (COLOURS["EXPERT"], COLOURS["ATTEND"])):
        axes.loglog([ms], [rate], "D", color=colour, label=name)
    if limit_ms is not None:
        axes.axvline(limit_ms, color="black", linewidth=0.8, linestyle="--", label="limit of TPOT")
    axes.set_xlabel("TPOT, ms")
    axes.set_ylabel("output tokens/s per rank")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    return _save(figure, path)


def _bars(spans: list[Span]) -> dict[str, list[tuple[float, float]]]:
    """(start, length) in ms by colour; touching bars of a colour are joined to keep files small."""
    looks = {}
    for span in sorted(spans, key=lambda s: s.start_s):
        bars = looks.setdefault(WAIT if span.wait else COLOURS[span.kind], [])
        start, end = span.start_s * 1e3, span.end_s * 1e3
        if bars and start - sum(bars[-1]) < 1e-6:
            first, length = bars[-1]
            bars[-1] = (first, max(length, end - first))
        else:
            bars.append((start, end - start))
    return looks


def check_plots() -> None:
    """Raises UserError where matplotlib is absent: better before long work than after."""
    _figure(1, 1)


def _figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(ABSENT) from error
    figure = Figure(figsize=(width, min(height, 40.0)), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas without a display, whatever the user's settings
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, ncols=min(6, len(handles)), loc="lower left",
                bbox_to_anchor=(0, 1), frameon=False, fontsize=8)


def _save(figure, path: str | Path) -> Path:
    from matplotlib import rc_context
    path = Path(path)
    # no date and no random ids in the file: the same trace gives the same picture
    metadata = {"Date": None} if path.suffix in (".svg", "") else {}
    look = {"svg.hashsalt": "hpcmoe", "svg.fonttype": "none",
            "font.sans-serif": ["DejaVu Sans", "Arial"]}  # named with every text: keep it short
    with rc_context(look):
        with replacing(path) as temporary, open(temporary, "wb") as file:
            try:
                figure.savefig(file, format=path.suffix[1:] or "svg", dpi=150, metadata=metadata)
            except ValueError as error:
                raise UserError(f"{path}: cannot write the picture: {error}") from error
    return path


# ---------------------------------------------------------------- figures of any kind
class Series(NamedTuple):
    """Points of one name; marker and line as matplotlib has them ("" for none)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = "o"
    line: str = "-"


def plot_series(series: list[Series], labels: tuple[str, str], path: str | Path, logarithmic: str = "") -> Path:
    """Series over common axes; labels: of x and y; logarithmic: "", "x", "y" or "xy" (ticks at the points, powers of two). Errors as plot_trace."""
    figure, axes = _figure(7, 4.2)
    for one in series:
        axes.plot(one.x, one.y, marker=one.marker or None, linestyle=one.line or "none", label=one.name)
    for axis in logarithmic:
        getattr(axes, f"set_{axis}scale")("log", base=2)
        getattr(axes, f"{axis}axis").set_major_formatter("{x:g}")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


class Panel(NamedTuple):
    """A map: winner_yx numbers one of the names (-1: none), text_yx is written into its cell."""

    title: str
    winner_yx: Sequence[Sequence[int]]
    text_yx: Sequence[Sequence[str]]


PALE = ("#fdae61", "#fee08b", "#c6dbef", "#9ecae1", "#bcbddc", "#d9d9d9", "#a6d96a", "#fcc5c0")


def plot_maps(panels: list[Panel], names: list[str], x: list[str], y: list[str], labels: tuple[str, str], path: str | Path) -> Path:
    """Maps beside each other over common axes, coloured by winner. Raises ValueError for more names than colours; other errors as plot_trace."""
    if len(names) > len(PALE):
        raise ValueError(f"{len(names)} names: at most {len(PALE)} have a colour")
    figure, first = _figure(1.0 + len(panels) * (0.6 * len(x) + 0.5), 0.42 * len(y) + 1.8)
    first.remove()
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for j, row in enumerate(panel.winner_yx):
            for i, winner in enumerate(row):
                axes.broken_barh([(i - 0.5, 1)], (j - 0.5, 1), facecolors=PALE[winner] if winner >= 0 else "white", linewidth=0)
                axes.text(i, j, panel.text_yx[j][i], ha="center", va="center", fontsize=7)
        axes.set_xlim(-0.5, len(x) - 0.5)
        axes.set_ylim(-0.5, len(y) - 0.5)
        axes.set_xticks(range(len(x)), x, fontsize=7)
        axes.set_yticks(range(len(y)), y if not number else [""] * len(y), fontsize=7)
        axes.set_xlabel(labels[0], fontsize=8)
        axes.set_title(panel.title, fontsize=9)
        if not number:
            axes.set_ylabel(labels[1], fontsize=8)
            from matplotlib.patches import Patch
            figure.legend(handles=[Patch(color=PALE[i], label=name) for i, name in enumerate(names)], ncols=3, loc="outside upper center",
                          frameon=False, fontsize=8)
    return _save(figure, path)
