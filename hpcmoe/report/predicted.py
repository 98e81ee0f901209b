"""What a simulation says of a run, beside what the run measured."""

from __future__ import annotations

FIGURES = {"throughput": ("elapsed_s", "output_tokens_per_s", "total_tokens_per_s"), "latency": ("ttft_mean_ms", "tpot_mean_ms")}


def predicted(report: dict, simulated: dict) -> dict:
    """The section `predicted` of a run's report, from the report of its simulation: figures, and over_measured: their ratios to the run's."""
    figures, ratios = {}, {}
    for section, names in FIGURES.items():
        for name in names:
            figures[name] = simulated[section][name]
            ratios[name] = _ratio(figures[name], report[section][name])
    for name, phase in simulated["phases"].items():
        mine = report["phases"][name]["mean_s"]
        if mine or phase["mean_s"]:
            figures.setdefault("phases", {})[name] = {"mean_s": phase["mean_s"]}
            ratios.setdefault("phases", {})[name] = {"mean_s": _ratio(phase["mean_s"], mine)}
    return figures | {"over_measured": ratios}


def _ratio(predicted_: float | None, measured: float | None) -> float | None:
    return predicted_ / measured if measured and predicted_ is not None else None
