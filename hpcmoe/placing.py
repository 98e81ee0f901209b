"""A run's placement and its routing statistics: read and checked before it, told in its report after it."""

from __future__ import annotations

import numpy as np

from hpcmoe.config import JobConfig, ModelConfig, to_dict
from hpcmoe.data.placement import Placement, read_placement
from hpcmoe.errors import at
from hpcmoe.model.copies import in_order
from hpcmoe.parallel.layout import Layout


def placement_of(job: JobConfig, model: ModelConfig, layout: Layout) -> Placement | None:
    """The job's placement, None where it asks for none. Raises UserError where it was made for another model or layout."""
    path = job.layout.placement
    if not path:
        return None
    placement = read_placement(path, model)
    for name in ("pp", "ep"):
        if getattr(placement.seats, name) != getattr(layout, name):
            raise at(path, f"layout.{name}", getattr(placement.seats, name), f"{getattr(layout, name)}, as this run has: {layout}")
    slots = layout.slots(model.router.experts)
    if placement.expert_ls.shape[1] != slots:
        raise at(path, "experts[0]", placement.expert_ls[0].tolist(), f"{slots} slots, as this run has: {model.router.experts} experts and "
                 f"layout.replicas = {layout.replicas}")
    return placement


def expert_ls(placement: Placement | None, model: ModelConfig, layout: Layout) -> np.ndarray:
    """The expert in each slot of each layer [l, s]: as placed, or in order, where nothing is known of their load."""
    if placement is not None:
        return placement.expert_ls
    experts = model.router.experts
    return np.tile(in_order(experts, layout.slots(experts)), (model.layers, 1))


def gather_statistics(comm, pairs: dict[int, np.ndarray], model: ModelConfig) -> np.ndarray:
    """Collective: the leaders' counts summed on rank 0, [layer, expert, expert]."""
    mine = np.zeros((model.layers,) + (model.router.experts,) * 2, dtype=np.int64)
    for layer, counts in pairs.items():
        mine[layer] = counts
    total = np.empty_like(mine)
    comm.Reduce(mine, total)
    return total


def holds_here(placement: Placement, layout: Layout, node_of_rank: list[int]) -> bool:
    """Whether leaders and nodes are those that the placement was made for, in every replica."""
    seats = placement.seats
    return layout.leaders == seats.leaders and all(layout.node_pattern(node_of_rank, dp) == seats.node_of_rank
                                                   for dp in range(layout.dp))


def placement_facts(job: JobConfig, placement: Placement | None, layout: Layout, node_of_rank: list[int]) -> dict | None:
    """What the report needs to know of a placement (report.placement)."""
    if placement is None:
        return None
    holds = holds_here(placement, layout, node_of_rank)
    return {"file": job.layout.placement, "top_k": placement.model.top_k, "expert_of_slot": placement.expert_ls.tolist(),
            "predicted": [to_dict(p) for p in placement.predicted] if holds else None}
