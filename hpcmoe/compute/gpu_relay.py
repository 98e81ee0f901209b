"""Rows by way of forwarders on a GPU: one kernel each to gather parcels, to gather what is handed on, and to add.

A node's sum is made in fp32 and travels in 16 bits, as experts' rows and the sums of tensor shards do: it is rounded once
more than in a flat exchange, and half as many bytes cross.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.base import RelaySizes
from hpcmoe.compute.relay import Chosen, Relay, Terms, Way
from hpcmoe.device import Gpu, address
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.merge import sum_rows
from hpcmoe.kernels.rows import gather_rows


class GpuRelay(Relay):
    """Takes all its memory at once. x: rows in which Chosen.x stands first, with room for the parcels behind it (on ranks
    that do not lead for parcels alone); d: width of a row that comes back; most: tokens of a step; k: choices."""

    def __init__(self, gpu: Gpu, kernels: Kernels, sizes: RelaySizes, x, d: int, most: int, k: int):
        self.gpu, self.kernels, self.x = gpu, kernels, x
        self.out = gpu.empty((max(sizes.handed, sizes.leaving), *x.shape[1:]), x.dtype)  # parcels are gone when rows are handed on
        self.y = gpu.empty((sizes.handed + sizes.leaving, d), kernels.t_dtype)  # rows that came back, behind them sums
        self.sums = gpu.empty((sizes.parcels, d), kernels.t_dtype)
        numbers = sizes.leaving + sizes.handed + 2 * (sizes.parcels + most) * k
        self.host, self.index = gpu.pinned(numbers, np.int32), gpu.empty(numbers, np.int32)
        self.own = self.parcels = 0

    @property
    def nbytes(self) -> int:
        """Without x."""
        return self.out.nbytes + self.y.nbytes + self.sums.nbytes + self.index.nbytes

    def begin(self, own: Chosen | None, way: Way) -> None:
        """All numbers go to the device with one copy. What the last layer's copy read is free: its rows have left since."""
        if own is not None and len(own.x) and address(own.x) != address(self.x):
            raise ValueError("Chosen.x does not stand before the room for parcels")
        self.own, self.parcels = len(own.x) if own is not None else 0, len(way.slot_jk)
        ends = np.cumsum([part.size for part in way])
        found = []
        for part, end in zip(way, ends):
            place, kind = slice(int(end) - part.size, int(end)), np.float32 if part.dtype == np.float32 else np.int32
            self.host[place].view(kind)[:] = part.reshape(-1)
            found.append(self.index[place].view(kind).reshape(part.shape))
        self.gpu.copy(self.index[:int(ends[-1])], self.host[:int(ends[-1])])
        self.way = Way(*found)

    def parcels_out(self):
        return self._gather(self.way.row_u)

    def parcels_in(self):
        return self.x[self.own:self.own + self.parcels]

    def hand_on(self, part: slice, out=None):
        if out is not None:
            raise ValueError("rows of a GPU are not written into host memory")
        return self._gather(self.way.row_s[part])

    def _gather(self, row_n):
        out = self.out[:len(row_n)]
        gather_rows(self.kernels, self.x, row_n, out)
        return out

    def handed(self, count: int):
        return self.y[:count]

    def sums_out(self, y_sd):
        out = self.sums[:self.parcels]
        sum_rows(self.kernels, out, y_sd, self.way.weight_jk, self.way.slot_jk)
        return out

    def sums_in(self):
        handed = len(self.way.row_s)
        return self.y[handed:handed + len(self.way.row_u)]

    def terms(self, y_sd) -> list[Terms]:
        return [Terms(self.y, self.way.weight_tk, self.way.slot_tk)]
