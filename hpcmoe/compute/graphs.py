"""CUDA graphs of launches that come again: recorded once per number of rows (rounded up), replayed with one launch."""

from __future__ import annotations

from typing import Callable

from hpcmoe.compute.gpu_step import bucket_of
from hpcmoe.device import Gpu, GpuLane

MOST_GRAPHS = 4096  # each takes tens of kilobytes


class Graphs:
    """on: whether graphs are used at all. made, replayed: how many."""

    def __init__(self, gpu: Gpu, on: bool):
        self.gpu, self.on = gpu, on
        self.made = self.replayed = 0
        self._graphs: dict = {}

    def rows(self, rows: int, most: int) -> int:
        """Rows that run() works on: those of the bucket, where graphs are used."""
        return (bucket_of(rows, most) if self.on else 0) or rows

    def run(self, lane: GpuLane, key: tuple, rows: int, most: int, func: Callable[[int, bool], None]) -> None:
        """Queues func(rows, exact): itself with rows and True; or a replay of func(bucket, False), where it must
        take the number of rows from device memory, and may work on more rows than there are (`most` at most).

        The first time a bucket comes it is called, so that kernels get compiled; the second time it is recorded.
        """
        bucket = bucket_of(rows, most) if self.on else 0
        if not bucket:
            func(rows, True)
            return
        key = (*key, bucket)
        graph = self._graphs.get(key)
        if graph is None and key in self._graphs and self.made < MOST_GRAPHS:
            graph = self._graphs[key] = lane.capture(lambda: func(bucket, False))
            self.made += 1
        if graph is None:
            self._graphs.setdefault(key, None)
            func(bucket, False)
            return
        self.replayed += 1
        graph.launch(lane.stream)
