"""What the exchanges of a layout take as a function of rows, alone on the network: found once for all batches.

An exchange takes its host, its latency and the bytes of its busiest link over that link's rate (simulate/ways.py, nodeways.py). Bytes
grow with the rows that each leader has, so two large batches tell all others but the smallest, in which some places have no rows: those are
worked out one by one. Where layers have unequal loads, an exchange is the mean of some layers' (of all, where there are few).
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.parallel import plan
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import build
from hpcmoe.plan.candidates import Shape
from hpcmoe.plan.stand import Stand
from hpcmoe.simulate.group import INT64
from hpcmoe.simulate.durations import FP32
from hpcmoe.simulate.loads import whole_rows
from hpcmoe.simulate.ways import Moved
from hpcmoe.simulate.workload import Feed

ROWS = (1024, 2048)  # of a leader, in the two large batches
FEW = 2              # rows of each slot, or of each shard, up to which a batch is small
LAYERS = 8           # that stand for all, at most


class Cost(NamedTuple):
    """wire_s: from when all are ready; post_s: of the host; load_l: bytes on each link."""

    wire_s: float
    post_s: float
    load_l: np.ndarray


class Way:
    """An exchange. make(n): it with n rows per leader, one for each layer that stands for all; small: up to so many rows it is worked out as it is."""

    def __init__(self, make: Callable[[int], list[tuple[Moved, ...]]], bandwidth_l: np.ndarray, small: float = 0):
        self.make, self.bandwidth_l, self.small = make, bandwidth_l, small
        self.known: dict[int, Cost] = {}

    def at(self, rows: int) -> Cost:
        if rows not in self.known:
            self.known[rows] = self._exact(rows) if rows <= self.small or rows in ROWS else self._line(rows)
        return self.known[rows]

    def of(self, rows_n: np.ndarray) -> Cost:
        """Of many batches at once [n], [n, l]."""
        rows_u, which_n = np.unique(rows_n, return_inverse=True)
        return Cost(*(np.array(values)[which_n] for values in zip(*(self.at(rows) for rows in rows_u.tolist()))))

    def _exact(self, rows: int) -> Cost:
        found = [_alone(moved, self.bandwidth_l) for moved in self.make(rows)]
        return Cost(*(sum(values) / len(found) for values in zip(*found)))

    def _line(self, rows: int) -> Cost:
        one, two = (self.at(n) for n in ROWS)
        part = (rows - ROWS[0]) / (ROWS[1] - ROWS[0])
        return Cost(one.wire_s + part * (two.wire_s - one.wire_s), two.post_s, one.load_l + part * (two.load_l - one.load_l))


class Frame(NamedTuple):
    """Of a stage: its exchanges, None for those that it has not. send: to the next stage, token: back to the first, gather: logits of shards."""

    counts: Way | None
    dispatch: Way | None
    combine: Way | None
    sums: Way | None
    send: Way | None
    gather: Way | None
    token: Way | None


class Frames:
    """Of a layout with its leaders and transport. kind_p: of each stage; frame: by kind; layers: those that stand for all; share_ls: of
    their rows, of each slot."""

    def __init__(self, stand: Stand, shape: Shape):
        layout, told = shape.layout, stand.told
        schedule = build(plan.schedule_name(told.job.run, told.gpu), layout.pp, told.model.layers, 1, 1, layout.tp > 1)
        self.group = stand.group(shape, schedule, [0], Feed([[]], []), None)
        count = 1 if stand.even else min(LAYERS, told.model.layers)
        self.layers = [told.model.layers * i // count for i in range(count)]
        self.share_ls = stand.seats(layout)[1][self.layers]
        self.kind_p = self._kinds(stand, layout)
        self.frame = {kind: self._frame(stand, p, layout) for p, kind in reversed(list(enumerate(self.kind_p)))}

    def rows_s(self, tokens: int, top_k: int) -> list[np.ndarray]:
        """Rows of each slot where all leaders together have so many tokens, for each of the layers."""
        return [whole_rows(tokens * top_k, share_s) for share_s in self.share_ls]

    def _kinds(self, stand: Stand, layout: Layout) -> list[tuple]:
        """By stage: the same for those that lie on links alike, together with the next one; the first and the last are apart."""
        def ranks(p: int) -> list[int]:
            return [r for shard in range(layout.tp) for r in layout.column(0, p % layout.pp, shard)]
        return [(p == 0, p == layout.pp - 1, stand.pattern(ranks(p)), stand.pattern(ranks(p) + ranks(p + 1))) for p in range(layout.pp)]

    def _frame(self, stand: Stand, stage: int, layout: Layout) -> Frame:
        """Exchanges of other layouts over links alike are the same."""
        group, d = self.group, stand.told.model.d
        ways, durations, leaders = group.ways, group.setting.durations, tuple(group.leaders_p[stage])
        first, last, alone, joined = self.kind_p[stage]
        j, bandwidth_l, seats = len(leaders), stand.network.bandwidth_l, (layout.ep, layout.tp, leaders)

        def between(name: str, target: int, nbytes: int) -> Way:
            """From leaders to leaders, so many bytes a row."""
            return stand.once((name, *seats, joined), lambda: Way(
                lambda n: [(ways.hand_on(stage, target, (float(nbytes * n),) * j, (n,) * j),)], bandwidth_l))

        sums = stand.once(("sums", *seats, alone), lambda: Way(
            lambda n: [(ways.sums(stage, (n,) * j, durations.back_bytes),)], bandwidth_l, FEW * layout.tp)) if layout.tp > 1 else None
        gather = stand.once(("gather", *seats, alone), lambda: Way(
            lambda n: [(ways.gather(stage, (float(FP32 * n * durations.model.vocab),) * j),)], bandwidth_l)) if layout.tp > 1 and last else None
        inside = stand.once(("rows", *seats, layout.replicas, bool(group.node_ways), alone), lambda: self._rows(stand, stage, layout)) \
            if layout.ep > 1 else (None,) * 3
        return Frame(*inside, sums, None if last else between("send", stage + 1, FP32 * d), gather,
                     between("token", 0, 2 * INT64) if last and not first else None)

    def _rows(self, stand: Stand, stage: int, layout: Layout) -> tuple[Way, Way, Way]:
        """Counts, dispatch and combine."""
        group, k, leaders, bandwidth_l = self.group, stand.told.model.router.top_k, self.group.leaders_p[stage], stand.network.bandwidth_l

        def rows(row_bytes: float, back: bool) -> Way:
            def make(n: int) -> list[tuple[Moved, ...]]:
                rows_r, made = np.zeros(layout.ep, dtype=int), []
                rows_r[leaders] = n
                for layer, rows_s in zip(self.layers, self.rows_s(n * len(leaders), k)):
                    place_r = np.add.reduceat(rows_s, group.slots_r[:-1])
                    what = (tuple(rows_r.tolist()), tuple(place_r.tolist()), row_bytes, back)
                    made.append(group.node_ways.rows(stage, layer, *what) if group.node_ways else (group.ways.rows(stage, *what),))
                return made
            return Way(make, bandwidth_l, FEW * self.share_ls.shape[1] / (len(leaders) * k))

        durations = group.setting.durations
        counts = Way(lambda n: [group.node_ways.counts(stage) if group.node_ways else (group.ways.counts(stage),)], bandwidth_l)
        return counts, rows(durations.row_bytes, False), rows(durations.back_bytes, True)


def _alone(moved: tuple[Moved, ...], bandwidth_l: np.ndarray) -> Cost:
    """Of exchanges one after the other."""
    seconds, load_l = 0.0, np.zeros(len(bandwidth_l))
    for leg in (leg for one in moved for leg in one.legs):
        seconds += leg.latency_s
        if leg.load_l is not None:
            seconds += float((leg.load_l / bandwidth_l).max())
            load_l = load_l + leg.load_l
    return Cost(seconds, sum(one.host_s for one in moved), load_l)
