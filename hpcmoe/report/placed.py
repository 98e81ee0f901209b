"""What a placement promised beside what a run found, layer by layer."""

from __future__ import annotations

from hpcmoe.report.record import RankRecord


def placed(records: list[RankRecord], facts: dict, transport: str, load_layers: list[dict]) -> dict:
    """The section `placement`: its file, the expert of each slot, and per layer rows predicted and counted.

    facts: placing.placement_facts; load_layers: the layers of expert_load. Predictions are in rows per token, and
    are multiplied by the tokens that this run's router saw; None where the placement was made for other nodes.
    """
    exchange = "hierarchical" if transport == "hierarchical" else "flat"
    predicted = facts["predicted"]
    layers = []
    for load in load_layers:
        layer = load["layer"]
        tokens = (load["rows"] + sum(r.over_capacity[layer][1] for r in records if layer in r.over_capacity)) // facts["top_k"]
        counted = {"rows_between_nodes": sum(r.layer_inter.get(("DISPATCH", layer), 0) for r in records),
                   "rows_busiest_link": _busiest_link(records, layer), "rows_busiest_rank": _busiest_rank(records, layer)}
        names = (f"{exchange}_between_nodes", f"{exchange}_busiest_link", "busiest_rank")
        expected = {f"{name}_predicted": predicted and tokens * predicted[layer][source] for name, source in zip(counted, names)}
        layers.append({"layer": layer, "tokens": tokens} | counted | expected)
    return {"file": facts["file"], "exchange": exchange, "expert_of_slot": facts["expert_of_slot"], "layers": layers}


def _busiest_link(records: list[RankRecord], layer: int) -> int:
    """Rows of dispatch over the busiest node's link in its busier direction: what comes in goes back in combine.

    Replicas are added up, first node to first node.
    """
    out: dict[tuple, int] = {}
    nodes: dict[int, list[int]] = {}  # replica -> its nodes, in the order of its ranks
    for r in sorted(records, key=lambda r: r.rank):
        seen = nodes.setdefault(r.dp, [])
        if r.node not in seen:
            seen.append(r.node)
        for kind in ("DISPATCH", "COMBINE"):
            link = seen.index(r.node), kind
            out[link] = out.get(link, 0) + r.layer_inter.get((kind, layer), 0)
    return max(out.values())


def _busiest_rank(records: list[RankRecord], layer: int) -> int:
    """Rows of the layer on the rank that got most; replicas added up, place by place."""
    rows: dict[int, int] = {}
    for r in records:
        if layer in r.layers and r.load.size:
            rows[r.place] = rows.get(r.place, 0) + int(r.load[:, r.layers.index(layer)].sum())
    return max(rows.values(), default=0)
