"""The GPU's way: kernels, cuBLAS, and graphs of what is launched again and again.

Weights, rows and cache are 16-bit, sums and the residual stream fp32. All memory is taken before the
run: nothing can run out in its middle.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.base import Compute, Pending, Sizes
from hpcmoe.compute.gpu_experts import Experts
from hpcmoe.compute.gpu_leader import Leader
from hpcmoe.compute.gpu_relay import GpuRelay
from hpcmoe.compute.gpu_weights import GpuHoldings, Loader
from hpcmoe.compute.graphs import Graphs
from hpcmoe.compute.holdings import Share
from hpcmoe.compute.relay import Chosen, Relay, Terms
from hpcmoe.compute.room import fit_pages
from hpcmoe.compute.step import Batch, Choices
from hpcmoe.compute.warm import warm_up
from hpcmoe.config import ModelConfig, RunJob, WeightsJob
from hpcmoe.device import Gpu
from hpcmoe.errors import UserError
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.kernels.loader import Kernels, names
from hpcmoe.kernels.router import MOST_EXPERTS, MOST_K
from hpcmoe.model.route import together

EXPERT_FILES = ["merge.cu", "permute.cu", "rows.cu", "swiglu.cu"]  # what ranks that do not lead use


class GpuMachine:
    """One GPU as a machine for a rank's share: loads weights, says what fits, computes.

    words: which GPU, and why this one; sharing: ranks that drive it.
    """

    def __init__(self, index: int, weights: WeightsJob, words: str, sharing: int):
        self.device = Gpu(index)
        self.weights, self.words, self.sharing = weights, words, sharing
        self.dtype, self.threads = weights.dtype, 1

    @property
    def library(self) -> tuple[str, str]:
        """What makes products: name and version."""
        return "cublas", f"CUDA {self.device.runtime.runtimeGetVersion() // 1000}, CuPy {self.device.cupy.__version__}"

    def prepare(self, stored: str, model: ModelConfig, leads: bool) -> None:
        """Chooses the 16-bit type (stored: the file's) and compiles the kernels, or finds them on disk. Raises UserError."""
        if self.dtype == "auto":
            self.dtype = stored if stored in ("fp16", "bf16") else "bf16"
        check_model(model)
        self.kernels = Kernels(self.dtype, self.device.module, self.device.sms)
        self.kernels.compile(names() if leads else EXPERT_FILES)

    def load(self, file, model: ModelConfig, share: Share, context: int) -> GpuHoldings:
        """This rank's weights. Raises UserError."""
        self.device.settle()  # the self-test has had large buffers
        held = Loader(self.device, file, model, self.dtype).load(share, context)
        self.device.settle()  # lanes do not wait for the stream of the uploads
        return held

    def room(self) -> int:
        """Bytes of the GPU that are free for this rank."""
        return self.device.memory()[0] // self.sharing

    def compute(self, model, held, sizes: Sizes, share: Share, choices, run: RunJob) -> "GpuCompute":
        return GpuCompute(self, model, held, sizes, share, choices, run)

    def fit(self, wanted: Sizes, model: ModelConfig, layers: int, run: RunJob, ranks: int, leaders: int, where: str) -> Sizes:
        """`wanted` with the pages of the KV cache that fit beside the buffers (see fit_pages)."""
        self.device.settle()
        free, total = self.device.memory()
        free = int(free - (1 - run.gpu_memory_fraction) * total) // self.sharing
        return fit_pages(model, layers, wanted, run, max(0, free), leaders, f"{where}, {self.device.name}")


def check_model(model: ModelConfig) -> None:
    """UserError where the kernels do not cover a model."""
    a, x, r = model.attention, model.expert, model.router
    if not a.heads:
        raise UserError("layout.tp: expected at most as many shards as attention heads on a GPU; run.device = cpu takes any")
    if r.experts > MOST_EXPERTS or r.top_k > MOST_K:
        raise UserError(f"router: {r.experts} experts, {r.top_k} per token: a GPU takes at most {MOST_EXPERTS} and {MOST_K}; "
                        "run.device = cpu takes any")
    if a.head_dim % 16 or not 16 <= a.head_dim <= 256:
        raise UserError(f"attention.head_dim = {a.head_dim}: expected a multiple of 16 up to 256 on a GPU; run.device = cpu takes any")
    if not x.gated or x.bias or x.shared:
        raise UserError("experts that are not gated, have biases or are shared: not on a GPU in this version")


class GpuCompute(Compute):
    """model: as this rank's tensor shard sees it; choices: of all requests, None on ranks that do not lead. Raises UserError
    where the buffers do not fit."""

    def __init__(self, machine: GpuMachine, model: ModelConfig, held: GpuHoldings, sizes: Sizes, share: Share,
                 choices: Choices | None, run: RunJob):
        self.device = gpu = machine.device
        self.kernels, self.model, self.held, self.sizes = machine.kernels, model, held, sizes
        self.layers, self.slots, self.fp8 = share.layers, share.slots, run.dispatch_dtype == "fp8"
        self.t_dtype = self.kernels.t_dtype
        self.lanes = [gpu.lane(products=True) for _ in range(sizes.lanes)]
        self.send_width, self.back_width = fp8_width(model.d) if self.fp8 else 2 * model.d, 2 * model.d
        self.graphs = Graphs(gpu, run.graphs)
        self.experts = Experts(gpu, self.kernels, self.graphs, model, held, sizes, share.slots, self.fp8)
        self.leader, self.parcel_bytes = None, 0
        if choices is not None:
            tells = run.routing_statistics or sizes.relay is not None
            self.leader = Leader(gpu, self.kernels, self.graphs, model, held, sizes, choices, self.fp8, share, tells)
        self.pairs = {}
        if run.routing_statistics and self.leader and share.shard.number == 0:
            self.pairs = {layer: np.zeros((model.router.experts,) * 2, dtype=np.int64) for layer in share.layers}
        self.relays = [self._open_relay(lane) for lane in range(sizes.lanes)] if sizes.relay else []
        warm_up(self)

    def _open_relay(self, lane: int) -> GpuRelay:
        """With the rows of the lane's leader, or with room for parcels alone."""
        gpu, relay, d = self.device, self.sizes.relay, self.model.d
        if self.leader:
            x = self.leader.buffers[lane].x_sd
        else:
            x = gpu.empty((relay.parcels, self.send_width), np.uint8) if self.fp8 else gpu.empty((relay.parcels, d), self.t_dtype)
            self.parcel_bytes += x.nbytes
        return GpuRelay(gpu, self.kernels, relay, x, d, self.sizes.rows if self.leader else 0, self.model.router.top_k)

    @property
    def nbytes(self) -> int:
        parts = [*self.experts.benches, *self.relays, *([self.leader] if self.leader else [])]
        return self.parcel_bytes + sum(part.nbytes for part in parts)

    def launched(self) -> dict[str, int]:
        return {"kernels": self.kernels.launches, "products": self.device.gemms, "graph_replays": self.graphs.replayed}

    @property
    def kv_nbytes(self) -> int:
        return self.leader.cache.nbytes if self.leader else 0

    def open_cache(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.leader.open_cache(sizes, self.layers)

    # ------------------------------------------------------------ a leader's rows
    def begin(self, m: int, batch: Batch, token_t) -> None:
        self.leader.begin(m, batch, token_t)

    def rows_in(self, m: int):
        return self.leader.rows_in(m)

    def rows_out(self, m: int):
        return self.leader.rows_out(m)

    def attend(self, m: int, layer: int) -> None:
        self.leader.attend(m, layer)

    def gate(self, m: int, layer: int) -> Pending:
        pending = self.leader.gate(m, layer)
        if not self.pairs:
            return pending

        def read() -> tuple:
            self.pairs[layer] += together(self.leader.experts(m), self.model.router.experts)
            return pending.read()

        return pending._replace(read=read)

    def seat(self, layer: int, expert_s) -> None:
        if self.leader:
            self.leader.seat(layer, expert_s)

    def outgoing(self, m: int):
        return self.leader.outgoing(m)

    def merge(self, m: int, y_sd) -> None:
        self.leader.merge(m, y_sd)

    def next_tokens(self, m: int) -> Pending:
        return self.leader.next_tokens(m)

    # ------------------------------------------------------------ rows by way of forwarders
    def relay(self, m: int) -> Relay:
        return self.relays[m % len(self.relays)]

    def chosen(self, m: int) -> Chosen:
        return self.leader.chosen(m)

    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        self.leader.merge_terms(m, terms)

    # ------------------------------------------------------------ tensor shards
    def part(self, m: int, what: str):
        return self.leader.part(m, what)

    def parts(self, m: int, count: int):
        return self.leader.shard.of(m).parts[:count]

    def sum_parts(self, m: int, parts, shards: int):
        return self.leader.shard.sum_parts(m, parts, len(parts) // shards)

    def total(self, m: int, what: str):
        return self.leader.total(m, what)

    def add_total(self, m: int, what: str) -> None:
        self.leader.add_total(m, what)

    def wanted(self, m: int) -> list[slice]:
        return self.leader.want(m)

    def logits(self, m: int, part: slice):
        return self.leader.logits(m, part)

    def logits_room(self, m: int, shard: int, rows: int, vocab: int):
        return self.leader.shard.room(m, shard, rows)

    def draw(self, m: int, part: slice, blocks: list) -> None:
        self.leader.draw(m, part, blocks)

    def drawn(self, m: int) -> Pending:
        return self.leader.drawn(m)

    # ------------------------------------------------------------ experts
    def incoming(self, m: int, count: int):
        return self.experts.incoming(m, count)

    def returning(self, m: int, count: int):
        return self.leader.returning(m, count) if self.leader else self.experts.bench(m).y_id[:0]

    def expert(self, m: int, layer: int, x_id, n_recv_re: np.ndarray):
        return self.experts(m, layer, x_id, n_recv_re, self.leader)
