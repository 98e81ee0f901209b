"""How evenly the router spread its rows over experts, from the ranks' load counters."""

from __future__ import annotations

import numpy as np

from hpcmoe.report.record import RankRecord


def expert_load(records: list[RankRecord]) -> dict:
    """Rows per expert and layer over all replicas, and max/mean as the measure of skew.

    Perfect balance is 1; with one expert per rank, max/mean of a step is the factor by which
    the busiest rank's expert time exceeds the average. Steps are weighed twice: as the mean of
    the steps' ratios, and over the whole run (sums first), where opposite skews cancel.
    """
    held = {}  # layer -> [(record, index of the layer in its load)]
    for record in records:
        if record.load.size:
            for index, layer in enumerate(record.layers):
                held.setdefault(layer, []).append((record, index))
    layers = [_layer(layer, held[layer]) for layer in sorted(held)
              if any(record.load[:, index].any() for record, index in held[layer])]
    report = {"layers": layers}
    for name in ("max_over_mean_run", "max_over_mean_steps", "rank_max_over_mean_run"):
        values = [row[name] for row in layers]
        report[name + "_mean"] = sum(values) / len(values) if values else None
        report[name + "_max"] = max(values) if values else None
    return report


def _layer(layer: int, parts: list[tuple[RankRecord, int]]) -> dict:
    experts = sorted({e for record, _ in parts for e in record.experts})
    column = {e: i for i, e in enumerate(experts)}
    steps = {}  # replica -> rows [step, expert]; replicas and ranks may have unequal steps
    rank_rows = []
    for record, index in parts:
        rows = np.asarray(record.load[:, index, :], dtype=np.int64)
        rank_rows.append(int(rows.sum()))
        table = steps.get(record.dp)
        if table is None or len(table) < len(rows):
            longer = np.zeros((len(rows), len(experts)), dtype=np.int64)
            if table is not None:
                longer[:len(table)] = table
            table = steps[record.dp] = longer
        columns = [column[e] for e in record.experts]
        np.add.at(table, (slice(0, len(rows)), columns), rows)
    run = sum(table.sum(axis=0) for table in steps.values())
    every = np.concatenate(list(steps.values()))
    every = every[every.sum(axis=1) > 0]  # steps in which nothing was routed say nothing
    return {
        "layer": layer,
        "rows": int(run.sum()),
        "rows_max": int(run.max()),
        "rows_mean": float(run.mean()),
        "max_over_mean_run": _ratio(run),
        "max_over_mean_steps": float(np.mean(every.max(axis=1) / every.mean(axis=1))),
        "rank_max_over_mean_run": _ratio(np.array(rank_rows)),
        "busiest_expert": experts[int(run.argmax())],
        "idle_experts": int((run == 0).sum()),
        "rows_per_expert": [int(n) for n in run],
    }


def _ratio(rows: np.ndarray) -> float:
    return float(rows.max() / rows.mean())
