"""How long a device worked for each op, from events: the host only queues."""

from __future__ import annotations

from typing import Callable

from hpcmoe.device import Device
from hpcmoe.parallel.ops import Op
from hpcmoe.report.record import RankRecord, Span


class Timer:
    """Marks begin and end of each op on its lane; `collect` turns finished marks into seconds (and spans)."""

    def __init__(self, device: Device, record: RankRecord, clock: Callable[[], float], trace: bool):
        self.device, self.record, self.trace = device, record, trace
        self.open: list = []
        self.free: list = []
        self.zero, self.zero_s = None, 0.0
        if device.kind != "cpu":
            self.zero = device.event(timing=True).record()
            self.zero.wait()
            self.zero_s = clock()

    def __call__(self, op: Op, step: int, func: Callable):
        """func(op), between two marks; an op that queues nothing takes no time."""
        if self.zero is None:
            return func(op)
        start = self._event().record()
        result = func(op)
        self.open.append((op, step, start, self._event().record()))
        return result

    def _event(self):
        return self.free.pop() if self.free else self.device.event(timing=True)

    def collect(self) -> None:
        """Books the ops that are finished on the device."""
        while self.open and self.open[0][3].done:
            op, step, start, end = self.open.pop(0)
            seconds = self.device.elapsed_s(start, end)
            self.record.device_s[op.kind] = self.record.device_s.get(op.kind, 0.0) + seconds
            if self.trace:
                begin = self.zero_s + self.device.elapsed_s(self.zero, start)
                self.record.spans.append(Span(op.kind, op.layer, op.micro, step, begin, begin + seconds, False, True))
            self.free += [start, end]
