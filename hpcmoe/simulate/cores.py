"""Cores that several ranks of a node share: what a rank does takes longer while more of them are busy than there are cores.

A node carries `together` seconds of work in a second, a rank at most one; those who are busy get equal parts (processor sharing, which
is max-min fair where nobody can use more than one core; Kleinrock, Queueing Systems 2, 1976, 4.4). What is left of each job is kept in the time that an
equal share has given since the start, so that a change of the share touches no job.
"""

from __future__ import annotations

import heapq
from typing import Hashable, NamedTuple

from hpcmoe.parallel.polling import LATE_S, PAUSE_S


class Machine(NamedTuple):
    """The cores of a node. ranks: that share them; cores: how many; together: seconds of work that they carry in a second; look_s: of a
    core, each time that a waiting rank looks whether it can go on, pause_s: of a pause and the look after it."""

    ranks: int
    cores: int
    together: float
    look_s: float = 0.0
    pause_s: float = 0.0

    @property
    def crowded(self) -> bool:
        return self.ranks > self.cores

    def share(self, busy: int) -> float:
        """Of a core, for each of so many busy ranks."""
        asleep = self.pause_s / (self.pause_s + PAUSE_S + LATE_S) * (self.ranks - busy) * self.crowded
        return min(1.0, self.together / (busy + asleep))


class Cores:
    """Jobs on the cores of nodes as time goes by. start() puts one on, next_end() says which ends next, end() takes it off, drop() one that is not
    done; times never go back."""

    def __init__(self, machines: list[Machine]):
        self.machines = machines
        self.now = [0.0] * len(machines)
        self.given = [0.0] * len(machines)  # seconds that a job has got which was there from the start
        self.jobs: list[list[tuple[float, int, Hashable]]] = [[] for _ in machines]
        self.number = 0

    def _advance(self, node: int, now: float) -> None:
        if self.jobs[node]:
            self.given[node] += self.machines[node].share(len(self.jobs[node])) * (now - self.now[node])
        self.now[node] = now

    def start(self, now: float, node: int, seconds: float, key: Hashable) -> None:
        """A job of so many seconds on a core of its own."""
        self._advance(node, now)
        self.number += 1
        heapq.heappush(self.jobs[node], (self.given[node] + seconds, self.number, key))

    def next_end(self) -> tuple[float, int] | None:
        """(time, node) of the job that ends first if nothing else starts; None where there is none."""
        ends = [(self.now[node] + max(0.0, jobs[0][0] - self.given[node]) / self.machines[node].share(len(jobs)), node)
                for node, jobs in enumerate(self.jobs) if jobs]
        return min(ends, default=None)

    def end(self, now: float, node: int) -> Hashable:
        """Takes the job off that next_end() named; its key."""
        self._advance(node, now)
        return heapq.heappop(self.jobs[node])[2]

    def drop(self, now: float, node: int, key: Hashable) -> None:
        """Takes a job off that need not be done any more."""
        self._advance(node, now)
        self.jobs[node] = [job for job in self.jobs[node] if job[2] is not key]
        heapq.heapify(self.jobs[node])
