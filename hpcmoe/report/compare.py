"""Several reports side by side, with ratios to the first."""

from __future__ import annotations

import textwrap

from hpcmoe.report.table import WIDTH, number, percent, size, words

TITLE, CELL = 28, 18
PER_BLOCK = (WIDTH - TITLE) // CELL

# title and place in the section `run`
SETTINGS = (("task", "task"), ("simulated on", "simulated.cluster"), ("layout", "layout"), ("leaders", "leaders"),
            ("schedule", "schedule.name"), ("micro-batches", "schedule.micro_batches"),
            ("lanes", "schedule.lanes"), ("transport", "transport"), ("dtype", "dtype"),
            ("products", "linear.backend"), ("threads per rank", "threads"))
# title, section, field, how to print it, whether a ratio to the first run says something
FIGURES = (
    ("elapsed, s", "throughput", "elapsed_s", number, True),
    ("output tokens", "throughput", "output_tokens", number, False),
    ("prompt + output tokens", "throughput", "total_tokens", number, False),
    None,
    ("requests/s", "throughput", "requests_per_s", number, True),
    ("output tokens/s", "throughput", "output_tokens_per_s", number, True),
    ("total tokens/s", "throughput", "total_tokens_per_s", number, True),
    ("prefill tokens/s", "throughput", "prefill_tokens_per_s", number, True),
    ("decode tokens/s", "throughput", "decode_tokens_per_s", number, True),
    None,
    ("per rank: output tokens/s", "throughput", "output_tokens_per_s_per_rank", number, False),
    ("per rank: total tokens/s", "throughput", "total_tokens_per_s_per_rank", number, False),
    ("per rank: prefill tokens/s", "throughput", "prefill_tokens_per_s_per_rank", number, False),
    ("per rank: decode tokens/s", "throughput", "decode_tokens_per_s_per_rank", number, False),
    "efficiency",
    None,
    ("TTFT mean, ms", "latency", "ttft_mean_ms", number, True),
    ("TTFT p99, ms", "latency", "ttft_p99_ms", number, True),
    ("TPOT mean, ms", "latency", "tpot_mean_ms", number, True),
    ("TPOT p99, ms", "latency", "tpot_p99_ms", number, True),
    None,
    "phases",
    ("exposed communication", "communication", "exposed_comm_share", percent, False),
    ("pipeline bubble", "communication", "bubble_share", percent, False),
    ("experts of MoE time", "communication", "expert_share_of_moe", percent, False),
    ("expert GFLOP/s per rank", "compute", "expert_gflop_per_s_per_rank", number, True),
    ("expert load max/mean", "expert_load", "max_over_mean_steps_mean", number, False),
    None,
    ("sent within nodes", "traffic", "bytes_within_nodes", size, False),
    ("sent between nodes", "traffic", "bytes_between_nodes", size, False),
    ("sent per token", "traffic", "bytes_per_token", size, False),
    ("weights per rank, max", "memory", "weights_max_bytes", size, False),
    ("peak RSS per rank, max", "memory", "peak_rss_max_bytes", size, False),
    ("weights loaded in, s", "loading", "load_max_s", number, True),
)
EFFICIENCIES = ("output", "total", "prefill", "decode")


def render(reports: list[dict], names: list[str] | None = None) -> str:
    """A column per report; the first is the reference of ratios and of parallel efficiency.

    names: column titles, #1, #2, ... when not given. More reports than fit side by side follow
    in further blocks, each beginning with the first report.
    """
    names = names or [f"#{i + 1}" for i in range(len(reports))]
    every = list(zip(names, reports))
    blocks = []
    for start in range(1, max(2, len(every)), PER_BLOCK - 1):
        chosen = every[:1] + every[start:start + PER_BLOCK - 1]
        blocks.append("\n".join(_block([n for n, _ in chosen], [r for _, r in chosen])))
    return "\n\n".join(blocks)


def efficiency(report: dict, first: dict, what: str = "total") -> float | None:
    """Parallel efficiency: tokens/s per rank over that of `first`; 1 is perfect scaling.

    what: output, total, prefill or decode tokens.
    """
    field = f"{what}_tokens_per_s_per_rank"
    return _ratio(report["throughput"][field], first["throughput"][field])


def _block(names: list[str], reports: list[dict]) -> list[str]:
    lines = [_line("", [_fit(name) for name in names])]
    lines.append(_line("ranks / nodes", [f"{r['run']['ranks']} / {r['run']['nodes']}"
                                         for r in reports]))
    for title, place in SETTINGS:
        values = [_look_up(r["run"], place) for r in reports]
        if any(value is not None for value in values):
            lines += _setting(title, values)
    lines.append("")
    for figure in FIGURES:
        if figure is None:
            lines.append("")
        elif figure == "efficiency":
            lines += [_line(f"parallel efficiency, {what}",
                            [_cell(number(efficiency(r, reports[0], what), 3))
                             for r in reports])
                      for what in EFFICIENCIES]
        elif figure == "phases":
            lines += _phases(reports)
        else:
            lines.append(_figure(figure, reports))
    first = reports[0]["total_num_tokens"]
    if any(r["total_num_tokens"] != first for r in reports):
        lines += ["", "These runs did not do the same work: their numbers of tokens differ."]
    return lines


def _look_up(run: dict, place: str):
    value = run
    for name in place.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _setting(title: str, values: list) -> list[str]:
    """One line, or several where a value is too long for its column."""
    # "dp=1 pp=4 ep=16 tp=1" fits a column without its signs
    texts = ["-" if value is None else words(value).replace("=", "") for value in values]
    parts = [textwrap.wrap(text, CELL - 1) for text in texts]
    return [_line("" if i else title, [p[i] if i < len(p) else "" for p in parts])
            for i in range(max(map(len, parts)))]


def _figure(figure: tuple, reports: list[dict]) -> str:
    title, section, field, show, with_ratio = figure
    values = []
    for report in reports:
        part = report[section]["total"] if section == "traffic" else report[section]
        values.append(part[field])
    cells = []
    for i, value in enumerate(values):
        ratio = _ratio(value, values[0]) if with_ratio and i else None
        cells.append(_cell(show(value), ratio))
    return _line(title, cells)


def _cell(text: str, ratio: float | None = None) -> str:
    return text + (" " * 8 if ratio is None else f"{ratio:7.2f}x")


def _phases(reports: list[dict]) -> list[str]:
    names = [name for name in reports[0]["phases"]
             if any(r["phases"][name]["max_s"] > 0 for r in reports)]
    return [_line(f"time in {name}", [_cell(percent(r["phases"][name]["share"]))
                                      for r in reports])
            for name in names]


def _ratio(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None


def _fit(text: str) -> str:
    return text if len(text) < CELL else ".." + text[3 - CELL:]


def _line(title: str, cells: list[str]) -> str:
    return (f"{title:<{TITLE}}" + "".join(f"{cell:>{CELL}}" for cell in cells)).rstrip()
