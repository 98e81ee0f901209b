"""Replicas that are alike, as crews for the clock: what each op of their schedule takes, and what it puts on the wire.

Alike are replicas whose leaders have equally long requests and whose ranks lie on nodes in the same way: they do the same at the same
times. One of them is clocked, rank by rank; on the links all of them count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from hpcmoe.compute.step import FIELDS, HEAD
from hpcmoe.config import ModelConfig
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.schedule import Role, Schedule
from hpcmoe.simulate.clock import Crew, Doing, Flight
from hpcmoe.simulate.durations import FP32, Durations, Took
from hpcmoe.simulate.loads import whole_rows
from hpcmoe.simulate.nodeways import NodeWays
from hpcmoe.simulate.ownwork import OwnWork
from hpcmoe.simulate.ways import Moved, Ways
from hpcmoe.simulate.workload import Feed, Rows

INT64 = 8


@dataclass(frozen=True)
class Setting:
    """What all groups share. share_ls: of each layer's rows the share of each slot; trace: whether spans are kept;
    hierarchical: the transport, else rows go straight to their experts; expert_ls: the expert in each slot; sharing: whether ranks share the
    cores of their nodes."""

    model: ModelConfig
    layout: Layout
    schedule: Schedule
    durations: Durations
    share_ls: np.ndarray
    micros: int
    trace: bool
    hierarchical: bool
    expert_ls: np.ndarray
    sharing: bool = False


class Group:
    """number: of the group; leaders_p: the places that lead, by stage; feed_j: the steps of each leader, all of equally many rounds;
    weight_r: as Crew's."""

    def __init__(self, number: int, setting: Setting, ways: Ways, leaders_p: list[list[int]], feed_j: list[Feed],
                 weight_r: Sequence[float] | None = None):
        self.number, self.setting, self.ways, self.leaders_p, self.feed_j = number, setting, ways, leaders_p, feed_j
        self.weight_r = weight_r
        self.rounds = len(feed_j[0].rows_rm)
        self.distinct = list({id(feed): feed for feed in feed_j}.values())
        place = {id(feed): i for i, feed in enumerate(self.distinct)}
        self.which_j = np.array([place[id(feed)] for feed in feed_j])
        self.kept: dict[tuple, tuple] = {}
        self.moved: dict[tuple[int, str, int], dict[int, list]] = {}  # by stage, kind and layer: [exchange, how often it was posted]
        self.load_rls = np.zeros((self.rounds, *setting.share_ls.shape), dtype=np.int64)
        layout, slots = setting.layout, setting.share_ls.shape[1]
        self.slots_r = [share.start for share in (layout.slots_of(place, setting.model.router.experts) for place in range(layout.ep))] + [slots]
        owner_s = layout.owner_of_slot(setting.model.router.experts)
        self.own_work = OwnWork(self)
        self.node_ways = NodeWays(ways, setting.share_ls, owner_s, setting.model.router.top_k,
                                  lambda nbytes: float(setting.durations.calibration.elementwise_s(nbytes))) if setting.hierarchical else None
        self.crews = {role: self._crew(role) for role in setting.schedule.programs if self.places(role)}
        self.running = [crew for role, crew in self.crews.items() for crew in (self._alone(role, crew) if setting.sharing else [crew])]

    # ------------------------------------------------------------ ranks
    def places(self, role: Role) -> list[int]:
        leading = self.leaders_p[role.stage]
        return leading if role.leader else self._once(("others", role.stage), lambda: [p for p in range(self.setting.layout.ep) if p not in leading])

    def ranks(self, role: Role, dp: int) -> list[int]:
        """Of a member, in the order of the crew's arrays: by place, then by shard."""
        layout = self.setting.layout
        return [layout.column(dp, role.stage, shard)[place] for place in self.places(role) for shard in range(layout.tp)]

    def _crew(self, role: Role) -> Crew:
        s, tp = self.setting, self.setting.layout.tp
        watched = frozenset(self.first_op(m) for m in range(s.micros)) if role.stage == 0 and role.leader else frozenset()
        return Crew(self.number, role, len(self.places(role)) * tp, s.schedule.programs[role], self.rounds,
                    lambda rnd, op: self._doing(role, rnd, op), s.durations.calibration.sync_s if s.durations.gpu else 0.0, s.trace, watched,
                    self.weight_r)

    def _alone(self, role: Role, crew: Crew) -> list[Crew]:
        """A crew's ranks as crews of their own."""
        def doing(i: int):
            return lambda rnd, op: _of_rank(self._once(("doing", role, rnd, op), lambda: self._doing(role, rnd, op)), i)
        return [Crew(self.number, role, 1, crew.program, self.rounds, doing(i), crew.sync_s, crew.trace, crew.watched,
                     self.weight_r, int(self.ways.network.node_r[rank])) for i, rank in enumerate(self.ranks(role, self.ways.members[0]))]

    def join(self) -> None:
        """After the clock has run: `crews` have what their ranks did."""
        if self.setting.sharing:
            self.crews = {role: Crew.joined([one for one in self.running if one.role == role]) for role in self.crews}

    def first_op(self, m: int) -> Op:
        """Which builds the step of a micro-batch on stage 0."""
        return Op("EMBED" if self.setting.layout.tp > 1 else "ATTEND", 0, m)

    # ------------------------------------------------------------ rows
    def rows_j(self, rnd: int, m: int) -> list[Rows]:
        return [feed.rows_rm[rnd][m] for feed in self.feed_j]

    def _counts_j(self, rnd: int, m: int) -> tuple[int, ...]:
        return self._once(self._which(rnd, m), lambda: tuple(rows.count for rows in self.rows_j(rnd, m)))

    def _which(self, rnd: int, m: int) -> tuple[int, ...]:
        """The same for steps whose rows are the same objects, on all leaders."""
        return tuple(id(feed.rows_rm[rnd][m]) for feed in self.distinct)

    def _slot_rows(self, rnd: int, op: Op) -> np.ndarray:
        """Rows that each slot of the layer gets."""
        total = sum(self._counts_j(rnd, op.micro)) * self.setting.model.router.top_k
        return self._once(("slots", total, op.layer), lambda: whole_rows(total, self.setting.share_ls[op.layer]))

    def _once(self, key: tuple, make):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    # ------------------------------------------------------------ ops
    def _doing(self, role: Role, rnd: int, op: Op) -> Doing:
        doing = getattr(self, "_" + op.kind.lower())(role, rnd, op)
        return doing._replace(host_s=doing.host_s + self.own_work.seconds(role, rnd, op))

    def _leaders(self, rnd: int, m: int, *names: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(host, device) seconds of a leader crew's ranks for these parts of Durations."""
        def make():
            took = np.zeros((2, len(self.distinct)))
            for i, feed in enumerate(self.distinct):
                for name in names:
                    took[:, i] += self._part(name, feed.rows_rm[rnd][m])
            return self._host_and_device(took[:, self.which_j])
        return self._once((self._which(rnd, m), *names), make)

    def _host_and_device(self, took) -> tuple[np.ndarray, np.ndarray | None]:
        """Of places, as of all their ranks; no device where none has anything to do."""
        host_s, device_s = np.repeat(took, self.setting.layout.tp, axis=1)
        return host_s, device_s if device_s.any() else None

    def _part(self, name: str, rows: Rows) -> Took:
        part, tp = getattr(self.setting.durations, name), self.setting.layout.tp
        return part(rows, tp) if name in ("sample", "sums") else part(rows)

    def _flight(self, role: Role, rnd: int, op: Op, *moved: Moved, whole: bool = False) -> tuple[float, Flight]:
        """(seconds of posting, flight) of exchanges one after the other, of the role or of the whole stage; counts them."""
        if role.leader:
            counted = self.moved.setdefault((role.stage, op.kind, op.layer), {})
            for one in moved:
                counted.setdefault(id(one), [one, 0])[1] += self.weight_r[rnd] if self.weight_r else 1
        return sum(one.host_s for one in moved), Flight((self.number, role.stage, rnd, op), self._taking_part(role, whole), tuple(leg for one in moved for leg in one.legs))

    def _taking_part(self, role: Role, whole: bool) -> int:
        """Crews that post an exchange."""
        roles = [Role(role.stage, leader) for leader in (True, False)] if whole else [role]
        places = [len(self.places(one)) for one in roles]
        return sum(places) * self.setting.layout.tp if self.setting.sharing else sum(map(bool, places))

    def _begins(self, role: Role, op: Op) -> bool:
        """Whether this is where a step's rows come into the stage (EMBED does so on tensor shards of stage 0)."""
        return op.layer == self.setting.schedule.layers_of(role.stage)[0] and not (self.setting.layout.tp > 1 and role.stage == 0)

    def _begun(self, role: Role) -> tuple[str, ...]:
        """What a step begins with: where requests are batched it is put together."""
        return ("begin",) if role.stage else ("step", "begin")

    def _recv(self, role: Role, rnd: int, op: Op) -> Doing:
        schedule, last = self.setting.schedule, self.setting.schedule.stages - 1
        if role.stage:
            sent = Op("SEND", schedule.layers_of(role.stage - 1)[-1], op.micro)
            return Doing(waits_on=(self.number, role.stage - 1, rnd, sent))
        if not last or not rnd:
            return Doing()
        return Doing(waits_on=(self.number, last, rnd - 1, Op("SAMPLE", schedule.layers_of(last)[-1], op.micro)))

    def _embed(self, role: Role, rnd: int, op: Op) -> Doing:
        return self._summed(role, rnd, op, *self._begun(role), "sums")

    def _attend(self, role: Role, rnd: int, op: Op) -> Doing:
        host_s, device_s = self._leaders(rnd, op.micro, *self._begun(role) * self._begins(role, op), "attend")
        return Doing(host_s, 0.0, device_s)

    def _reduce_attend(self, role: Role, rnd: int, op: Op) -> Doing:
        return self._summed(role, rnd, op, "sums")

    _reduce_merge = _reduce_attend

    def _summed(self, role: Role, rnd: int, op: Op, *names: str) -> Doing:
        host_s, device_s = self._leaders(rnd, op.micro, *names)
        post_s, flight = self._flight(role, rnd, op, self.ways.sums(role.stage, self._counts_j(rnd, op.micro), self.setting.durations.back_bytes))
        return Doing(host_s, post_s, device_s, flight)

    def _gate(self, role: Role, rnd: int, op: Op) -> Doing:
        host_s, device_s = self._leaders(rnd, op.micro, "gate")
        return Doing(host_s, 0.0, device_s)

    def _counts(self, role: Role, rnd: int, op: Op) -> Doing:
        if self.setting.layout.ep == 1:
            return Doing(flight=Flight(None))
        moved = self.node_ways.counts(role.stage) if self.node_ways else (self.ways.counts(role.stage),)
        post_s, flight = self._flight(role, rnd, op, *moved, whole=True)
        return Doing(0.0, post_s, None, flight)

    def _dispatch(self, role: Role, rnd: int, op: Op) -> Doing:
        if role.leader:
            self.load_rls[rnd, op.layer] += self._slot_rows(rnd, op)
        host_s, device_s = self._leaders(rnd, op.micro, "dispatch") if role.leader else (0.0, None)
        return self._moving(role, rnd, op, host_s, device_s, self.setting.durations.row_bytes)

    def _combine(self, role: Role, rnd: int, op: Op) -> Doing:
        return self._moving(role, rnd, op, 0.0, None, self.setting.durations.back_bytes)

    def _moving(self, role: Role, rnd: int, op: Op, host_s, device_s, row_bytes: float) -> Doing:
        if self.setting.layout.ep == 1:
            self._flight(role, rnd, op, self.ways.stay(int(self._slot_rows(rnd, op).sum()), row_bytes))
            return Doing(host_s, 0.0, device_s)

        def make() -> tuple[Moved, ...]:
            rows_r = np.zeros(self.setting.layout.ep, dtype=np.int64)
            rows_r[self.leaders_p[role.stage]] = self._counts_j(rnd, op.micro)
            rows_s = np.add.reduceat(self._slot_rows(rnd, op), self.slots_r[:-1])
            what = (tuple(rows_r.tolist()), tuple(rows_s.tolist()), row_bytes, op.kind == "COMBINE")
            return self.node_ways.rows(role.stage, op.layer, *what) if self.node_ways else (self.ways.rows(role.stage, *what),)
        moved = self._once((role.stage, op.kind, op.layer, self._counts_j(rnd, op.micro)), make)
        post_s, flight = self._flight(role, rnd, op, *moved, whole=True)
        return Doing(host_s, post_s, device_s, flight)

    def _expert(self, role: Role, rnd: int, op: Op) -> Doing:
        def make():
            rows_s = self._slot_rows(rnd, op)
            tokens = sum(self._counts_j(rnd, op.micro))
            rows_pe = [tuple(rows_s[self.slots_r[p]:self.slots_r[p + 1]].tolist()) for p in self.places(role)]
            took = {rows_e: self.setting.durations.expert(rows_e, tokens) for rows_e in set(rows_pe)}
            return self._host_and_device(np.array([took[rows_e] for rows_e in rows_pe]).T)
        host_s, device_s = self._once((role, "EXPERT", op.layer, sum(self._counts_j(rnd, op.micro))), make)
        return Doing(host_s, 0.0, device_s)

    def _merge(self, role: Role, rnd: int, op: Op) -> Doing:
        host_s, device_s = self._leaders(rnd, op.micro, "merge")
        return Doing(host_s, 0.0, device_s)

    def _send(self, role: Role, rnd: int, op: Op) -> Doing:
        rows_j, d = self.rows_j(rnd, op.micro), self.setting.model.d
        bytes_j = tuple(FP32 * d * rows.count + INT64 * (HEAD + FIELDS * (len(rows.count_q) + rows.singles)) for rows in rows_j)
        moved = self.ways.hand_on(role.stage, role.stage + 1, bytes_j, self._counts_j(rnd, op.micro))
        post_s, flight = self._flight(role, rnd, op, moved)
        return Doing(0.0, post_s, None, flight)

    def _sample(self, role: Role, rnd: int, op: Op) -> Doing:
        host_s, device_s = self._leaders(rnd, op.micro, "sample")
        wanted_j, moved, s = tuple(rows.wanted for rows in self.rows_j(rnd, op.micro)), [], self.setting
        if s.layout.tp > 1:
            moved.append(self.ways.gather(role.stage, tuple(float(FP32 * n * s.durations.model.vocab) for n in wanted_j)))
        if role.stage:
            moved.append(self.ways.hand_on(role.stage, 0, tuple(float(INT64 * (2 + 2 * n)) for n in wanted_j), wanted_j, host=True))
        if not moved:
            return Doing(host_s, 0.0, device_s, Flight(None))
        post_s, flight = self._flight(role, rnd, op, *moved)
        return Doing(host_s, post_s, device_s, flight)


def _of_rank(doing: Doing, i: int) -> Doing:
    """What an op of a crew is to its i-th rank."""
    return doing._replace(**{name: value[i:i + 1] for name in ("host_s", "device_s") for value in [getattr(doing, name)] if isinstance(value, np.ndarray)})
