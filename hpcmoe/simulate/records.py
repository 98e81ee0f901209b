"""From clocks to the records that a real run makes: one per rank, so that reports and traces are made by the same code."""

from __future__ import annotations

import numpy as np

from hpcmoe.cluster.network import Network
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.schedule import Role
from hpcmoe.report.record import MOVES, RankRecord, RequestTimes, Seated, Span, StepRow
from hpcmoe.simulate.clock import Crew
from hpcmoe.simulate.group import Group
from hpcmoe.simulate.memory import Held


def records_of(group: Group, network: Network, held: dict[Role, Held], indices: dict[int, list[list[int]]], device: str) -> list[RankRecord]:
    """Of all ranks of a group's replicas. indices: for each replica, the numbers of the requests of each leader, in its feed's order."""
    made = []
    for role, crew in group.crews.items():
        rows = _Moves(group, role)
        for dp, index_j in indices.items():
            for i, rank in enumerate(group.ranks(role, dp)):
                record = _record(group, crew, role, network, rank, i, dp, held[role], device)
                rows.book(record)
                if role.leader and role.stage == 0 and not record.shard:
                    _requests(group, crew, i, index_j, record)
                made.append(record)
    return made


def _record(group: Group, crew: Crew, role: Role, network: Network, rank: int, i: int, dp: int, held: Held, device: str) -> RankRecord:
    setting, place = group.setting, group.setting.layout.place(rank)
    layers, model = list(setting.layout.layers_of(role.stage, setting.model.layers)), setting.durations.model
    slots = list(setting.layout.slots_of(place.place, setting.model.router.experts))
    node = int(network.node_r[rank])
    record = RankRecord(rank, f"node{node}", node, dp, role.stage, place.place, role.leader, layers, slots, place.shard, device=device)
    for name in ("busy_s", "wait_s", "post_s", "device_s"):
        setattr(record, name, {kind: float(np.broadcast_to(seconds, crew.now.shape)[i]) for kind, seconds in getattr(crew, name).items()})
    record.run_s = float(crew.now[i])
    record.load = group.load_rls[:, layers[0]:layers[-1] + 1, slots[0]:slots[-1] + 1] if slots else np.zeros((group.rounds, len(layers), 0), int)
    record.seated = [Seated(0, setting.expert_ls[np.ix_(layers, slots)])]
    record.expert_rows = int(record.load.sum())
    record.expert_flop = record.expert_rows * 2 * (2 + model.expert.gated) * model.d * model.expert.f
    record.weights_bytes = record.weights_predicted_bytes = held.weights
    record.kv_bytes, record.buffer_bytes = held.kv, held.buffers
    record.spans = [Span(s.op.kind, s.op.layer, s.op.micro, s.round, float(np.broadcast_to(s.start_s, crew.now.shape)[i]),
                         float(np.broadcast_to(s.end_s, crew.now.shape)[i]), s.wait, s.device) for s in crew.stretches]
    return record


class _Moves:
    """Rows that the places of a role sent, over the whole run."""

    def __init__(self, group: Group, role: Role):
        self.tables = []
        for (stage, kind, layer), counted in group.moved.items():
            if stage == role.stage and kind in MOVES and (role.leader or kind in ("COUNTS", "DISPATCH", "COMBINE")):
                for moved, count in counted.values():
                    self.tables.append((Op(kind, layer, 0), moved, count))

    def book(self, record: RankRecord) -> None:
        r = record.place
        for op, moved, count in self.tables:
            record.count(op, *(round(float(x[r]) * count) for x in (moved.intra_r, moved.inter_r)), moved.row_bytes,
                         round(float(moved.own_r[r]) * count))


def _requests(group: Group, crew: Crew, i: int, index_j: list[list[int]], record: RankRecord) -> None:
    """Steps and requests of the leader that batches them; a step begins when its rows are built, which is also when the tokens of the
    last one of its micro-batch are known."""
    j = i // group.setting.layout.tp
    feed, micros = group.feed_j[j], group.setting.micros

    def at_s(number: int) -> float:
        rnd, m = divmod(number, micros)
        return float(crew.begun[rnd, group.first_op(m)][i])

    for rnd, rows_m in enumerate(feed.rows_rm[:-1]):
        for m, rows in enumerate(rows_m):
            if rows.count:
                number = rnd * micros + m
                record.steps.append(StepRow(rnd, m, at_s(number), at_s(number + micros), rows.prefill, rows.decode))
    for s in feed.served:
        record.requests.append(RequestTimes(index_j[j][s.place], s.prompt, s.outputs, at_s(s.admitted), at_s(s.first), at_s(s.end)))
