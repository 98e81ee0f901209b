"""Which exchange a run takes where that is left open: decided as its trial at start does (parallel/trial.py), with times from the cluster file.

As there all stages of all replicas exchange the rows of one layer at once, with even choices: counts, dispatch, combine, one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.network import Network
from hpcmoe.config import ModelConfig
from hpcmoe.parallel import plan
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.loads import whole_rows
from hpcmoe.simulate.nodeways import NodeWays
from hpcmoe.simulate.ways import Moved, Ways


class ExchangeTrial(NamedTuple):
    """Predicted seconds of a layer's exchanges of so many rows per leader, there and back."""

    rows: int
    flat_s: float
    hierarchical_s: float

    @property
    def hierarchical(self) -> bool:
        """Whether it is taken."""
        return self.hierarchical_s < plan.TRIAL_MARGIN * self.flat_s


def exchange_trial(network: Network, layout: Layout, model: ModelConfig, durations: Durations, groups: list[list[int]], rows: int) -> ExchangeTrial:
    """groups: replicas that are alike (alike.py); rows: of a leader in most steps."""
    rows = plan.trial_rows(rows, int(durations.row_bytes), model.router.top_k)
    slots = layout.slots(model.router.experts)
    owner_s, share_ls = np.array(layout.owner_of_slot(model.router.experts)), np.full((model.layers, slots), 1 / slots)
    flat, by_node = [], []
    for members in groups:
        leaders_p = layout.leader_places(network.node_r, members[0])
        ways = Ways(network, layout, members, leaders_p, slots)
        node_ways = NodeWays(ways, share_ls, owner_s.tolist(), model.router.top_k, lambda nbytes: float(durations.calibration.elementwise_s(nbytes)))
        for stage in range(layout.pp):
            rows_r = np.zeros(layout.ep, dtype=np.int64)
            rows_r[leaders_p[stage]] = rows
            rows_s = np.bincount(owner_s, weights=whole_rows(int(rows_r.sum()) * model.router.top_k, share_ls[0]), minlength=layout.ep)
            what = [(tuple(rows_r.tolist()), tuple(rows_s.tolist()), nbytes, back) for nbytes, back in
                    ((durations.row_bytes, False), (durations.back_bytes, True))]
            flat.append([ways.counts(stage), *(ways.rows(stage, *one) for one in what)])
            by_node.append([*node_ways.counts(stage), *(hop for one in what for hop in node_ways.rows(stage, 0, *one))])
    return ExchangeTrial(rows, _seconds(network, flat), _seconds(network, by_node))


def _seconds(network: Network, moved: list[list[Moved]]) -> float:
    """Hops one after the other, each at once on all stages: posting, the busiest link, the longest latency."""
    total = 0.0
    for hop in zip(*moved):
        legs = [leg for one in hop for leg in one.legs]
        load_l = sum((leg.load_l for leg in legs if leg.load_l is not None), np.zeros_like(network.bandwidth_l))
        total += max(one.host_s for one in hop) + float((load_l / network.bandwidth_l).max(initial=0.0)) + max(leg.latency_s for leg in legs)
    return total
