"""How evenly the router spread its rows over experts, from the ranks' load counters."""

from __future__ import annotations

import numpy as np

from hpcmoe.report.record import RankRecord


def expert_load(records: list[RankRecord]) -> dict:
    """Rows per expert and layer over all replicas, and max/mean as the measure of skew.

    Perfect balance is 1; with one expert per rank, max/mean of a step is the factor by which
    the busiest rank's expert time exceeds the average. Steps are weighed twice: as the mean of
    the steps' ratios, and over the whole run (sums first), where opposite skews cancel. Copies of an expert count
    together, but for ranks, whose mean/max is the balancedness.
    """
    held = {}  # layer -> [(record, index of the layer in its load)]
    for record in records:
        if record.load.size and not record.shard:  # tensor shards of a place get the same rows
            for index, layer in enumerate(record.layers):
                held.setdefault(layer, []).append((record, index))
    layers = [_layer(layer, held[layer]) for layer in sorted(held) if any(record.load[:, index].any() for record, index in held[layer])]
    report = {"layers": layers}
    for name, worst in (("max_over_mean_run", max), ("max_over_mean_steps", max), ("rank_max_over_mean_run", max),
                        ("balancedness_run", min), ("balancedness_steps", min)):
        values = [row[name] for row in layers]
        report[name + "_mean"] = sum(values) / len(values) if values else None
        report[f"{name}_{worst.__name__}"] = worst(values) if values else None
    return report


def _layer(layer: int, parts: list[tuple[RankRecord, int]]) -> dict:
    experts = sorted({int(e) for record, index in parts for _, expert_ls in record.seated for e in expert_ls[index]})
    run, every = _run_and_steps([(record, _by_expert(record, index, experts)) for record, index in parts])
    ranks = [(record, record.load[:, index].sum(axis=1, keepdims=True, dtype=np.int64)) for record, index in parts]
    rank_steps = _rank_steps(ranks)
    rank_run = np.array([rows.sum() for _, rows in ranks])
    return {
        "layer": layer,
        "rows": int(run.sum()),
        "rows_max": int(run.max()),
        "rows_mean": float(run.mean()),
        "max_over_mean_run": _ratio(run),
        "max_over_mean_steps": float(np.mean(every.max(axis=1) / every.mean(axis=1))),
        "rank_max_over_mean_run": _ratio(rank_run),
        "balancedness_run": 1 / _ratio(rank_run),
        "balancedness_steps": float(np.mean(rank_steps.mean(axis=1) / rank_steps.max(axis=1))),
        "busiest_expert": experts[int(run.argmax())],
        "idle_experts": int((run == 0).sum()),
        "rows_per_expert": [int(n) for n in run],
        "copies_per_expert": _copies(parts, experts),
    }


def _by_expert(record: RankRecord, index: int, experts: list[int]) -> np.ndarray:
    """The rows of a rank's slots in one layer by expert: [step, expert]."""
    table = np.zeros((len(record.load), len(experts)), dtype=np.int64)
    for steps, expert_ls in record.loads():
        columns = np.searchsorted(experts, expert_ls[index])
        np.add.at(table[steps.start:steps.stop], np.s_[:, columns], record.load[steps.start:steps.stop, index])
    return table


def _run_and_steps(parts: list[tuple[RankRecord, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ranks' rows [step, column] added up: over the run [column]; by replica and step [step, column], of steps in which any was routed."""
    steps = {}  # replica -> rows; replicas and ranks may have unequal steps
    for record, rows in parts:
        table = steps.get(record.dp, rows[:0])
        longer = np.zeros((max(len(table), len(rows)), rows.shape[1]), dtype=np.int64)
        longer[:len(table)] += table
        longer[:len(rows)] += rows
        steps[record.dp] = longer
    every = np.concatenate(list(steps.values()))
    return every.sum(axis=0), every[every.sum(axis=1) > 0]


def _rank_steps(ranks: list[tuple[RankRecord, np.ndarray]]) -> np.ndarray:
    """Rows of each place in each step with rows: [step, place], the steps of all replicas below each other."""
    places = sorted({record.place for record, _ in ranks})
    parts = []
    for record, rows in ranks:
        wide = np.zeros((len(rows), len(places)), dtype=np.int64)
        wide[:, places.index(record.place)] = rows[:, 0]
        parts.append((record, wide))
    return _run_and_steps(parts)[1]


def _copies(parts: list[tuple[RankRecord, int]], experts: list[int]) -> list[int]:
    """Slots of each expert at the end of the run, in the first replica."""
    first = min(record.dp for record, _ in parts)
    held = [record.seated[-1].expert_ls[index] for record, index in parts if record.dp == first]
    return np.bincount(np.searchsorted(experts, np.concatenate(held)), minlength=len(experts)).tolist()


def _ratio(rows: np.ndarray) -> float:
    return float(rows.max() / rows.mean())
