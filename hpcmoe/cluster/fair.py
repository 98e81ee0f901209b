"""Exchanges that overlap in time share links: max-min fair rates by progressive filling, and when each ends.

A flow is what shares links as one: a message, or a whole exchange. It has a weight on each link: the bytes there per
byte on its busiest link; 1 on every link of a single message. All rates grow alike until a link is full; the flows
on it keep their rate, the others grow on (Bertsekas and Gallager, Data Networks, 2nd ed., 6.5.2). The result is the
one allocation in which no flow's rate could grow without taking from a flow that has no more.
Messages that are alike (of one size, over links that are alike) can be one flow with their bytes added up, weighted
by how many of them are on its busiest link: by symmetry they have the same rate at all times, so nothing is lost.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Hashable, NamedTuple

import numpy as np

FULL = 1e-9  # relative: a link so nearly full is full


def fair_rates(weight_fl: np.ndarray, bandwidth_l: np.ndarray) -> np.ndarray:
    """Max-min fair bytes/s of each flow: [f]; inf for a flow that is on no link. weight_fl >= 0, bandwidth_l > 0."""
    weight_fl, bandwidth_l = np.asarray(weight_fl, dtype=float), np.asarray(bandwidth_l, dtype=float)
    used_l = weight_fl.any(axis=0)
    weight_fl, bandwidth_l = weight_fl[:, used_l], bandwidth_l[used_l]
    rate_f = np.full(len(weight_fl), np.inf)
    free_f = weight_fl.any(axis=1)
    left_l = bandwidth_l.copy()  # of each link, what flows with a rate leave
    while free_f.any():
        growing_l = weight_fl[free_f].sum(axis=0)
        limit_l = np.divide(left_l, growing_l, out=np.full(len(left_l), np.inf), where=growing_l > 0)
        rate = max(float(limit_l.min()), 0.0)
        full_l = limit_l <= rate * (1 + FULL)
        stop_f = free_f & (weight_fl[:, full_l] > 0).any(axis=1)
        rate_f[stop_f] = rate
        left_l = left_l - rate * weight_fl[stop_f].sum(axis=0)
        free_f &= ~stop_f
    return rate_f


def distinct_links(loads: list[np.ndarray], bandwidth_l: np.ndarray) -> np.ndarray:
    """One link of each set of links that are alike, and only of those that carry anything: indices into bandwidth_l.

    Alike: the same rate, and in each of the exchanges the same bytes. They fill at the same moments, so that leaving
    all but one of them out changes no rate; of 16,384 ranks' links a handful is left.
    """
    table_lf = np.stack([*loads, bandwidth_l], axis=1)
    _, first = np.unique(table_lf, axis=0, return_index=True)
    return np.sort(first[table_lf[first, :-1].any(axis=1)])


@dataclass
class _Moving:
    """A flow on its way: bytes left on its busiest link (per message), bytes on each link per such byte, bytes/s. number: the same for flows
    of the same weights."""

    left: float
    weight_l: np.ndarray
    number: int
    rate: float = 0.0


class Wire:
    """The network as time goes by: exchanges start, share links, and end.

    start(now, key, load_l) puts one on; next_end() says which ends next if nothing else starts; advance(now) moves
    time on. Times are in s and never go back. A caller works off next_end() and its own events in order of time.
    Loads that are the same array (which must not change), and what is on its way together again, are worked out once.
    """

    KEPT = 10_000

    def __init__(self, bandwidth_l: np.ndarray):
        self.bandwidth_l = np.asarray(bandwidth_l, dtype=float)
        self.now = 0.0
        self.moving: dict[Hashable, _Moving] = {}
        self.known: dict[tuple[int, float], tuple[np.ndarray, _Moving]] = {}  # by a load's id and messages: the load, and its flow
        self.rates: dict[tuple[int, ...], list[float]] = {}                   # by the numbers of the flows on their way
        self.number = 0

    def start(self, now: float, key: Hashable, load_l: np.ndarray, messages: float = 1.0) -> None:
        """An exchange of load_l bytes on each link starts; key: the caller's name for it, not in use; messages: on its
        busiest link, for so many of which it shares links (1: an exchange counts as one, however many it has)."""
        assert key not in self.moving, key
        self.advance(now)
        self.moving[key] = self._flow(load_l, messages)
        self._share()

    def _flow(self, load_l: np.ndarray, messages: float) -> _Moving:
        if max(len(self.known), len(self.rates)) > self.KEPT:
            self.known, self.rates = {}, {}
        found = self.known.get((id(load_l), messages))
        if found is None:
            size = float(load_l[np.argmax(load_l / self.bandwidth_l)]) / messages if load_l.any() else 0.0
            self.number += 1
            found = (load_l, _Moving(size, load_l / size if size else np.zeros(len(self.bandwidth_l)), self.number))
            self.known[id(load_l), messages] = found  # which keeps the load, so that no other has its id
        return replace(found[1])

    def next_end(self) -> tuple[float, Hashable] | None:
        """(time, key) of the exchange that ends first, the earliest started where several do; None where none is on its way."""
        ends = [(self.now + (m.left / m.rate if m.left else 0.0), i, key) for i, (key, m) in enumerate(self.moving.items())]
        return None if not ends else (min(ends)[0], min(ends)[2])

    def end(self, key: Hashable) -> None:
        """Takes the exchange that next_end() named off, at its time; the others share what it leaves."""
        due = self.next_end()
        assert due is not None and key == due[1], key
        self.advance(due[0])
        del self.moving[key]
        self._share()

    def advance(self, now: float) -> None:
        """Moves all exchanges on to `now`, which must not lie beyond next_end()."""
        assert now >= self.now, (now, self.now)
        for m in self.moving.values():
            m.left = max(m.left - m.rate * (now - self.now), 0.0) if m.left else 0.0
        self.now = now

    def _share(self) -> None:
        moving = list(self.moving.values())
        if not moving:
            return
        numbers = tuple(m.number for m in moving)
        if numbers not in self.rates:
            self.rates[numbers] = fair_rates(np.stack([m.weight_l for m in moving]), self.bandwidth_l).tolist()
        for m, rate in zip(moving, self.rates[numbers]):
            m.rate = rate


class Start(NamedTuple):
    """An exchange: when it starts, in s, its bytes on each link, and its messages (Wire.start)."""

    at_s: float
    load_l: np.ndarray
    messages: float = 1.0


def ends(starts: list[Start], bandwidth_l: np.ndarray) -> np.ndarray:
    """When each exchange ends, in s, where only links hold it up: [f]."""
    wire, end_f = Wire(bandwidth_l), np.zeros(len(starts))
    waiting = [(s.at_s, f) for f, s in enumerate(starts)]
    heapq.heapify(waiting)
    while waiting or wire.moving:
        due = wire.next_end()
        if due is not None and (not waiting or due[0] <= waiting[0][0]):
            end_f[due[1]] = due[0]
            wire.end(due[1])
        else:
            now, f = heapq.heappop(waiting)
            wire.start(now, f, np.asarray(starts[f].load_l, dtype=float), starts[f].messages)
    return end_f
