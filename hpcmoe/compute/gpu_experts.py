"""A rank's experts on its GPU: rows sorted by expert, products on one stream or two, a graph where there is one expert."""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.gpu_weights import GpuHoldings
from hpcmoe.compute.graphs import Graphs
from hpcmoe.config import ModelConfig
from hpcmoe.device import Gpu
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.permute import unpack_fp8
from hpcmoe.kernels.rows import gather_rows, scatter_rows
from hpcmoe.kernels.swiglu import swiglu
from hpcmoe.model.route import by_expert

HIDDEN_ROWS = 2048  # rows whose hidden values [rows, 2 f] are held at once
SIDE_ROWS = 128     # per expert, up to which two streams are faster than one: docs/measurements/README.md


class Bench:
    """Buffers of one lane for its experts' rows."""

    def __init__(self, gpu: Gpu, model: ModelConfig, sizes: Sizes, t_dtype, fp8: bool, several: bool):
        d, f, rows = model.d, model.expert.f, max(1, sizes.received)
        hidden = min(rows, HIDDEN_ROWS)
        self.x_id, self.y_id = gpu.empty((rows, d), t_dtype), gpu.empty((rows, d), t_dtype)
        self.x_iw = gpu.empty((rows, fp8_width(d)), np.uint8) if fp8 else None
        self.both_if, self.h_if = gpu.empty((hidden, 2 * f), t_dtype), gpu.empty((hidden, f), t_dtype)
        self.sorted_x = self.sorted_y = self.order = self.order_host = None
        if several:
            self.sorted_x, self.sorted_y = gpu.empty((rows, d), t_dtype), gpu.empty((rows, d), t_dtype)
            self.order, self.order_host = gpu.empty(rows, np.int32), gpu.pinned(rows, np.int32)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in vars(self).values() if a is not None and not isinstance(a, np.ndarray))


class Experts:
    """slots: this rank's, in order. Raises UserError where the buffers do not fit.

    side: a second stream, where there are several experts and one lane: two lanes are two streams by themselves.
    """

    def __init__(self, gpu: Gpu, kernels: Kernels, graphs: Graphs, model: ModelConfig, held: GpuHoldings, sizes: Sizes, slots: list[int],
                 fp8: bool):
        self.gpu, self.kernels, self.graphs, self.model, self.held = gpu, kernels, graphs, model, held
        self.slots, self.fp8 = slots, fp8
        several = len(slots) > 1
        self.benches = [Bench(gpu, model, sizes, kernels.t_dtype, fp8, several) for _ in range(sizes.lanes)]
        self.side = gpu.lane(products=True) if several and sizes.lanes == 1 else None

    def bench(self, m: int) -> Bench:
        return self.benches[m % len(self.benches)]

    def incoming(self, m: int, count: int):
        """Where so many rows of micro-batch m come in."""
        bench = self.bench(m)
        return (bench.x_iw if self.fp8 else bench.x_id)[:count]

    def __call__(self, m: int, layer: int, x_id, n_recv_re: np.ndarray, leader):
        """What the experts make of the rows that came to micro-batch m, in the order in which they came. leader: this rank's Leader or
        None: rows that did not travel stand in its buffer."""
        bench, n = self.bench(m), len(x_id)
        if not n:
            return bench.y_id[:0]
        if self.fp8:
            unpack_fp8(self.kernels, x_id, bench.x_id[:n])
            x_id = bench.x_id[:n]
        order = by_expert(n_recv_re)
        if order is None:
            self._products(m, layer, x_id, bench.y_id, n_recv_re.sum(axis=0), leader)
            return bench.y_id[:n]
        bench.order_host[:n] = order
        self.gpu.copy(bench.order[:n], bench.order_host[:n])
        gather_rows(self.kernels, x_id, bench.order[:n], bench.sorted_x[:n])
        self._products(m, layer, bench.sorted_x[:n], bench.sorted_y, n_recv_re.sum(axis=0), leader)
        scatter_rows(self.kernels, bench.sorted_y[:n], bench.order[:n], bench.y_id)
        return bench.y_id[:n]

    def _products(self, m: int, layer: int, x_id, y_id, n_e: np.ndarray, leader) -> None:
        """Each expert on its rows, which stand in the experts' order; graphs where there is one expert."""
        bench, n = self.bench(m), len(x_id)
        if len(self.slots) == 1 and not self.fp8:
            whole = bench.x_id if x_id.data.ptr == bench.x_id.data.ptr else leader.sent(m)
            most = min(len(whole), len(y_id), len(bench.both_if))

            def products(rows: int, exact: bool) -> None:
                self._few(bench, layer, whole[:rows], y_id[:rows], [(self.slots[0], rows)])

            if n <= most:
                weights = self.held.experts[layer, self.slots[0]].both.data.ptr  # other ones may take the seat
                self.graphs.run(self.gpu.current, ("EXPERT", layer, whole.data.ptr, weights), n, most, products)
                return
        self._in_parts(bench, layer, x_id, y_id, n_e)

    def _in_parts(self, bench: Bench, layer: int, x_id, y_id, n_e) -> None:
        """Runs of experts' rows, none with more than the hidden values that there is room for."""
        room, part, first, end = len(bench.both_if), [], 0, 0
        for e, n in zip(self.slots, (int(n) for n in n_e)):
            while n:
                take = min(n, room - (end - first))
                if take:
                    part.append((e, take))
                    n, end = n - take, end + take
                if n:
                    self._few(bench, layer, x_id[first:end], y_id[first:end], part)
                    part, first = [], end
        if part:
            self._few(bench, layer, x_id[first:end], y_id[first:end], part)

    def _few(self, bench: Bench, layer: int, x_id, y_id, part: list[tuple[int, int]]) -> None:
        """Products of experts and numbers of rows, on one stream or two."""
        places, first = [], 0
        for e, n in part:
            places.append((self.held.experts[layer, e], slice(first, first + n)))
            first += n
        if self.side is None or len(places) < 2 or first > SIDE_ROWS * len(places):
            self._queue(bench, x_id, y_id, places)
            return
        half, here = len(places) // 2, self.gpu.current
        self.side.after(self.gpu.event().record())
        with self.side:
            self._queue(bench, x_id, y_id, places[half:])
            end = self.gpu.event().record()
        self._queue(bench, x_id, y_id, places[:half])
        here.after(end)

    def _queue(self, bench: Bench, x_id, y_id, places: list) -> None:
        """Neighbouring experts on the current lane; one activation for all of them."""
        gemm, rows = self.gpu.gemm, slice(places[0][1].start, places[-1][1].stop)
        for expert, part in places:
            gemm(x_id[part], expert.both, bench.both_if[part])
        swiglu(self.kernels, bench.both_if[rows], bench.h_if[rows], act=self.model.expert.activation)
        for expert, part in places:
            gemm(bench.h_if[part], expert.down, y_id[part])
