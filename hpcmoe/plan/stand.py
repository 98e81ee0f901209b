"""What all trials of a search share: the cluster's links, kernels, which replicas are alike; and a candidate as crews for the clock."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hpcmoe import placing
from hpcmoe.parallel import plan
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import Schedule, build
from hpcmoe.plan.candidates import Candidate, Shape
from hpcmoe.plan.rounds import Short, rounds_of
from hpcmoe.simulate.alike import alike
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.group import Group, Setting
from hpcmoe.simulate.memory import shard_of
from hpcmoe.simulate.run import Told, slot_shares
from hpcmoe.simulate.staged import network_of
from hpcmoe.simulate.ways import Ways
from hpcmoe.simulate.workload import Feed


class Stand:
    """What is worked out once for many candidates."""

    def __init__(self, told: Told):
        self.told = told
        self.node_r = np.arange(told.gpus) // told.cluster.nodes.ranks_per_node
        self.network = network_of(told.cluster, self.node_r, told.calibration, told.job.run.transport)
        self.durations = lru_cache(maxsize=None)(self._durations)
        self.alike = lru_cache(maxsize=None)(lambda layout: alike(layout, self.network, [0] * layout.dp))
        self.seats = lru_cache(maxsize=64)(self._seats)
        self.rounds = lru_cache(maxsize=None)(self._rounds)
        self.known: dict = {}
        self.even = float(np.ptp(told.share_le)) < 1e-12  # layers and experts are alike

    def once(self, key, make):
        """What make() gave for this key the first time."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def pattern(self, ranks: list[int]) -> bytes:
        """The same for ranks that lie on nodes, links and switches alike."""
        network = self.network
        tables = [network.node_r, *(kind.link_r for kind in network.kinds), *network.group_ir]
        return b"".join(np.unique(table_r[ranks], return_inverse=True)[1].astype(np.int32).tobytes() for table_r in tables)

    def _durations(self, tp: int) -> Durations:
        told = self.told
        local = shard_of(told.model, tp).model if tp > 1 else told.model
        return Durations(told.calibration, local, told.model, told.gpu, told.job.run.graphs, told.job.run.dispatch_dtype == "fp8", told.drawn)

    def _seats(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """(expert [l, s], share of a layer's rows [l, s]) of every slot."""
        expert_ls = placing.expert_ls(None, self.told.model, layout)
        return expert_ls, slot_shares(self.told, expert_ls)

    def _rounds(self, sequences: int, rows: int, several: bool, whole: bool) -> Short:
        """several: micro-batches, of which the first one does not know in its first empty step that the others have ended as well."""
        told = self.told
        return rounds_of(sequences, rows, told.job.run.prefill_chunk, *told.lengths[0], told.model.attention.window, 1 + several, whole)

    def short(self, c: Candidate, whole: bool = False) -> Short:
        return self.rounds(c.shape.sequences, c.shape.rows, c.micros > 1, whole)

    def groups(self, c: Candidate, short: Short) -> list[tuple[Group, list[int]]]:
        """The replicas of a candidate in groups of those that are alike: (group, its members)."""
        layout, told = c.shape.layout, self.told
        schedule = build(plan.schedule_name(told.job.run, told.gpu), layout.pp, told.model.layers, c.micros, c.lanes, layout.tp > 1)
        feed = Feed([[rows] * c.micros for rows in short.rows_r], [])
        return [(self.group(c.shape, schedule, members, feed, short.weight_r, number), members)
                for number, members in enumerate(self.alike(_places(layout)))]

    def group(self, shape: Shape, schedule: Schedule, members: list[int], feed: Feed, weight_r, number: int = 0) -> Group:
        """Replicas that are alike, with this schedule, which may have fewer layers than the model."""
        layout, told = shape.layout, self.told
        expert_ls, share_ls = (x_ls[:schedule.layers] for x_ls in self.seats(layout))
        if len(share_ls) < schedule.layers:  # more than the model: all alike
            expert_ls, share_ls = (np.repeat(x_ls[:1], schedule.layers, axis=0) for x_ls in (expert_ls, share_ls))
        setting = Setting(told.model, layout, schedule, self.durations(layout.tp), share_ls, schedule.micros, False, shape.hierarchical, expert_ls)
        leaders_p = layout.leader_places(self.node_r, members[0])
        ways = Ways(self.network, layout, members, leaders_p, share_ls.shape[1])
        return Group(number, setting, ways, leaders_p, [feed] * len(leaders_p[0]), weight_r)


def _places(layout: Layout) -> Layout:
    """A layout without leaders and copies, which do not move its ranks."""
    return Layout(layout.dp, layout.pp, layout.ep, layout.tp)
