"""The CPU's way: NumPy, and products by the backend that was chosen."""

from __future__ import annotations

import numpy as np

from hpcmoe import linear, memory
from hpcmoe.compute import holdings
from hpcmoe.compute.base import Compute, Pending, Sizes
from hpcmoe.compute.holdings import Holdings
from hpcmoe.compute.next_tokens import NextTokens
from hpcmoe.compute.relay import Chosen, HostRelay, Relay, Scratch, Terms
from hpcmoe.compute.room import fit_slots
from hpcmoe.compute.step import Batch, Choices
from hpcmoe.config import ModelConfig, RunJob, WeightsJob
from hpcmoe.device import Device
from hpcmoe.kernels.e4m3 import fp8_pack, fp8_unpack, fp8_width
from hpcmoe.model.capacity import Capacity, route_kept
from hpcmoe.model.copies import Copies
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.kvcache import KVCache
from hpcmoe.model.router import gate
from hpcmoe.model.route import Route, add_chosen, by_expert, merge, route, together


def send_width(d: int, fp8: bool) -> int:
    """Bytes of a row on its way to an expert."""
    return fp8_width(d) if fp8 else 4 * d


class Host:
    """The CPU as a machine for a rank's share: loads weights, says what fits, computes."""

    def __init__(self, weights: WeightsJob):
        memory.keep_freed()
        self.device, self.backend = Device(), linear.choose(weights.backend, weights.dtype)
        self.dtype, self.threads, self.words = self.backend.dtype, self.backend.threads, "CPU"

    @property
    def library(self) -> tuple[str, str]:
        """What makes products: name and version."""
        return self.backend.name, self.backend.version

    def prepare(self, stored: str, model: ModelConfig, leads: bool) -> None:
        """Nothing: the libraries are compiled."""

    def load(self, file, model: ModelConfig, share: holdings.Share, context: int) -> Holdings:
        """This rank's weights. Raises UserError as the file does."""
        return holdings.load(file, model, self.backend, share, context)

    def room(self) -> int:
        """Bytes for tests of large buffers: a CPU's MPI needs none."""
        return 0

    def compute(self, model, held, sizes, share, choices, run: RunJob) -> "HostCompute":
        made = HostCompute(model, held, sizes, share, choices, run.dispatch_dtype == "fp8")
        if run.routing_statistics and choices is not None and share.shard.number == 0:
            made.pairs = {layer: np.zeros((model.router.experts,) * 2, dtype=np.int64) for layer in share.layers}
        if run.capacity_factor and choices is not None:
            made.capacity = Capacity(run, model.router, share.layers)
        return made

    def fit(self, wanted: Sizes, model: ModelConfig, layers: int, run: RunJob, ranks: int, leaders: int, where: str) -> Sizes:
        """`wanted` with the slots whose keys and values fit beside `ranks` of this node (see fit_slots)."""
        if not layers:
            return wanted
        free = memory.available() // ranks
        return wanted._replace(slots=fit_slots(model, layers, wanted, run, free, leaders, where))


class Micro:
    """One micro-batch of a leader, as far as it has come."""

    batch: Batch
    route: Route
    rows_in: np.ndarray | None = None
    x_td = normed_td = copy_tk = weight_tk = part_td = total_td = None


class HostCompute(Compute):
    """model: as this rank's shard sees it; choices: of all requests, None on ranks that do not lead."""

    def __init__(self, model: ModelConfig, held: Holdings, sizes: Sizes, share: holdings.Share, choices: Choices | None, fp8: bool):
        self.device = Device()
        self.model, self.held, self.sizes, self.slots, self.fp8 = model, held, sizes, share.slots, fp8
        self.shard, self.alone, self.number = share.shard, share.shard.count == 1, share.number
        self.copies = {layer: share.copies(layer, model.router.experts) for layer in share.layers}
        self.lanes = [self.device.lane() for _ in range(sizes.lanes)]
        self.scratch = [Scratch() for _ in range(sizes.lanes)]
        self.micros = [Micro() for _ in range(sizes.micros)]
        self.send_width, self.back_width = send_width(model.d, fp8), 4 * model.d
        self.relays = [HostRelay(scratch, self.send_width, model.d) for scratch in self.scratch]
        self.layers, self.cache, self.pairs = share.layers, None, {}
        self.next = [NextTokens(held, choices) for _ in range(sizes.micros)] if choices is not None and held.head else []

    def seat(self, layer: int, expert_s) -> None:
        self.copies[layer] = Copies(expert_s, self.model.router.experts)

    def open_cache(self, sizes: Sizes) -> None:
        self.sizes, a = sizes, self.model.attention
        self.cache = KVCache(np, self.layers, sizes.slots * sizes.micros, a.kv_heads, a.head_dim, sizes.context)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.scratch)

    @property
    def kv_nbytes(self) -> int:
        return self.cache.nbytes if self.cache else 0

    def _buffers(self, m: int) -> Scratch:
        return self.scratch[m % len(self.scratch)]

    def _outer(self, m: int, name: str, count: int):
        """Room for rows as dispatch moves them."""
        if self.fp8:
            return self._buffers(m).rows(name, count, self.send_width, np.uint8)
        return self._buffers(m).rows(name, count, self.model.d)

    # ------------------------------------------------------------ a leader's rows
    def begin(self, m: int, batch: Batch, token_t) -> None:
        micro = self.micros[m]
        micro.batch = batch
        if token_t is None:
            micro.x_td = micro.rows_in[:batch.rows].copy()
        elif self.alone:
            micro.x_td = to_fp32(self.held.embed[token_t])
        else:
            micro.x_td, micro.part_td = np.zeros((2, len(token_t), self.model.d), np.float32)
            mine = (token_t >= self.shard.vocab.start) & (token_t < self.shard.vocab.stop)
            micro.part_td[mine] = to_fp32(self.held.embed[token_t[mine] - self.shard.vocab.start])

    def rows_in(self, m: int):
        if self.micros[m].rows_in is None:
            self.micros[m].rows_in = np.empty((self.sizes.rows, self.model.d), dtype=np.float32)
        return self.micros[m].rows_in

    def rows_out(self, m: int):
        return self.micros[m].x_td

    def attend(self, m: int, layer: int) -> None:
        micro, block = self.micros[m], self.held.blocks[layer]
        if not micro.batch.rows or block.attention is None:
            micro.part_td = np.zeros_like(micro.x_td)
        else:
            micro.part_td = block.attention(block.attn_norm(micro.x_td), micro.batch.segments, self.cache, layer)
        if self.alone:
            micro.x_td += micro.part_td

    def gate(self, m: int, layer: int) -> Pending:
        micro, block = self.micros[m], self.held.blocks[layer]
        micro.normed_td = block.ffn_norm(micro.x_td)
        logit_te, experts, copies = block.router(micro.normed_td), self.model.router.experts, self.copies[layer]
        expert_tk, micro.weight_tk = gate(logit_te, self.model.router, block.router_bias)
        if self.pairs:
            self.pairs[layer] += together(expert_tk, experts)
        if self.capacity:
            expert_tk, micro.weight_tk = self.capacity.limit(layer, expert_tk, micro.weight_tk, logit_te, block.router_bias)
            micro.route, micro.copy_tk = route_kept(expert_tk, experts, copies, self.number)
        else:
            micro.route, micro.copy_tk = copies.spread(expert_tk, route(expert_tk, experts), self.number)
        return Pending(self.device.event(), lambda: (micro.route.n_send_e,))

    def outgoing(self, m: int):
        micro = self.micros[m]
        token_s = micro.route.token_s
        x_sd = self._buffers(m).rows("x_sd", len(token_s), self.model.d)
        if len(token_s):
            np.take(micro.normed_td, token_s, axis=0, out=x_sd, mode="clip")
        return self._packed(m, x_sd)

    def _packed(self, m: int, x_sd):
        """Rows as dispatch moves them."""
        if not self.fp8:
            return x_sd
        out = self._outer(m, "x_sw", len(x_sd))
        fp8_pack(x_sd, out)
        return out

    def merge(self, m: int, y_sd) -> None:
        micro = self.micros[m]
        add = add_chosen if self.capacity else merge
        add(self._merge_rows(m), y_sd, micro.weight_tk, micro.route.slot_tk)

    def _merge_rows(self, m: int):
        """Where `merge` adds: x_td, or zeros that become this tensor shard's part."""
        micro = self.micros[m]
        if self.alone:
            return micro.x_td
        micro.part_td = np.zeros_like(micro.x_td)
        return micro.part_td

    def next_tokens(self, m: int) -> Pending:
        for part in self.wanted(m):
            self.draw(m, part, [self.logits(m, part)])
        return self.drawn(m)

    # ------------------------------------------------------------ rows by way of forwarders
    def relay(self, m: int) -> Relay:
        return self.relays[m % len(self.relays)]

    def chosen(self, m: int) -> Chosen:
        micro = self.micros[m]
        return Chosen(micro.copy_tk, micro.weight_tk, self._packed(m, micro.normed_td), np.arange(len(micro.normed_td)))

    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        x_td = self._merge_rows(m)
        for term in terms:
            add_chosen(x_td, *term)

    # ------------------------------------------------------------ tensor shards
    def part(self, m: int, what: str):
        return self.micros[m].part_td

    def parts(self, m: int, count: int):
        return self._buffers(m).rows("parts", count, self.model.d)

    def sum_parts(self, m: int, parts, shards: int):
        part_jtd = parts.reshape(shards, -1, self.model.d)
        total = self._buffers(m).rows("sum", part_jtd.shape[1], self.model.d)
        total[...] = part_jtd[0]
        for part in part_jtd[1:]:
            total += part
        return total

    def total(self, m: int, what: str):
        micro = self.micros[m]
        micro.total_td = self._buffers(m).rows("total", len(micro.part_td), self.model.d)
        return micro.total_td

    def add_total(self, m: int, what: str) -> None:
        self.micros[m].x_td += self.micros[m].total_td

    def wanted(self, m: int) -> list[slice]:
        self.next[m].begin(self.micros[m].batch, self.micros[m].x_td)
        return self.next[m].parts()

    def logits(self, m: int, part: slice):
        return self.next[m].logits(part)

    def logits_room(self, m: int, shard: int, rows: int, vocab: int):
        return np.empty((rows, vocab), np.float32)

    def draw(self, m: int, part: slice, blocks: list) -> None:
        self.next[m].draw(part, blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1))

    def drawn(self, m: int) -> Pending:
        answer = self.next[m].answer()
        return Pending(self.device.event(), lambda: answer)

    # ------------------------------------------------------------ experts
    def incoming(self, m: int, count: int):
        return self._outer(m, "x_id", count)

    def expert(self, m: int, layer: int, x_id, n_recv_re: np.ndarray):
        d, scratch = self.model.d, self._buffers(m)
        if self.fp8:
            x_id = fp8_unpack(x_id, d)
        out_id = scratch.rows("y_id", len(x_id), d)
        order = by_expert(n_recv_re)
        x_id = x_id if order is None else x_id[order]
        y_id = out_id if order is None else scratch.rows("by_expert", len(x_id), d)
        first = 0
        for slot, n in zip(self.slots, n_recv_re.sum(axis=0)):
            if n:
                self.held.experts[layer, slot](x_id[first:first + n], out=y_id[first:first + n])
            first += n
        if order is not None:
            out_id[order] = y_id
        return out_id

    def returning(self, m: int, count: int):
        return self._buffers(m).rows("y_sd", count, self.model.d)
