"""What the exchanges of a layout take as a function of rows: straight lines, found once for all batches.

An exchange on its own takes its host, latency and the bytes of its busiest link over that link's rate, and bytes grow with the rows
that each leader has. So two batches tell all others (simulate/ways.py, nodeways.py for the exchanges themselves). Where layers
have unequal loads it is the one whose busiest place has least.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.parallel import plan
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import build
from hpcmoe.plan.candidates import Shape
from hpcmoe.plan.stand import Stand
from hpcmoe.simulate.group import INT64, Group
from hpcmoe.simulate.durations import FP32
from hpcmoe.simulate.ways import Moved
from hpcmoe.simulate.workload import Feed

ROWS = (1024, 2048)  # of a leader, of the two batches


class Line(NamedTuple):
    """An exchange of n rows per leader: seconds at0 + n * per_row on the wire, post_s of the host; load0_l + n * load_l bytes on the links."""

    at0: float
    per_row: float
    post_s: float
    load0_l: np.ndarray
    load_l: np.ndarray

    def wire_s(self, rows: float) -> float:
        return self.at0 + self.per_row * rows if rows or self.at0 else 0.0

    def bytes_l(self, rows: float) -> np.ndarray:
        return self.load0_l + rows * self.load_l


class Frame(NamedTuple):
    """Of a stage: its exchanges, None for those that it has not. send: to the next stage, token: back to the first, gather: logits of shards."""

    counts: Line | None
    dispatch: Line | None
    combine: Line | None
    sums: Line | None
    send: Line | None
    gather: Line | None
    token: Line | None


class Frames:
    """Of a layout with its leaders and transport. kind_p: of each stage; frame: by kind; layer: the one that stands for all; share_s: of its
    rows, of each slot."""

    def __init__(self, stand: Stand, shape: Shape):
        layout, told = shape.layout, stand.told
        schedule = build(plan.schedule_name(told.job.run, told.gpu), layout.pp, told.model.layers, 1, 1, layout.tp > 1)
        self.group = stand.group(shape, schedule, [0], Feed([[]], []), None)
        _, share_ls = stand.seats(layout)
        place_lr = np.add.reduceat(share_ls, self.group.slots_r[:-1], axis=1)
        self.layer = int(np.argmin(place_lr.max(axis=1)))
        self.share_s, self.place_r = share_ls[self.layer], place_lr[self.layer]
        self.kind_p = _kinds(stand, layout)
        self.frame = {kind: self._frame(stand, p, layout) for p, kind in reversed(list(enumerate(self.kind_p)))}

    def _frame(self, stand: Stand, stage: int, layout: Layout) -> Frame:
        group, d = self.group, stand.told.model.d
        ways, durations, leaders = group.ways, group.setting.durations, group.leaders_p[stage]
        bandwidth_l, k = stand.network.bandwidth_l, stand.told.model.router.top_k

        def line(make: Callable[[int], tuple[Moved, ...]]) -> Line:
            (s1, post_s, load1_l), (s2, _, load2_l) = (_alone(make(n), bandwidth_l) for n in ROWS)
            step = ROWS[1] - ROWS[0]
            slope, slope_l = (s2 - s1) / step, (load2_l - load1_l) / step
            return Line(s1 - slope * ROWS[0], slope, post_s, load1_l - slope_l * ROWS[0], slope_l)

        def rows(row_bytes: float, back: bool) -> Line:
            def make(n: int) -> tuple[Moved, ...]:
                rows_r = np.zeros(layout.ep, dtype=int)
                rows_r[leaders] = n
                what = (tuple(rows_r.tolist()), tuple((self.place_r * (n * len(leaders) * k)).tolist()), row_bytes, back)
                return group.node_ways.rows(stage, self.layer, *what) if group.node_ways else (ways.rows(stage, *what),)
            return line(make)

        several, last = layout.ep > 1, stage == layout.pp - 1
        j = len(leaders)
        return Frame(
            line(lambda n: group.node_ways.counts(stage) if group.node_ways else (ways.counts(stage),)) if several else None,
            rows(durations.row_bytes, False) if several else None, rows(durations.back_bytes, True) if several else None,
            line(lambda n: (ways.sums(stage, (n,) * j, durations.back_bytes),)) if layout.tp > 1 else None,
            None if last else line(lambda n: (ways.hand_on(stage, stage + 1, (float(FP32 * d * n),) * j, (n,) * j),)),
            line(lambda n: (ways.gather(stage, (float(FP32 * n * durations.model.vocab),) * j),)) if last and layout.tp > 1 else None,
            line(lambda n: (ways.hand_on(stage, 0, (float(2 * INT64 * n),) * j, (n,) * j),)) if last and stage else None)


def _alone(moved: tuple[Moved, ...], bandwidth_l: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(seconds on the wire, of the host, bytes on the links) of exchanges one after the other."""
    seconds, load_l = 0.0, np.zeros(len(bandwidth_l))
    for leg in (leg for one in moved for leg in one.legs):
        seconds += leg.latency_s
        if leg.load_l is not None:
            seconds += float((leg.load_l / bandwidth_l).max())
            load_l = load_l + leg.load_l
    return seconds, sum(one.host_s for one in moved), load_l


def _kinds(stand: Stand, layout: Layout) -> list[tuple]:
    """By stage: the same for those whose ranks lie on nodes alike, and alike to the next stage's; the first and the last are apart."""
    found = []
    for p in range(layout.pp):
        ranks = [r for stage in (p, min(p + 1, layout.pp - 1)) for shard in range(layout.tp) for r in layout.column(0, stage, shard)]
        _, node_r = np.unique(stand.node_r[ranks], return_inverse=True)
        found.append((p == 0, p == layout.pp - 1, node_r.tobytes()))
    return found
