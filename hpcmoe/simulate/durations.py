"""What an op takes of its rank's host and of its device, from a calibration: the kernels of compute/host.py and compute/gpu_leader.py.

On a CPU the host does everything. A GPU is given its kernels by the host, one launch each, or as a CUDA graph all of an op's at once
(steps without prompt chunks, ranks with one expert). What the host needs for any op besides is added in group.py.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from hpcmoe.cluster.kernels import Calibration
from hpcmoe.config import ModelConfig
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.simulate.workload import Rows

FP32 = 4


class Took(NamedTuple):
    """Seconds of the host and of its device (0 on a CPU)."""

    host_s: float = 0.0
    device_s: float = 0.0


class Durations:
    """model: as the largest tensor shard sees it; whole: all of it; gpu: where kernels are launched; graphs, fp8: as run.graphs and
    run.dispatch_dtype; drawn: the share of tokens that are drawn, not the likeliest ones (counts on a CPU).

    item: bytes of a number in products; row_bytes, back_bytes: of a row of dispatch and of combine. Every method is of one op of one
    micro-batch on one rank.
    """

    def __init__(self, calibration: Calibration, model: ModelConfig, whole: ModelConfig, gpu: bool, graphs: bool, fp8: bool, drawn: float = 0.0):
        self.calibration, self.model, self.whole, self.drawn = calibration, model, whole, drawn
        self.gpu, self.graphs, self.fp8 = gpu, graphs, fp8
        self.item = calibration.gemm.item_bytes
        self.moved = 2 if gpu else FP32  # bytes of a number that travels to experts and back
        self.row_bytes, self.back_bytes = fp8_width(whole.d) if fp8 else self.moved * whole.d, self.moved * whole.d
        self.alone = model is whole
        self._product = lru_cache(maxsize=None)(lambda m, n, k: float(calibration.gemm_s(m, n, k)))

    # ------------------------------------------------------------ parts
    def _took(self, seconds: float, launches: int, graph: bool = False, call: str = "", rows: int = 0) -> Took:
        """call, rows: on a CPU, whose own work comes on top, and of how many rows (CallsModel)."""
        if not self.gpu:
            return Took(seconds + (self._call_s(call, rows) if call else 0.0))
        return Took(self.calibration.graph_s if graph and self.graphs else launches * self.calibration.launch_s, seconds)

    def _call_s(self, call: str, rows: int) -> float:
        calls = self.calibration.calls
        return (getattr(calls, f"{call}_us") + getattr(calls, f"{call}_row_us") * rows) * 1e-6

    def _pass(self, nbytes: float) -> float:
        return float(self.calibration.elementwise_s(nbytes))

    def _norm(self, rows: int, add: bool = False) -> float:
        """A norm of fp32 rows for a product; add: the residual is added first, and written."""
        return self._pass(rows * self.whole.d * (FP32 + self.item + (FP32 + self.item if add else 0)))

    # ------------------------------------------------------------ a leader's rows
    def begin(self, rows: Rows) -> Took:
        """Embedded tokens, or rows that came in, become the step's."""
        return self._took(self._pass(rows.count * self.whole.d * (FP32 + self.item)), 1, call="begin", rows=rows.count) if rows.count else Took()

    def step(self, rows: Rows) -> Took:
        """Putting a step together, where requests are batched."""
        return Took() if self.gpu else Took(self._call_s("step", len(rows.count_q) + rows.singles))

    def attend(self, rows: Rows) -> Took:
        """Norm, query-key-value product, rotary positions, attention, output product; on a CPU the sum with the residual as well."""
        t, a, d = rows.count, self.model.attention, self.whole.d
        if not t or not a.heads:
            return Took()
        wide = (a.heads + 2 * a.kv_heads) * a.head_dim
        c, shape = self.calibration, (a.heads, a.kv_heads, a.head_dim)
        seconds = self._norm(t) + self._product(t, wide, d) + self._pass(2 * t * wide * self.item)
        keys = rows.keys if self.gpu else max(rows.keys, rows.padded)
        seconds += c.prefill_s(rows.start_q, rows.count_q, *shape) + float(c.decode_s(keys, rows.singles, *shape))
        if not self.gpu and rows.apart:
            seconds += self._pass(rows.apart * 4 * FP32 * a.kv_heads * a.head_dim)  # keys and values, read and written
        seconds += self._product(t, d, a.heads * a.head_dim)
        if not self.gpu and self.alone:
            seconds += self._pass(3 * FP32 * t * d)
        return self._took(seconds, 5, graph=not len(rows.count_q), call="attend", rows=t)

    def gate(self, rows: Rows) -> Took:
        """Norm, router product, choice of experts; on a GPU also the rows of all choices in the order of their experts."""
        t, r = rows.count, self.model.router
        if not t:
            return Took()
        seconds = self._norm(t, add=self.gpu) + self._product(t, r.experts, self.whole.d) + self._pass(FP32 * t * (r.experts + 2 * r.top_k))
        return self._took(seconds + self.gpu * self._permute(t), 5, graph=not len(rows.count_q), call="gate", rows=t)

    def _permute(self, t: int) -> float:
        k = self.model.router.top_k
        return self._pass(t * self.whole.d * self.item + t * k * self.row_bytes)

    def dispatch(self, rows: Rows) -> Took:
        """On a CPU, rows are put into the order of their experts when they leave."""
        return Took() if self.gpu or not rows.count else self._took(self._permute(rows.count), 0, call="dispatch", rows=rows.count)

    def merge(self, rows: Rows) -> Took:
        t, d = rows.count, self.whole.d
        return self._took(self._pass(t * d * (self.model.router.top_k * self.moved + 2 * FP32)), 1, call="merge", rows=t) if t else Took()

    def sample(self, rows: Rows, shards: int) -> Took:
        """Norm, head and choice of the rows whose next token is wanted; with tensor shards the first one chooses among all logits."""
        n, d = rows.wanted, self.whole.d
        if not n:
            return Took()
        seconds = self._norm(n) + self._product(n, self.model.vocab, d) + self._pass(n * FP32 * self.model.vocab)
        if not self.gpu and self.drawn:
            calls = self.calibration.calls
            seconds += calls.draw_us * 1e-6 + calls.draw_ns * 1e-9 * self.drawn * n * self.whole.vocab
        return self._took(seconds + self._pass(n * FP32 * self.whole.vocab), 3 + (shards > 1), call="sample", rows=n)

    def sums(self, rows: Rows, shards: int) -> Took:
        """A shard's part of a sum: its share of the rows from all shards read, and the totals added to the rows."""
        t, d = rows.count, self.whole.d
        if not t:
            return Took()
        return self._took(self._pass(t * d * self.moved * (1 + 1 / shards)) + self._pass(t * d * (self.moved + 2 * FP32)), 2)

    # ------------------------------------------------------------ experts
    def expert(self, rows_e: tuple[int, ...], tokens: int = 0) -> Took:
        """A rank's experts, each on its rows; of several the rows are put in order before and after.

        Of several experts rows_e are means, where each of `tokens` tokens chooses for itself: expert e then has rows in
        1 - (1 - rows_e / tokens)^tokens of all steps, and more of them in these. tokens = 0: so many rows.
        """
        n, x, d = sum(rows_e), self.model.expert, self.whole.d
        if not n:
            return Took()
        wide = (1 + x.gated) * x.f
        seconds = used = 0.0
        for rows in filter(None, rows_e):
            part = 1 - (1 - rows / tokens) ** tokens if len(rows_e) > 1 and rows < tokens else 1.0
            least = math.floor(rows / part)
            more = rows / part - least
            for m, weight in ((least, part * (1 - more)), (least + 1, part * more)):
                seconds += weight * (self._product(m, wide, d) + self._product(m, d, x.f)) if weight else 0.0
            used += part
        seconds += self._pass(n * (wide + x.f) * self.item)
        launches = 2 * round(used) + 1
        if self.fp8:
            seconds, launches = seconds + self._pass(n * (self.row_bytes + d * self.item)), launches + 1
        if len(rows_e) > 1:
            seconds, launches = seconds + 2 * self._pass(2 * n * d * self.moved), launches + 2
        if not self.gpu:
            seconds += self.calibration.calls.expert_one_us * 1e-6 * used
        return self._took(seconds, launches, graph=len(rows_e) == 1 and not self.fp8, call="expert", rows=n)
