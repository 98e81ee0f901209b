"""What ops take of the host besides their arithmetic or launches: the engine's own time of each op, and products on new numbers of rows (plans.py)."""

from __future__ import annotations

import numpy as np

from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.schedule import Role
from hpcmoe.simulate.plans import Unseen, first_seen

PLANNED = {"ATTEND": 2, "SAMPLE": 1}  # products of an op whose rows are a leader's


class OwnWork:
    """Of one group's ranks; group: simulate.group.Group."""

    def __init__(self, group):
        self.group, self.calls = group, group.setting.durations.calibration.calls
        self.new_jrm: dict[str, np.ndarray] = {}  # by kind: which steps of each distinct leader have new numbers of rows
        self.new_plrm: dict[Role, np.ndarray] = {}  # new numbers of rows of each place's experts, expected

    def seconds(self, role: Role, rnd: int, op: Op) -> float | np.ndarray:
        """A number, or an array over the ranks of the role."""
        calls = self.calls
        us = calls.op_us + (calls.counts_us if op.kind == "COUNTS" else calls.move_us if op.kind in ("DISPATCH", "COMBINE") else 0.0)
        tp = self.group.setting.layout.tp
        if calls.plan_us and op.kind in PLANNED and (op.kind == "SAMPLE" or op.layer == self._layers(role)[0]):
            us = us + calls.plan_us * PLANNED[op.kind] * np.repeat(self._new_rows(op.kind)[self.group.which_j, rnd, op.micro], tp)
        if calls.expert_plan_us and op.kind == "EXPERT":
            us = us + calls.expert_plan_us * np.repeat(self._new_expert_rows(role)[:, op.layer - self._layers(role)[0], rnd, op.micro], tp)
        return us * 1e-6

    def _layers(self, role: Role):
        return self.group.setting.schedule.layers_of(role.stage)

    def _new_rows(self, kind: str) -> np.ndarray:
        if kind not in self.new_jrm:
            name = "wanted" if kind == "SAMPLE" else "count"
            shape = (self.group.rounds, self.group.setting.micros)
            self.new_jrm[kind] = np.array([np.reshape(first_seen([getattr(rows, name) for rows_m in feed.rows_rm for rows in rows_m],
                                                                 self.calls.plan_rows), shape)
                                           for feed in self.group.distinct], dtype=float)
        return self.new_jrm[kind]

    def _new_expert_rows(self, role: Role) -> np.ndarray:
        if role not in self.new_plrm:
            group, layers, places = self.group, self._layers(role), self.group.places(role)
            top_k, share_ls = group.setting.model.router.top_k, group.setting.share_ls
            made = np.zeros((len(places), len(layers), group.rounds, group.setting.micros))
            for i, place in enumerate(places):
                unseen, slots = Unseen(self.calls.plan_rows), slice(group.slots_r[place], group.slots_r[place + 1])
                for rnd in range(group.rounds):
                    for m in range(group.setting.micros):
                        tokens = sum(rows.count for rows in group.rows_j(rnd, m))
                        for j, layer in enumerate(layers):
                            made[i, j, rnd, m] = unseen.new(tokens, share_ls[layer, slots] * top_k)
            self.new_plrm[role] = made
        return self.new_plrm[role]
