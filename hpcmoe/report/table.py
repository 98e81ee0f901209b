"""The readable form of a report, and its file."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np

from hpcmoe.files import replacing


WIDTH = 100
LAYERS_SHOWN = 4
LONG = 1e9  # from here on a number in full is too wide for a column


# ---------------------------------------------------------------- one value as text
def number(value: float | None, digits: int = 4) -> str:
    """About `digits` significant digits, thousands apart; "-" where there is no value."""
    if value is None:
        return "-"
    if abs(value) >= LONG:
        return f"{value:.{digits - 1}e}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) < 10.0 ** -digits:
        return f"{value:.1e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def size(count: float | None) -> str:
    """A number of bytes in binary units."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def words(value) -> str:
    """A fact of any shape in one line: {"pp": 4} reads "pp=4", a long list is cut."""
    if isinstance(value, dict):
        return " ".join(f"{key}={words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(words(item) for item in value[:4])
        return shown if len(value) <= 4 else f"{shown}, ... ({len(value)})"
    return number(value) if isinstance(value, float) else str(value)


def bare(value) -> str:
    """`words` without the keys of a dict: {"vendor": "MPICH", "version": "5"} reads "MPICH 5"."""
    return " ".join(words(v) for v in value.values()) if isinstance(value, dict) else words(value)


def note(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")


def columns(title: str, heads: list[str], rows: list[tuple], cell: int = 12) -> list[str]:
    """A section: its title over the row names, right-aligned columns of width `cell`."""
    lines = [f"{title:<20}" + "".join(f"{head:>{cell}}" for head in heads)]
    for name, *cells in rows:
        lines.append(f"  {name:<18}" + "".join(f"{text:>{cell}}" for text in cells))
    return lines


# ---------------------------------------------------------------- the report
def render(report: dict, width: int = WIDTH) -> str:
    """The report as text: sections, aligned columns, units; at most about 60 lines."""
    sections = [_run(report, width), _throughput(report), _latency(report),
                _phases(report, width), _traffic(report), _expert_load(report),
                _memory(report, width)]
    rule = "=" * min(width, WIDTH)
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"{rule}\n{body}\n{rule}"


def _run(report: dict, width: int) -> list[str]:
    run = report["run"]
    schedule = run.get("schedule", "-")
    if isinstance(schedule, dict):
        schedule = ", ".join(words(value) if name == "name" else f"{name} {words(value)}"
                             for name, value in schedule.items()).replace("_", "-")
    setting = [f"{name} {words(run[name])}" for name in ("leaders", "transport", "dtype", "threads")
               if name in run]
    model = run.get("model", {})
    lines = [
        ("Report", f"task {run.get('task', '-')}; {report['num_requests']:,} requests finished, "
                   f"{report['requests']['failed']:,} failed; "
                   f"{number(report['elapsed_time'])} s"),
        ("model", words(model)),
        ("ranks", f"{run['ranks']} on {run['nodes']} node{'s' if run['nodes'] > 1 else ''}: "
                  + words(run["hosts"])),
        ("layout", "; ".join([words(run.get("layout", "-")), *setting])),
        ("schedule", words(schedule)),
        ("MPI", bare(run.get("mpi", "-")) + "; products: " + bare(run.get("linear", "-"))),
        ("versions", words(run.get("versions", "-"))),
    ]
    shown = []
    for name, text in lines:
        shown += textwrap.wrap(f"{name:<10}{text}", width, subsequent_indent=" " * 10,
                               break_on_hyphens=False)
    return shown


def _throughput(report: dict) -> list[str]:
    t = report["throughput"]
    rows = [
        ("output", number(t["output_tokens"]), number(t["elapsed_s"]),
         number(t["output_tokens_per_s"]), number(t["output_tokens_per_s_per_rank"])),
        ("prompt + output", number(t["total_tokens"]), number(t["elapsed_s"]),
         number(t["total_tokens_per_s"]), number(t["total_tokens_per_s_per_rank"])),
    ]
    for name in ("prefill", "decode"):
        rows.append((f"{name} rows", number(t[name + "_rows"]), number(t[name + "_s"]),
                     number(t[name + "_tokens_per_s"]),
                     number(t[name + "_tokens_per_s_per_rank"])))
    return columns("Throughput", ["tokens", "seconds", "tokens/s", "per rank"], rows, 14)


def _latency(report: dict) -> list[str]:
    titles = {"ttft": "TTFT", "ttft_admitted": "TTFT, admitted", "tpot": "TPOT",
              "request": "whole request"}
    rows = [(title, *(number(report["latency"][f"{name}_{what}_ms"])
                      for what in ("mean", "p50", "p90", "p99")))
            for name, title in titles.items()]
    step = report["steps"]
    rows.append((f"step ({step['steps']:,})", *(number(step[f"step_{what}_ms"])
                                                for what in ("mean", "p50", "p90", "p99"))))
    return columns("Latency, ms", ["mean", "p50", "p90", "p99"], rows, 14)


def _phases(report: dict, width: int) -> list[str]:
    rows = []
    for name, p in report["phases"].items():
        if p["max_s"] > 0:
            rows.append((name, percent(p["share"]), number(p["mean_s"]), number(p["min_s"]),
                         number(p["max_s"]), number(p["wait_s"])))
    c, work = report["communication"], report["compute"]
    lines = columns("Time per rank", ["share", "mean s", "min s", "max s", "waited s"], rows)
    return lines + note(
        f"exposed communication {percent(c['exposed_share'])}, pipeline bubble "
        f"{percent(c['bubble_share'])}; experts take {percent(c['expert_share_of_moe'])} of the "
        f"MoE layers, at {number(work['expert_gflop_per_s_per_rank'])} GFLOP/s per rank", width)


def _traffic(report: dict) -> list[str]:
    rows = []
    for name, t in report["traffic"].items():
        if name != "total" and any(t.values()):
            rows.append((name, number(t["rows_own"]), number(t["rows_within_nodes"]),
                         number(t["rows_between_nodes"]), size(t["bytes_within_nodes"]),
                         size(t["bytes_between_nodes"])))
    heads = ["own rows", "rows in node", "rows between", "in node", "between nodes"]
    return columns("Sent by all ranks", heads, rows, 14) if rows else []


def _expert_load(report: dict) -> list[str]:
    load = report["expert_load"]
    rows = [(f"layer {x['layer']}", number(x["rows"]), number(x["rows_max"]),
             number(x["rows_mean"]), number(x["max_over_mean_run"]),
             number(x["max_over_mean_steps"]), number(x["idle_experts"]))
            for x in load["layers"][:LAYERS_SHOWN]]
    if len(load["layers"]) > LAYERS_SHOWN:
        for what in ("mean", "max"):
            rows.append((f"all layers, {what}", "", "", "",
                         number(load[f"max_over_mean_run_{what}"]),
                         number(load[f"max_over_mean_steps_{what}"]), ""))
    heads = ["rows", "busiest", "mean", "max/mean", "in a step", "without rows"]
    return columns("Expert load", heads, rows, 13) if rows else []


def _memory(report: dict, width: int) -> list[str]:
    m, load = report["memory"], report["loading"]
    names = {"weights": "weights", "kv": "KV cache", "buffer": "buffers", "peak_rss": "peak RSS"}
    rows = [(what, *(size(m[f"{name}_{what}_bytes"]) for name in names))
            for what in ("mean", "max")]
    lines = columns("Memory per rank", list(names.values()), rows, 14)
    of_file = "" if load["read_over_file"] is None else \
        f" = {number(load['read_over_file'], 3)} x the file of {size(load['weights_file_bytes'])}"
    return lines + note(f"weights loaded in {number(load['load_max_s'])} s; at most "
                        f"{size(load['read_max_bytes'])} read by a rank, "
                        f"{size(load['read_total_bytes'])} by all{of_file}", width)


# ---------------------------------------------------------------- the file
def write_report(folder: str | Path, report: dict) -> Path:
    """Write `report` as folder/report.json; it appears whole or not at all.

    Raises UserError where the folder or the file cannot be written.
    """
    path = Path(folder) / "report.json"
    text = json.dumps(report, indent=1, allow_nan=False, default=_plain)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    return path


def _plain(value):
    """JSON for the few types that facts may hold besides plain ones."""
    if isinstance(value, (np.integer, np.floating, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a report cannot hold {type(value).__name__}: {value!r}")
