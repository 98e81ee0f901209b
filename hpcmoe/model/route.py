"""Route: which send slot each (token, choice) pair takes, and what arrives where."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.device import xp_of


class Route(NamedTuple):
    """One micro-batch's way through one layer; dispatch and combine use the same one.

    token_s: the token row of each send slot; slot_tk: the slot of each (token, choice) pair;
    n_send_e: rows per expert, over all experts of the layer. Slots are sorted by expert, in
    token order within one, and so by destination, since a place holds consecutive experts.
    """

    token_s: np.ndarray
    slot_tk: np.ndarray
    n_send_e: np.ndarray


def route(expert_tk, experts: int) -> Route:
    """The stable plan for the chosen experts [t, k]."""
    xp = xp_of(expert_tk)
    choice = expert_tk.reshape(-1)
    order_s = xp.argsort(choice, kind="stable")
    slot = xp.empty(len(choice), dtype=np.int64)
    slot[order_s] = xp.arange(len(choice))
    return Route(order_s // expert_tk.shape[1], slot.reshape(expert_tk.shape), xp.bincount(choice, minlength=experts))


def merge(x_td, y_sd, weight_tk, slot_tk) -> None:
    """x_td += sum over k of weight_tk * y of (t, k), the choices in order: in place."""
    for k in range(slot_tk.shape[1]):
        part = y_sd[slot_tk[:, k]]
        part *= weight_tk[:, k, None]
        x_td += part


def add_chosen(x_td, y_sd, weight_tk, slot_tk) -> None:
    """merge() for pairs that may have no slot (-1): those add nothing."""
    for k in range(slot_tk.shape[1]):
        token = np.flatnonzero(slot_tk[:, k] >= 0)
        if len(token):
            part = y_sd[slot_tk[token, k]]
            part *= weight_tk[token, k, None]
            if len(token) == len(x_td):
                x_td += part
            else:
                x_td[token] += part


def sum_chosen(out_td, y_sd, weight_tk, slot_tk) -> None:
    """out_td = the sum that add_chosen() adds, where every token's first pair has a slot."""
    np.take(y_sd, slot_tk[:, 0], axis=0, out=out_td, mode="clip")
    out_td *= weight_tk[:, :1]
    add_chosen(out_td, y_sd, weight_tk[:, 1:], slot_tk[:, 1:])


def by_expert(n_recv_re) -> np.ndarray | None:
    """The order that sorts received rows (by peer, then expert) by expert: [i], or None if they are sorted."""
    if (np.count_nonzero(n_recv_re, axis=0) > 0).sum() <= 1 or np.count_nonzero(n_recv_re.sum(axis=1)) <= 1:
        return None
    peers, local = n_recv_re.shape
    expert_i = np.repeat(np.tile(np.arange(local), peers), n_recv_re.reshape(-1))
    return np.argsort(expert_i, kind="stable")


def together(expert_tk: np.ndarray, experts: int) -> np.ndarray:
    """How many tokens chose both of two experts: int64 [e, e]; on the diagonal, how many chose the one."""
    both = expert_tk[:, :, None] * experts + expert_tk[:, None, :]
    return np.bincount(both.reshape(-1), minlength=experts**2).reshape(experts, experts)
