"""Made-up rows for a trial of exchanges: on the CPU, or in a GPU's memory."""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.base import Pending, RelaySizes
from hpcmoe.compute.gpu_relay import GpuRelay
from hpcmoe.compute.relay import Chosen, HostRelay, Relay, Scratch, Terms
from hpcmoe.config import RouterConfig
from hpcmoe.device import Device, Event, Gpu, to_host
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.merge import merge as merge_rows
from hpcmoe.model.route import add_chosen, merge, route

FILES = ["merge.cu", "rows.cu"]


class MadeUpRows:
    """What exchanges ask of a Compute, on random rows and choices. An expert e multiplies the first value of
    a row by e + 1 and fills the answer with it, so that every row that goes astray is seen.

    rows: of this rank, None on ranks that do not lead; experts: the numbers of those here; checking: whether answers
    are wanted that `right` can judge.
    """

    RTOL = 1e-4

    def __init__(self, router: RouterConfig, d: int, send_width: int, rows: int | None, experts: list[int], seed: int):
        self.device = Device()
        self.lanes, self.send_width, self.back_width, self.d = [self.device.lane()], send_width, 4 * d, d
        self.experts, self.rng, self.checking = np.array(experts), np.random.default_rng(seed), True
        self.scratch, self.routed = Scratch(), None
        self.handing: Relay = HostRelay(self.scratch, send_width, d)
        if rows is not None:
            self.expert_tk = np.argsort(self.rng.random((rows, router.experts)), axis=1)[:, :router.top_k]
            self.weight_tk = self.rng.random((rows, router.top_k), dtype=np.float32)
            self.route = route(self.expert_tk, router.experts)
            self.value_t = self.rng.random(rows, dtype=np.float32).astype(np.float16).astype(np.float32) + 1
            self.row_tw = self._rows(np.float32)
            self.x_td = np.zeros((rows, d), dtype=np.float32)
            n_send_e = self.route.n_send_e  # no cycle: a GPU's memory is free again when the trial is over
            self.routed = Pending(Event(), lambda: (n_send_e,))

    def _rows(self, dtype) -> np.ndarray:
        """Each row its value, again and again: uint8 [t, send width]."""
        item = np.dtype(dtype).itemsize
        values_tw = np.repeat(self.value_t.astype(dtype)[:, None], -(-self.send_width // item), axis=1)
        return values_tw.view(np.uint8)[:, :self.send_width].copy()

    def relay(self, m: int) -> Relay:
        return self.handing

    def chosen(self, m: int) -> Chosen:
        return Chosen(self.expert_tk, self.weight_tk, self.row_tw, np.arange(len(self.row_tw)))

    def outgoing(self, m: int):
        return np.take(self.row_tw, self.route.token_s, axis=0,
                       out=self.scratch.rows("out", len(self.route.token_s), self.send_width, np.uint8), mode="clip")

    def incoming(self, m: int, count: int):
        return self.scratch.rows("in", count, self.send_width, np.uint8)

    def expert(self, x_iw, n_recv_re: np.ndarray):
        """Answers, fp32 [i, d], to rows that stand by sender and, within one, by expert."""
        y_id = self.scratch.rows("answers", len(x_iw), self.d)
        y_id[:] = self._answers(x_iw, n_recv_re, np.float32)
        return y_id

    def _answers(self, x_iw: np.ndarray, n_recv_re: np.ndarray, dtype) -> np.ndarray:
        """The value of each answer, [i, 1]."""
        factor_i = np.repeat(np.tile(self.experts + 1, len(n_recv_re)), n_recv_re.reshape(-1))
        value_i = x_iw[:, :np.dtype(dtype).itemsize].copy().view(dtype)[:, 0]
        return (value_i * factor_i)[:, None]

    def returning(self, m: int, count: int):
        return self.scratch.rows("back", count, self.d)

    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        for term in terms:
            add_chosen(self.x_td, *term)

    def merge(self, m: int, y_sd) -> None:
        merge(self.x_td, y_sd, self.weight_tk, self.route.slot_tk)

    @property
    def right(self) -> bool:
        """After one layer from zeros: whether every row of x is what its experts make of it."""
        if self.routed is None:
            return True
        expected_t = (self.weight_tk * (self.expert_tk + 1)).sum(axis=1) * self.value_t
        return bool(np.allclose(to_host(self.x_td), expected_t[:, None], rtol=self.RTOL))


class GpuMadeUpRows(MadeUpRows):
    """The same in a GPU's memory, rows and answers as fp16. Answers are made on the host, where they are checked.

    sizes: of this rank's relay; received: most rows that this rank gets.
    """

    RTOL = 3e-3

    def __init__(self, gpu: Gpu, sizes: RelaySizes, received: int, *facts):
        super().__init__(*facts)
        router, d, width, rows = facts[:4]
        self.device, self.lanes, self.back_width = gpu, [gpu.lane()], 2 * d
        self.kernels = Kernels("fp16", gpu.module, gpu.sms)
        pairs = 0 if rows is None else rows * router.top_k
        self.x_sw = gpu.empty((pairs + sizes.parcels, width), np.uint8)
        self.x_iw, self.y_id = gpu.empty((received, width), np.uint8), gpu.empty((received, d), np.float16)
        self.y_sd, self.answers = gpu.empty((pairs, d), np.float16), gpu.pinned((received, d), np.float16)
        gpu.zero(self.y_id)
        self.handing = GpuRelay(gpu, self.kernels, sizes, self.x_sw, d, rows or 0, router.top_k)
        if pairs:
            self.x_sw[:pairs].set(np.ascontiguousarray(self._rows(np.float16)[self.route.token_s]))
        if rows is not None:
            self.x_td = gpu.empty((rows, d), np.float32)
            self.on_device = gpu.upload(self.weight_tk), gpu.upload(self.route.slot_tk.astype(np.int32))
        gpu.event().record().wait()

    def compile(self) -> None:
        """Compiles the kernels, or finds them on disk. Raises UserError."""
        self.kernels.compile(FILES)

    def chosen(self, m: int) -> Chosen:
        return Chosen(self.expert_tk, self.weight_tk, self.outgoing(m), self.route.slot_tk[:, 0])

    def outgoing(self, m: int):
        return self.x_sw[:self.route.slot_tk.size]

    def incoming(self, m: int, count: int):
        return self.x_iw[:count]

    def expert(self, x_iw, n_recv_re: np.ndarray):
        """Answers, fp16 [i, d]: made where they are checked, else those of some time before."""
        n = len(x_iw)
        if self.checking and n:
            self.answers[:n] = self._answers(to_host(x_iw), n_recv_re, np.float16)
            self.device.copy(self.y_id[:n], self.answers[:n])
        return self.y_id[:n]

    def returning(self, m: int, count: int):
        return self.y_sd[:count]

    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        for term in terms:
            merge_rows(self.kernels, self.x_td, *term, some=True)

    def merge(self, m: int, y_sd) -> None:
        merge_rows(self.kernels, self.x_td, y_sd, *self.on_device)


def row_width(d: int, fp8: bool, device: Device) -> int:
    """Bytes of a row of dispatch."""
    return fp8_width(d) if fp8 else d * (4 if device.in_host_memory else 2)
