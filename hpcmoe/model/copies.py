"""Copies of experts: which of them gets which rows of an expert.

A layer has at least as many slots as experts, and each slot holds one expert. The rows of an expert are dealt to its
copies by turns, in token order: its o-th row on a leader goes to copy (o + leader) mod c. So a leader's rows are split
evenly within one, the rows that are left over fall on other copies for each leader, and the same rows always go the
same way. Behind the gate every slot is an expert of its own: letter `e` there counts slots.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.model.route import Route


class Copies:
    """The slots of one layer. expert_s: the expert in each slot; every expert is in at least one.

    count_e: copies of each expert; slot_ej: their slots, ascending, padded with -1; copy_s: which copy of its
    expert a slot holds. Raises ValueError where an expert is nowhere.
    """

    def __init__(self, expert_s, experts: int):
        self.expert_s = np.asarray(expert_s, dtype=np.int64)
        self.count_e = np.bincount(self.expert_s, minlength=experts)
        if len(self.count_e) > experts or not self.count_e.all():
            raise ValueError(f"slots {self.expert_s.tolist()}: expected each of the experts 0 to {experts - 1} at least once")
        order_s = np.argsort(self.expert_s, kind="stable")
        first_e = np.cumsum(self.count_e) - self.count_e
        self.copy_s = np.empty_like(self.expert_s)
        self.copy_s[order_s] = np.arange(len(order_s)) - np.repeat(first_e, self.count_e)
        self.slot_ej = np.full((experts, int(self.count_e.max())), -1, dtype=np.int64)
        self.slot_ej[self.expert_s, self.copy_s] = np.arange(len(self.expert_s))
        self.in_order = len(self.expert_s) == experts and bool((self.expert_s == np.arange(experts)).all())

    def rows_s(self, n_e, leader: int):
        """Of a leader's n_e rows of each expert, those of each slot."""
        count_s = self.count_e[self.expert_s]
        first_s = (self.copy_s - leader) % count_s  # the first row that is this copy's
        return (n_e[self.expert_s] - first_s + count_s - 1) // count_s

    def spread(self, expert_tk, route: Route, leader: int) -> tuple[Route, np.ndarray]:
        """(the route by slots, the slot of each choice [t, k]) of a leader's route by experts, without sorting again:
        row o of an expert is row o // c of its copy."""
        if self.in_order:
            return route, expert_tk
        n_e = route.n_send_e
        row_tk = route.slot_tk - (np.cumsum(n_e) - n_e)[expert_tk]
        count_tk = self.count_e[expert_tk]
        copy_tk = self.slot_ej[expert_tk, (row_tk + leader) % count_tk]
        n_s = self.rows_s(n_e, leader)
        slot_tk = (np.cumsum(n_s) - n_s)[copy_tk] + row_tk // count_tk
        token_s = np.empty_like(route.token_s)
        token_s[slot_tk] = np.arange(len(slot_tk))[:, None]
        return Route(token_s, slot_tk, n_s), copy_tk

    def turns(self, leader: int) -> np.ndarray:
        """The tables of a leader for kernels, int32: where each expert's part of the second begins [e + 1]; the slots of each expert's
        copies in the order of turns [s]; the expert in each slot [s]; the slot's turn, 0 for the copy that gets row 0 [s]."""
        turn_s = (self.copy_s - leader) % self.count_e[self.expert_s]
        slot_x = np.lexsort((turn_s, self.expert_s))
        return np.concatenate([[0], np.cumsum(self.count_e), slot_x, self.expert_s, turn_s]).astype(np.int32)

    @classmethod
    def of_turns(cls, turns, experts: int) -> "Copies":
        """The copies of a table of `turns`, numbered by their turns: for leader 0."""
        slot_x, expert_s, turn_s = np.split(turns[experts + 1:].astype(np.int64), 3)
        found = cls(expert_s, experts)
        found.copy_s = turn_s
        found.slot_ej[expert_s[slot_x], turn_s[slot_x]] = slot_x
        return found


def in_order(experts: int, slots: int) -> np.ndarray:
    """The experts of slots of which nothing else is known: expert_s, all in order, then the first ones again."""
    return np.arange(slots) % experts
