"""The readable form of a report, and its file."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from hpcmoe.files import replacing


WIDTH = 100
LAYERS_SHOWN, REPLICAS_SHOWN = 4, 4
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
    sections = [_run(report, width), _throughput(report), _replicas(report), _latency(report),
                _phases(report, width), _traffic(report), _expert_load(report), _capacity(report), _placement(report), _rebalancing(report),
                _memory(report, width), _predicted(report, width)]
    rule = "=" * min(width, WIDTH)
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"{rule}\n{body}\n{rule}"


def _run(report: dict, width: int) -> list[str]:
    run = report["run"]
    schedule = run.get("schedule", "-")
    if isinstance(schedule, dict):
        schedule = ", ".join(words(value) if name == "name" else f"{name} {words(value)}"
                             for name, value in schedule.items()).replace("_", "-")
    tried = run.get("lane_trial")
    if isinstance(tried, dict):
        one, two = (f"{number(s)} s" if isinstance(s, float) else words(s) for s in map(tried.get, ("one_lane_s", "two_lanes_s")))
        schedule = f"{words(schedule)} (MoE layers on one lane {one}, on two {two})"
    setting = [f"{name} {words(run[name])}" for name in ("leaders", "transport", "dtype", "threads")
               if name in run]
    model = run.get("model", {})
    lines = [
        ("Report", f"task {run.get('task', '-')}; {report['num_requests']:,} requests finished, "
                   f"{report['requests']['failed']:,} failed; "
                   f"{number(report['elapsed_time'])} s"),
        *_simulated(run.get("simulated")),
        ("model", words(model)),
        ("ranks", f"{run['ranks']} on {run['nodes']} node{'s' if run['nodes'] > 1 else ''}: "
                  + words(run["hosts"])),
        ("layout", "; ".join([words(run.get("layout", "-")), *setting])),
        ("schedule", words(schedule)),
        *_gpus(run.get("gpus")),
        ("MPI", bare(run.get("mpi", "-")) + "; products: " + bare(run.get("linear", "-"))),
        ("versions", words(run.get("versions", "-"))),
    ]
    shown = []
    for name, text in lines:
        shown += textwrap.wrap(f"{name:<10}{text}", width, subsequent_indent=" " * 10,
                               break_on_hyphens=False)
    return shown


def _simulated(facts) -> list[tuple[str, str]]:
    """That nothing was run: on what the schedule was clocked, and what a real run does not know."""
    if not isinstance(facts, dict):
        return []
    link = facts["busiest_link"]
    return [("SIMULATED", f"on {facts['cluster']}; kernels as calibrated on {facts['calibration']}; load of experts: {facts['load']}"),
            ("", f"{number(facts['gpu_s_per_million_output_tokens'])} rank-seconds per million output tokens; busiest link: "
                 f"{link['kind']} {link['number']}, {percent(link['busy_share'])} of the time; memory of a rank: "
                 f"{size(facts['memory_used_max_bytes'])} of {size(facts['memory_bytes'])}")]


def _gpus(gpus) -> list[tuple[str, str]]:
    """The kinds of GPUs, and how many ranks drive one."""
    if not isinstance(gpus, list) or not gpus:
        return []
    kinds = Counter(str(gpu).split(",", maxsplit=1)[0] for gpu in gpus)
    return [("GPUs", "; ".join(f"{n} x {name}" for name, n in kinds.items()))]


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


def _replicas(report: dict) -> list[str]:
    """A row per replica; where there are many, the least, mean and most of each figure. Nothing for a single one."""
    names = ("requests", "prompt_tokens", "output_tokens", "total_tokens_per_s", "busy_s", "last_finish_s", "idle_end_s")
    found = report["per_replica"]
    rows = [(f"replica {x['dp']}", *(number(x[name]) for name in names)) for x in found]
    if len(found) > REPLICAS_SHOWN:
        values = [[x[name] for x in found if x[name] is not None] or [None] for name in names]
        rows = [(f"{len(found)}, {what}", *(number(None if v == [None] else func(v)) for v in values))
                for what, func in (("least", min), ("mean", lambda v: sum(v) / len(v)), ("most", max))]
    heads = ["requests", "prompt", "output", "tokens/s", "busy s", "finish s", "idle s"]
    return columns("Replicas", heads, rows, 11) if len(found) > 1 else []


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
    rows, gpu = [], any(p.get("gpu_s") for p in report["phases"].values())
    for name, p in report["phases"].items():
        if p["max_s"] > 0:
            rows.append((name, percent(p["share"]), number(p["mean_s"]), number(p["min_s"]),
                         number(p["max_s"]), number(p["wait_s"]), *([number(p["gpu_s"])] if gpu else [])))
    c, work = report["communication"], report["compute"]
    heads = ["share", "mean s", "min s", "max s", "waited s"] + ["GPU s"] * gpu
    lines = columns("Time per rank", heads, rows)
    return lines + note(
        f"exposed communication {percent(c['exposed_comm_share'])} (waiting {number(c['exposed_wait_mean_s'])} s, posting "
        f"{number(c['exposed_post_mean_s'])} s per rank), pipeline bubble {percent(c['bubble_share'])} "
        f"({percent(c['bubble_predicted_share'])} predicted from the schedule); experts take {percent(c['expert_share_of_moe'])} of the "
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


def _rebalancing(report: dict) -> list[str]:
    """By layer: how often its experts changed seats, what travelled, and the busiest place over the mean, on average over the changes."""
    rows = []
    for layer in sorted({x["layer"] for x in report.get("rebalancing", [])})[:LAYERS_SHOWN]:
        made = [x for x in report["rebalancing"] if x["layer"] == layer and x["switch_step"] is not None]
        seen = [x for x in made if x["heaviest_over_mean_after"] is not None]
        figures = [" -> ".join(number(sum(x[f"heaviest_over_mean_{when}{how}"] for x in part) / len(part)) if part else "-" for when in ("before", "after"))
                   for how, part in (("_predicted", made), ("", seen))]
        rows.append((f"layer {layer}", number(len(made)), number(sum(x["experts_moved"] for x in made)),
                     size(sum(x["moved_bytes"] for x in made)), *figures))
    return columns("Rebalancing", ["changes", "experts", "bytes", "busiest/mean", "counted"], rows, 15) if rows else []


def _capacity(report: dict) -> list[str]:
    if "capacity" not in report:
        return []
    c = report["capacity"]
    return ["Capacity factor"] + note(f"{number(c['capacity_factor'])} changes results: {number(c['rerouted_rows'])} rows rerouted, "
                                      f"{number(c['dropped_rows'])} dropped")


def _placement(report: dict) -> list[str]:
    if "placement" not in report:
        return []
    rows = []
    for x in report["placement"]["layers"][:LAYERS_SHOWN]:
        names = ("rows_between_nodes", "rows_busiest_link", "rows_busiest_rank")
        rows.append((f"layer {x['layer']}", *(f"{_whole(x[name + '_predicted'])} / {number(x[name])}" for name in names)))
    return columns("Predicted / counted", ["rows between nodes", "busiest link", "busiest rank"], rows, 22) if rows else []


def _whole(value: float | None) -> str:
    return "-" if value is None else number(round(value))


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


def _predicted(report: dict, width: int) -> list[str]:
    """What the simulator said, beside what was measured."""
    p = report.get("predicted")
    if not isinstance(p, dict):
        return []
    lines = note("; ".join([f"on {words(p.get('cluster', p.get('cluster_file')))}", *map(words, p.get("warnings", []))]), width)
    if p.get("reason"):
        return ["Predicted", *lines, *note(words(p["reason"]), width)]
    ratios, figures = p["over_measured"], report["throughput"] | report["latency"]
    rows = [(title, number(p[name]), number(figures[name]), number(ratios[name])) for title, name in (
        ("elapsed, s", "elapsed_s"), ("output tokens/s", "output_tokens_per_s"), ("TTFT, ms", "ttft_mean_ms"), ("TPOT, ms", "tpot_mean_ms"))]
    rows += [(f"{name}, s", number(phase["mean_s"]), number(report["phases"][name]["mean_s"]), number(ratios["phases"][name]["mean_s"]))
             for name, phase in p.get("phases", {}).items()]
    return columns("Predicted", ["predicted", "measured", "ratio"], rows) + lines
