"""Which rows cross to which node, and who hands them on there: plans for the hierarchical exchange, as arithmetic.

A parcel `u` is one row of a leader for one other node, with those of its choices that live there;
`j` counts the parcels that a forwarder got. `q` is a place of the own node, in ascending order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.compute.relay import NOWHERE, Way  # here also in place of an expert: the choice lives on another node


class Nodes:
    """The nodes of a stage, as the place `me` sees them; node_r: any name of each place's node.

    number_r: nodes by number, in the order of their first place; members: the places of each node;
    here: the own node's number.
    """

    def __init__(self, node_r, me: int):
        number = {node: n for n, node in enumerate(dict.fromkeys(node_r))}
        self.me = me
        self.number_r = np.array([number[node] for node in node_r])
        self.members = [np.flatnonzero(self.number_r == n).tolist() for n in range(len(number))]
        self.here = int(self.number_r[me])
        self.others = [n for n in range(len(number)) if n != self.here]

    @property
    def mates(self) -> list[int]:
        """The places of the own node, this one among them."""
        return self.members[self.here]

    def forwarder(self, place: int, node: int) -> int:
        """Who hands on rows from `place` on another node: the one that stands there as `place` does on its own.

        So the rows of a node's leaders are spread over the ranks (and network cards) of the other one.
        """
        members = self.members[node]
        return members[self.members[self.number_r[place]].index(place) % len(members)]

    def senders(self, leaders: list[int]) -> list[int]:
        """The leaders of other nodes whose rows this place hands on, ascending."""
        return [r for r in leaders if self.number_r[r] != self.here and self.forwarder(r, self.here) == self.me]


class Parcels(NamedTuple):
    """A leader's rows for other nodes, by node and token. n_send_n: how many for each node; expert_uk,
    weight_uk: the choices that live there, in the order of choices, then NOWHERE with weight 0."""

    n_send_n: np.ndarray
    token_u: np.ndarray
    expert_uk: np.ndarray
    weight_uk: np.ndarray

    def blocks(self) -> list[tuple[int, slice]]:
        """(node, its parcels) of the nodes that get any."""
        ends = np.cumsum(self.n_send_n)
        return [(n, slice(int(end - count), int(end))) for n, (end, count) in enumerate(zip(ends, self.n_send_n)) if count]


def parcels(expert_tk, weight_tk, node_e, nodes: Nodes) -> Parcels:
    """Each row once for every other node on which any of its experts lives. node_e: the node of each expert; a choice
    may be NOWHERE."""
    node_tk = np.where(expert_tk == NOWHERE, nodes.here, node_e[expert_tk])
    wanted_nt = np.zeros((len(nodes.members), len(expert_tk)), dtype=bool)
    wanted_nt[node_tk, np.arange(len(expert_tk))[:, None]] = True
    wanted_nt[nodes.here] = False
    node_u, token_u = np.nonzero(wanted_nt)
    away_uk = node_tk[token_u] != node_u[:, None]
    order_uk = np.argsort(away_uk, axis=1, kind="stable")

    def in_order(values_tk, nothing):
        return np.take_along_axis(np.where(away_uk, nothing, values_tk[token_u]), order_uk, axis=1)

    return Parcels(np.bincount(node_u, minlength=len(nodes.members)), token_u,
                   in_order(expert_tk, NOWHERE).astype(np.int32), in_order(weight_tk, 0).astype(np.float32))


class HandOn(NamedTuple):
    """How rows go on inside a node: pair_s, for each slot its (row, choice) pair as a flat number; slot_jk:
    the slot of each pair, or NOWHERE. Slots are sorted by the expert's place and column, in the order of rows within one."""

    pair_s: np.ndarray
    slot_jk: np.ndarray


def hand_on(expert_jk, key_e) -> HandOn:
    """The slots of rows whose choices are expert_jk (NOWHERE: none). key_e: sorts experts by place and column."""
    choice = expert_jk.reshape(-1)
    pairs = np.flatnonzero(choice != NOWHERE)
    pair_s = pairs[np.argsort(key_e[choice[pairs]], kind="stable")]
    slot = np.full(len(choice), NOWHERE, dtype=np.int64)
    slot[pair_s] = np.arange(len(pair_s))
    return HandOn(pair_s, slot.reshape(expert_jk.shape))


def way(own, mine: Parcels | None, choice_jk, weight_jk, here_e, key_e) -> Way:
    """The indices of a layer's rows on one rank.

    own (relay.Chosen), mine: as a leader, else None; choice_jk, weight_jk: of the parcels that came; here_e: whether an
    expert is on this node. Own tokens are handed on before parcels.
    """
    if own is None:
        slots = hand_on(choice_jk, key_e)
        none = np.zeros(0, dtype=np.int64)
        return Way(none, slots.pair_s // choice_jk.shape[1], slots.slot_jk, weight_jk, slots.slot_jk[:0], weight_jk[:0])
    t, k = own.expert_tk.shape
    slots = hand_on(np.concatenate([np.where(here_e[own.expert_tk], own.expert_tk, NOWHERE), choice_jk]), key_e)
    row = np.concatenate([own.row_t, len(own.x) + np.arange(len(choice_jk))])
    slot_tk, weight_tk = terms(slots.slot_jk[:t], own.weight_tk, mine.token_u, len(slots.pair_s))
    return Way(own.row_t[mine.token_u], row[slots.pair_s // k], slots.slot_jk[t:], weight_jk, slot_tk, weight_tk)


def terms(slot_tk, weight_tk, token_u, handed: int) -> tuple[np.ndarray, np.ndarray]:
    """What each token gets, as (slots, weights) [t, k]: the pairs that have a slot here, in the order of choices, then the
    sum of each of its parcels u as slot handed + u with weight 1, in the order of nodes; then NOWHERE with weight 0.

    They are at most k, since each other node has one choice at least.
    """
    away_tk = slot_tk == NOWHERE
    order_tk = np.argsort(away_tk, axis=1, kind="stable")
    slot_tk = np.take_along_axis(slot_tk, order_tk, axis=1)
    weight_tk = np.take_along_axis(np.where(away_tk, 0, weight_tk), order_tk, axis=1).astype(np.float32)
    by_token_u = np.argsort(token_u, kind="stable")  # parcels stand by node
    sorted_u = token_u[by_token_u]
    column_u = np.arange(len(sorted_u)) - np.searchsorted(sorted_u, sorted_u) + (~away_tk).sum(axis=1)[sorted_u]
    slot_tk[sorted_u, column_u], weight_tk[sorted_u, column_u] = handed + by_token_u, 1
    return slot_tk, weight_tk
