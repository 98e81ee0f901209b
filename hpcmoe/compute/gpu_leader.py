"""A leader's part on a GPU: attention, routing, merging, sampling on its token rows."""

from __future__ import annotations

import math

import numpy as np

from hpcmoe.compute.base import Pending, Sizes
from hpcmoe.compute.gpu_cache import Cache
from hpcmoe.compute.gpu_step import Step, Wanted
from hpcmoe.compute.gpu_weights import GpuHoldings
from hpcmoe.compute.gpu_shards import GpuShard
from hpcmoe.compute.graphs import Graphs
from hpcmoe.compute.holdings import Share
from hpcmoe.compute.relay import Chosen, Terms
from hpcmoe.compute.step import Batch, Choices
from hpcmoe.config import ModelConfig
from hpcmoe.device import Event, Gpu
from hpcmoe.errors import UserError
from hpcmoe.kernels.attention import attention, splits, workspace_floats
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.kernels.embed import embed
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.merge import merge
from hpcmoe.kernels.norm import norm
from hpcmoe.kernels.permute import permute
from hpcmoe.kernels.rope import rope_kv
from hpcmoe.kernels.router import MOST_EXPERTS, histogram_shape, router
from hpcmoe.kernels.sample import sample
from hpcmoe.model.copies import Copies

HEAD_ROWS = 1024  # rows whose logits are held at once


class Buffers:
    """What the micro-batches of one lane use one after the other. slots: of a layer; tells: whether
    the host hears what the router chose. Letters: docs/letters.md; x: q, k and v of a row together."""

    def __init__(self, gpu: Gpu, model: ModelConfig, slots: int, sizes: Sizes, t, fp8: bool, head: bool, tells: bool):
        rows, parcels = sizes.rows, sizes.relay.parcels if sizes.relay else 0
        a, k, e, d = model.attention, model.router.top_k, model.router.experts, model.d
        self.normed_td, self.o_td = gpu.empty((rows, d), t), gpu.empty((rows, d), t)
        self.qkv_tx = gpu.empty((rows, (a.heads + 2 * a.kv_heads) * a.head_dim), t)
        self.q_thc = gpu.empty((rows, a.heads, a.head_dim), t)
        self.mixed_tx = gpu.empty((rows, a.heads * a.head_dim), t)
        self.logit_te = gpu.empty((rows, e), np.float32)
        part = rows * k + -(rows * k) % 4  # on 16 bytes
        self.chosen = gpu.empty(3 * part, np.int32)  # in one piece, for one copy
        self.expert_tk, self.slot_tk, self.weight_tk = choices_of(self.chosen, rows, k)
        self.chosen_host = gpu.pinned(3 * part, np.int32) if tells else None
        most = max(math.prod(histogram_shape(r, e)) for r in range(1, rows + 1))
        self.hist = gpu.empty(most, np.int32)
        room = rows * k + parcels  # what relay.py hands on stands in one piece
        self.x_sd = gpu.empty((room, fp8_width(d)), np.uint8) if fp8 else gpu.empty((room, d), t)
        self.y_sd = gpu.empty((0 if sizes.relay else rows * k, d), t)
        self.n_send_e = gpu.pinned(slots, np.int32)
        n = min(rows, HEAD_ROWS) if head else 0
        self.head_in, self.logit_nv = gpu.empty((n, d), t), gpu.empty((n, model.vocab), np.float32)
        self.workspace = None

    @property
    def nbytes(self) -> int:
        views = (self.expert_tk, self.slot_tk, self.weight_tk)
        return sum(a.nbytes for a in vars(self).values() if a is not None and not any(a is v for v in views))


def choices_of(block, rows: int, k: int) -> tuple:
    """Parts of a block of integers: experts int32, slots int32, weights fp32, [rows, k] each."""
    part = len(block) // 3
    expert, slot, weight = (block[i * part:i * part + rows * k].reshape(rows, k) for i in range(3))
    return expert, slot, weight.view(np.float32)


def workspace_most(m, model: ModelConfig, most: int, longest: int) -> int:
    """Floats that attention's workspace takes at most, for launches of up to `most` rows."""
    a = model.attention
    return max(workspace_floats(rows, a.heads, a.head_dim, splits(m, rows, a.kv_heads, longest)) for rows in range(1, most + 1))


class Leader:
    """model: as this rank's tensor shard sees it; choices: of all requests; tells: whether the host
    hears what the router chose. Raises UserError where the buffers do not fit."""

    def __init__(self, gpu: Gpu, kernels: Kernels, graphs: Graphs, model: ModelConfig, held: GpuHoldings, sizes: Sizes,
                 choices: Choices, fp8: bool, share: Share, tells: bool):
        self.gpu, self.kernels, self.graphs, self.model, self.held = gpu, kernels, graphs, model, held
        self.sizes, self.fp8, self.cache = sizes, fp8, None
        t, head = kernels.t_dtype, held.head is not None
        self.steps = [Step(gpu, sizes.rows) for _ in range(sizes.micros)]
        self.x = [gpu.empty((sizes.rows, model.d), np.float32) for _ in range(sizes.micros)]
        self.x_in = [gpu.empty((sizes.rows, model.d), np.float32) for _ in range(sizes.micros)] if held.embed is None else []
        self.wanted = [Wanted(gpu, sizes.rows, choices) for _ in range(sizes.micros)] if head else []
        self.copies = {layer: share.copies(layer, model.router.experts) for layer in share.layers}
        self.number, fixed = share.number, not share.spares
        self.turns = {layer: None if c.in_order and fixed else self._turns(c) for layer, c in self.copies.items()}
        slots = len(self.copies[share.layers[0]].expert_s)
        if slots > MOST_EXPERTS:
            raise UserError(f"layout.replicas: {slots} slots per layer: a GPU takes at most {MOST_EXPERTS}; run.device = cpu takes any")
        self.buffers = [Buffers(gpu, model, slots, sizes, t, fp8, head, tells) for _ in range(sizes.lanes)]
        for b in self.buffers:
            b.workspace = gpu.empty(max(1, workspace_most(kernels, model, sizes.rows, self._longest())), np.float32)
        self.shard = GpuShard(gpu, kernels, share.shard, sizes.rows, model.d, sizes.lanes) if share.shard.count > 1 else None
        if self.shard and head:
            self.shard.open_head(len(self.buffers[0].head_in), share.shard.whole_vocab)

    def _turns(self, copies: Copies):
        return self.gpu.upload(copies.turns(self.number))

    def seat(self, layer: int, expert_s) -> None:
        """Where it was, since graphs know the place. Gates that read it are over: their counts have come."""
        self.copies[layer] = Copies(expert_s, self.model.router.experts)
        self.turns[layer].set(self.copies[layer].turns(self.number))
        self.gpu.event().record().wait()

    @property
    def nbytes(self) -> int:
        own = [*self.buffers, *self.x, *self.x_in, *([self.shard] if self.shard else [])]
        return sum(a.nbytes for a in own)

    def open_cache(self, sizes: Sizes, layers: list[int]) -> None:
        self.sizes = sizes
        self.cache = Cache(self.gpu, self.model, sizes, layers, self.kernels.t_dtype)

    def _longest(self) -> int:
        """Most positions that a row looks at."""
        return min(self.sizes.context, self.model.attention.window or self.sizes.context)

    def _of(self, m: int) -> tuple[Step, Buffers]:
        return self.steps[m], self.buffers[m % len(self.buffers)]

    # ------------------------------------------------------------ a step
    def begin(self, m: int, batch: Batch, token_t) -> None:
        step = self.steps[m]
        self.cache.admit(m, batch)
        step.set(batch, token_t)
        if token_t is None:
            self.gpu.copy(self.x[m][:step.rows], self.x_in[m][:step.rows])
        elif self.shard:
            self.shard.embed(m, self.held.embed, step.token_t[:step.rows], self.x[m][:step.rows])
        elif step.rows:
            embed(self.kernels, self.held.embed, step.token_t[:step.rows], self.x[m][:step.rows])

    def rows_in(self, m: int):
        return self.x_in[m]

    def rows_out(self, m: int):
        return self.x[m][:self.steps[m].rows]

    def attend(self, m: int, layer: int) -> None:
        step, _ = self._of(m)
        if not step.rows:
            return
        longest = 1 << (step.longest - 1).bit_length()  # steps of one graph share it
        # The workspace is as large as any number of rows in launches takes: not of rows that there are.
        singles = step.decode if step.tiles else self.graphs.rows(step.rows, self.sizes.rows)
        parts = splits(self.kernels, singles, self.model.attention.kv_heads, min(longest, self._longest()))

        def queue(rows: int, exact: bool) -> None:
            self._attend(m, layer, rows, exact, parts)

        if step.tiles:
            queue(step.rows, True)
        else:
            self.graphs.run(self.gpu.current, ("ATTEND", m, layer, parts), step.rows, self.sizes.rows, queue)

    def _attend(self, m: int, layer: int, rows: int, exact: bool, parts: int) -> None:
        step, b = self._of(m)
        k, block, a, model, cache = self.kernels, self.held.blocks[layer], self.model.attention, self.model, self.cache
        n = None if exact else step.n_rows
        norm(k, self.x[m][:rows], b.normed_td[:rows], block.attn_norm, eps=model.norm_eps, kind=model.norm,
             bias_d=block.attn_norm_bias, rows=n)
        self.gpu.gemm(b.normed_td[:rows], block.qkv, b.qkv_tx[:rows])
        rope_kv(k, b.qkv_tx[:rows], b.q_thc[:rows], cache.k[layer], cache.v[layer], step.position_t[:rows], step.slot_t[:rows],
                cache.page_sp, self.held.cos, self.held.sin, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim,
                page_tokens=cache.page_tokens, scale=1.0 / math.sqrt(a.head_dim), qk_norm=a.qk_norm, q_norm=block.q_norm,
                k_norm=block.k_norm, eps=model.norm_eps, bias_x=block.qkv_bias, clip=a.clip_qkv, rows=n)
        attention(k, b.q_thc[:rows], cache.k[layer], cache.v[layer], cache.page_sp, step.slot_t[:rows], step.position_t[:rows],
                  step.work(rows, exact), b.mixed_tx[:rows], window=a.window, splits=parts, workspace=b.workspace)
        self.gpu.gemm(b.mixed_tx[:rows], block.out, b.o_td[:rows])

    # ------------------------------------------------------------ routing
    def gate(self, m: int, layer: int) -> Pending:
        step, b = self._of(m)
        if not step.rows:
            none = np.zeros(len(self.copies[layer].expert_s), np.int64)
            return Pending(Event(), lambda: (none,))

        def queue(rows: int, exact: bool) -> None:
            self._gate(m, layer, rows, exact)

        key = ("GATE", m, layer)
        if step.tiles:
            queue(step.rows, True)
        else:
            self.graphs.run(self.gpu.current, key, step.rows, self.sizes.rows, queue)
        if b.chosen_host is not None:
            self.gpu.copy(b.chosen_host, b.chosen)
        return Pending(self.gpu.event().record(), lambda: (b.n_send_e.astype(np.int64),))

    def _gate(self, m: int, layer: int, rows: int, exact: bool) -> None:
        step, b = self._of(m)
        k, block, model, config = self.kernels, self.held.blocks[layer], self.model, self.model.router
        n = None if exact else step.n_rows
        shape = histogram_shape(rows, config.experts)
        hist_be = b.hist[:shape[0] * shape[1]].reshape(shape)
        norm(k, self.x[m][:rows], b.normed_td[:rows], block.ffn_norm, eps=model.norm_eps, kind=model.norm,
             bias_d=block.ffn_norm_bias, add_td=b.o_td[:rows], add_bias_d=block.out_bias, rows=n)
        self.gpu.gemm(b.normed_td[:rows], block.router, b.logit_te[:rows])
        router(k, b.logit_te[:rows], b.expert_tk[:rows], b.weight_tk[:rows], hist_be, config=config, bias_e=block.router_bias, rows=n)
        permute(k, b.normed_td[:rows], b.expert_tk[:rows], hist_be, b.slot_tk[:rows], b.x_sd[:rows * config.top_k],
                b.n_send_e, fp8=self.fp8, rows=n, turns=self.turns[layer])

    def chosen(self, m: int) -> Chosen:
        """A token's row is that of any of its send slots, which stand by the copy that they go to."""
        step, b = self._of(m)
        k = self.model.router.top_k
        _, slot_tk, weight_tk = (a[:step.rows] for a in choices_of(b.chosen_host, self.sizes.rows, k))
        copy_tk = np.searchsorted(np.cumsum(b.n_send_e), slot_tk, side="right")
        return Chosen(copy_tk, weight_tk, b.x_sd[:step.rows * k], slot_tk[:, 0])

    def experts(self, m: int) -> np.ndarray:
        """What the router chose, on the host: [t, k]."""
        step, b = self._of(m)
        return choices_of(b.chosen_host, self.sizes.rows, self.model.router.top_k)[0][:step.rows]

    def sent(self, m: int):
        """All of the buffer that `outgoing` is a part of."""
        return self._of(m)[1].x_sd

    def outgoing(self, m: int):
        step, b = self._of(m)
        return b.x_sd[:step.rows * self.model.router.top_k]

    def returning(self, m: int, count: int):
        return self._of(m)[1].y_sd[:count]

    def merge(self, m: int, y_sd) -> None:
        step, b = self._of(m)
        self._merge(m, y_sd, b.weight_tk[:step.rows], b.slot_tk[:step.rows], False)

    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        for term in terms:  # GpuRelay makes one
            self._merge(m, *term, True)

    def _merge(self, m: int, y_sd, weight_tk, slot_tk, some: bool) -> None:
        rows = self.steps[m].rows
        if not rows:
            return
        x_td = self.shard.empty(m, rows) if self.shard else self.x[m][:rows]
        merge(self.kernels, x_td, y_sd, weight_tk, slot_tk, some=some)
        if self.shard:
            self.shard.close(m, rows)

    # ------------------------------------------------------------ tensor shards
    def part(self, m: int, what: str):
        """Attention's part is in 16 bits as it is made, and its total goes where the norm of `gate` adds it."""
        step, b = self._of(m)
        return (b.o_td if what == "ATTEND" else self.shard.of(m).part_td)[:step.rows]

    def total(self, m: int, what: str):
        step, b = self._of(m)
        return (b.o_td if what == "ATTEND" else self.shard.of(m).total_td)[:step.rows]

    def add_total(self, m: int, what: str) -> None:
        if what != "ATTEND":
            self.shard.add_total(m, self.x[m][:self.steps[m].rows])

    # ------------------------------------------------------------ the end
    def next_tokens(self, m: int) -> Pending:
        for part in self.want(m):
            self.draw(m, part, [self.logits(m, part)])
        return self.drawn(m)

    def want(self, m: int) -> list[slice]:
        step, b = self._of(m)
        wanted, most = self.wanted[m], len(b.head_in)
        wanted.set(step.batch)
        return [slice(first, min(first + most, wanted.count)) for first in range(0, wanted.count, most)]

    def logits(self, m: int, part: slice):
        step, b = self._of(m)
        held, model, n = self.held, self.model, part.stop - part.start
        norm(self.kernels, self.x[m][:step.rows], b.head_in[:n], held.norm, eps=model.norm_eps, kind=model.norm,
             bias_d=held.norm_bias, row_n=self.wanted[m].row[part])
        self.gpu.gemm(b.head_in[:n], held.head, b.logit_nv[:n])
        return b.logit_nv[:n]

    def draw(self, m: int, part: slice, blocks: list) -> None:
        wanted = self.wanted[m]
        logit_nv = self.shard.whole(m, blocks) if self.shard else blocks[0]
        sample(self.kernels, logit_nv, wanted.draw(part), wanted.token[part], wanted.logprob[part], bias_v=self.held.head_bias)

    def drawn(self, m: int) -> Pending:
        wanted = self.wanted[m]
        wanted.fetch()
        return Pending(self.gpu.event().record(), wanted.answer)
