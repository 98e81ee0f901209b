"""Rows that a capacity factor turned away from the experts that the router had chosen."""

from __future__ import annotations

from hpcmoe.report.record import RankRecord


def capacity(records: list[RankRecord], run: dict) -> dict:
    """The section `capacity`: rows rerouted and dropped, in all and by layer. run: the job's section of that name."""
    layers = sorted({layer for r in records for layer in r.over_capacity})
    counted = [{"layer": layer, "rerouted_rows": _sum(records, layer, 0), "dropped_rows": _sum(records, layer, 1)} for layer in layers]
    return {"capacity_factor": run["capacity_factor"], "over_capacity": run["over_capacity"], "changes_results": True,
            "rerouted_rows": sum(x["rerouted_rows"] for x in counted), "dropped_rows": sum(x["dropped_rows"] for x in counted),
            "layers": counted}


def _sum(records: list[RankRecord], layer: int, which: int) -> int:
    return sum(r.over_capacity[layer][which] for r in records if layer in r.over_capacity)
