"""Time on the device by events: warm-up, then medians of repetitions, over buffers that rotate.

One repetition runs every call of a ring of equal calls on different buffers, which together are
larger than the L2 cache, so that weights and rows come from memory. Where the device captures
graphs a repetition is one launch of a graph: without gaps while the host prepares the next kernel.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np

RING_BYTES = 512 << 20   # of one ring of buffers: several times any L2
RING_MOST = 16           # buffers in a ring at most
REPETITION_MS = 2.0      # one repetition lasts about so long, so that events resolve it well


class Deadline:
    """Time left of a section's budget."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left() <= 0.0


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one call: median, fastest and slowest repetition; how many there were; graph or stream."""

    ms: float
    least_ms: float
    most_ms: float
    repetitions: int
    how: str


def ring(nbytes: int, small: bool = False) -> int:
    """How many buffers of so many bytes make a ring."""
    if small:
        return 1
    return max(2, min(RING_MOST, math.ceil(RING_BYTES / max(1, nbytes))))


class Timer:
    """Times calls on one device. small: one repetition only, to try the program; graphs: as graphs."""

    def __init__(self, gpu, small: bool = False, graphs: bool = True):
        self.gpu, self.small, self.graphs = gpu, small, graphs
        self.lane = gpu.lane(products=True)

    def __call__(self, calls: Sequence[Callable[[], None]], seconds: float = 0.25) -> Timed:
        """Time of one of `calls`, which do equal work on different buffers; takes about so many seconds."""
        def run():
            for call in calls:
                call()

        self.gpu.event().record().wait()  # what made the buffers, on another stream
        with self.lane:
            run()  # compiles, allocates, picks algorithms
            self.gpu.event().record().wait()
            launch = self.lane.capture(run).launch if self.graphs else run
            once = self._span_ms(launch, 1)
            if self.small:
                return Timed(once / len(calls), once / len(calls), once / len(calls), 1, "graph" if self.graphs else "stream")
            inner = max(1, min(1000, math.ceil(REPETITION_MS / max(once, 1e-3))))
            count = int(np.clip(1e3 * seconds / max(once * inner, 1e-3), 7, 50))
            self._span_ms(launch, inner)
            spans = sorted(self._span_ms(launch, inner) / (inner * len(calls)) for _ in range(count))
        return Timed(float(np.median(spans)), spans[0], spans[-1], count, "graph" if self.graphs else "stream")

    def _span_ms(self, launch, times: int) -> float:
        """Between events around so many launches."""
        begin, end = self.gpu.event(timing=True), self.gpu.event(timing=True)
        begin.record()
        for _ in range(times):
            launch()
        end.record()
        end.wait()
        return 1e3 * self.gpu.elapsed_s(begin, end)


def copy_gb_per_s(timer: Timer, nbytes: int) -> float:
    """Rate of a device-to-device copy, bytes read plus bytes written, between buffers of so many bytes."""
    gpu = timer.gpu
    pairs = [(gpu.empty((nbytes,), np.uint8), gpu.empty((nbytes,), np.uint8)) for _ in range(2)]
    for source, _ in pairs:
        source[...] = 0x5A
    timed = timer([lambda a=a, b=b: gpu.copy(b, a) for a, b in pairs])
    return 2e-6 * nbytes / timed.ms
