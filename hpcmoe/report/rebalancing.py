"""Each time that experts took other seats while the job ran: what it cost, what it was to bring, what it brought."""

from __future__ import annotations

import numpy as np

from hpcmoe.report.record import RankRecord, Rebalancing


def rebalancing(records: list[RankRecord]) -> list[dict]:
    """The section `rebalancing`: an entry per change of a layer's seats, in the order of decisions."""
    found = [(entry, record) for record in records for entry in record.rebalancings]
    found.sort(key=lambda pair: (pair[0].decided_s, pair[1].dp, pair[1].stage, pair[1].shard, pair[0].layer))
    return [_entry(entry, record, [r for r in records if (r.dp, r.stage, r.shard) == (record.dp, record.stage, record.shard)])
            for entry, record in found]


def _entry(entry: Rebalancing, record: RankRecord, stage: list[RankRecord]) -> dict:
    window, switched = range(entry.window_first, entry.window_end), entry.switch_round >= 0
    later = [e.switch_round for e in record.rebalancings if e.layer == entry.layer and e.switch_round > entry.switch_round]
    end = min([entry.switch_round + len(window), len(record.load), *later])
    after = range(entry.switch_round, end) if switched else range(0)
    return {"dp": record.dp, "stage": record.stage, "shard": record.shard, "layer": entry.layer,
            "window_first_step": window.start, "decided_step": window.stop, "switch_step": entry.switch_round if switched else None,
            "experts_moved": entry.moved, "moved_bytes": entry.moved_bytes, "expected_gain_s": entry.gain_s, "expected_cost_s": entry.cost_s,
            "decision_to_switch_s": entry.switched_s - entry.decided_s if switched else None,
            "heaviest_over_mean_before": _heaviest(stage, entry.layer, window),
            "heaviest_over_mean_before_predicted": entry.heaviest_before, "heaviest_over_mean_after_predicted": entry.heaviest_after,
            "heaviest_over_mean_after": _heaviest(stage, entry.layer, after)}


def _heaviest(stage: list[RankRecord], layer: int, steps: range) -> float | None:
    """Rows of the busiest place over the mean of places in some steps; None where there were none."""
    rows = np.array([int(r.load[steps.start:steps.stop, r.layers.index(layer)].sum()) for r in stage])
    return float(rows.max() / rows.mean()) if rows.any() else None
