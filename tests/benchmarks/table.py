"""The results as a readable table, and which goals they meet."""

from __future__ import annotations


def goals(results: dict) -> list[tuple[str, str, str, bool | None]]:
    """(figure, value, goal, reached) rows; reached is None where nothing was asked or nothing measured."""
    rows = []
    for dtype, part in results["dtypes"].items():
        if "reason" in part:
            rows.append((f"{dtype}, whole model", "not measured", "-", None))
            continue
        for r in part["workloads"]:
            if r.get("ratio"):
                goal = r["goal"]
                rows.append((f"{dtype} {r['workload']['name']}: hpcmoe / transformers", f"{r['ratio']:.2f} x",
                             f">= {goal} x" if goal else "-", r["ratio"] >= goal if goal else None))
            if r.get("logits"):
                rows.append((f"{dtype} {r['workload']['name']}: same logits, median relative error",
                             f"{r['logits']['median']:.1e}", f"<= {r['logits']['limit']:g}", r["logits"]["close"]))
        widest = part["workloads"][-1]
        name = f"{dtype} {widest['workload']['name']}"
        rows.append((f"{name}: expert products / MoE layer", f"{widest['moe_efficiency']:.3f}", ">= 0.85",
                     widest["moe_efficiency"] >= 0.85))
        rows.append((f"{name}: expert products / bare products", f"{widest['expert_over_bare']:.3f}", ">= 0.9",
                     widest["expert_over_bare"] >= 0.9))
    return rows + _job_goals(results.get("jobs", {}))


def _job_goals(jobs: dict) -> list[tuple]:
    rows = []
    if "loading" in jobs:
        rows.append(("weights load / reading the file", f"{jobs['loading']['ratio']:.2f}", ">= 0.7", jobs["loading"]["ratio"] >= 0.7))
    if "first_token" in jobs:
        f = jobs["first_token"]
        rows.append((f"start-up of {f['ranks']} ranks, whole job of one token", f"{f['seconds']:.1f} s", "< 6 s", f["seconds"] < 6))
    if "many_ranks" in jobs:
        m = jobs["many_ranks"]
        rows.append((f"{m['ranks']} ranks, {m['requests']} requests", f"{m['seconds']:.0f} s", "< 300 s", m["seconds"] < 300))
    return rows


def render(results: dict) -> str:
    """The whole result, for a terminal and for docs/speed.md."""
    lines = [f"{results['date']}; {results['cpu']}, {results['cores']} cores; " + ", ".join(
        f"{name} {version}" for name, version in results["versions"].items())]
    lines.append(f"other programs' share of the cores before the start: {results['busy_before']:.0%}")
    for dtype, part in results["dtypes"].items():
        lines.append("")
        if "reason" in part:
            lines.append(f"{dtype}: not measured: {part['reason']}")
        else:
            lines += _peak(dtype, part["peak"], results["ranks"]) + [""] + _workloads(dtype, part["workloads"])
    lines += ["", *_jobs(results.get("jobs", {})), *_columns(("figure", "measured", "goal", ""), [
        (name, value, goal, {True: "reached", False: "FALLS SHORT", None: ""}[reached])
        for name, value, goal, reached in goals(results)])]
    return "\n".join(lines) + "\n"


def _peak(dtype: str, peak: dict, ranks: int) -> list[str]:
    rows = [(f"{name}, GFLOP/s at 512 rows", f"{peak['gflops_one'][name]:.1f}", f"{peak['gflops_all'][name]:.1f}")
            for name in peak["gflops_one"]]
    rows.append(("reading memory, GB/s", f"{peak['read_one_gb_s']:.1f}", f"{peak['read_all_gb_s']:.1f}"))
    return _columns((f"{dtype}: the machine", "one process", f"{ranks} at once"), rows)


def _workloads(dtype: str, workloads: list[dict]) -> list[str]:
    rows = []
    for r in workloads:
        share, spread = r["share"], r["hpcmoe_all"]
        rows.append((r["workload"]["name"], f"{r['hpcmoe_tokens_per_s']:,.1f}", f"{min(spread):,.1f} - {max(spread):,.1f}",
                     f"{r['hf_tokens_per_s']:,.1f}" if "ratio" in r else "-", r.get("hf_implementation", "-"),
                     f"{r['ratio']:.2f}" if "ratio" in r else "-", f"{share['of_peak']:.0%} of {share['bound']}",
                     f"{r['moe_efficiency']:.2f}", f"{r['expert_gflops']:.0f}", f"{r['expert_over_bare']:.2f}"))
    lines = _columns((f"{dtype}, tokens/s", "hpcmoe", "range", "transformers", "its experts", "ratio", "peak share",
                      "experts/MoE", "GFLOP/s", "/bare"), rows)
    for r in workloads:
        if "hf_attempts_s" in r:
            lines.append(f"  {r['workload']['name']}, transformers' implementations: " + "; ".join(
                f"{name} {value}" if isinstance(value, str) else f"{name} {r['rows'] / value:,.1f}"
                for name, value in r["hf_attempts_s"].items()))
    return lines


def _jobs(jobs: dict) -> list[str]:
    lines = []
    if "loading" in jobs:
        lines.append(f"loading {jobs['loading']['load_gb_s']:.2f} GB/s; reading the file {jobs['loading']['read_gb_s']:.2f} GB/s")
    if "first_token" in jobs:
        f = jobs["first_token"]
        lines.append(f"start-up of {f['ranks']} ranks: {f['seconds']:.2f} s for the whole job; rank 0 from its first line to the "
                     f"run {f['startup_s']:.2f} s, of which loading {f['load_s']:.2f} s; then {f['ttft_s']:.2f} s to the first token")
    if "many_ranks" in jobs:
        m = jobs["many_ranks"]
        lines.append(f"{m['ranks']} ranks ({', '.join(f'{k}={v}' for k, v in m['layout'].items())}), {m['requests']} requests: "
                     f"{m['seconds']:.1f} s, {m['output_tokens_per_s']:,.0f} tokens/s")
    return lines + [""] if lines else []


def _columns(heads: tuple, rows: list[tuple]) -> list[str]:
    """Left-aligned first column, the others right-aligned."""
    table = [heads, *rows]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(heads))]
    return ["  ".join(str(cell).ljust(widths[i]) if i == 0 else str(cell).rjust(widths[i]) for i, cell in enumerate(row)).rstrip()
            for row in table]
