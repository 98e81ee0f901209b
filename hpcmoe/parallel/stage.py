"""What one rank does for each kind of op: the methods are named after the kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.experts import flop_per_row
from hpcmoe.model.kvcache import KVCache
from hpcmoe.model.router import gate
from hpcmoe.parallel import exchange
from hpcmoe.parallel.batch import Batch, Batcher, Work, header_size
from hpcmoe.parallel.exchange import Handle, Plan
from hpcmoe.parallel.holdings import Holdings
from hpcmoe.parallel.next_tokens import NextTokens
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.route import Route, by_expert, merge, route
from hpcmoe.parallel.world import World
from hpcmoe.report.record import RankRecord

FLAGS = 3  # beside the counts: the leader has work, requests it finished, tokens it made
TAG_HEADER, TAG_ROWS, TAG_TOKENS = 1, 2, 3


class Limits(NamedTuple):
    """Sizes that all ranks of a replica agree on: micro-batches, lanes, and per leader the slots
    and most rows of one micro-batch; the longest sequence in tokens."""

    micros: int
    lanes: int
    slots: int
    rows: int
    context: int


class Scratch:
    """Buffers of one lane, grown as needed and used again: an exchange's rows change in number at every step."""

    def __init__(self):
        self.buffers: dict[str, np.ndarray] = {}

    def rows(self, name: str, count: int, width: int) -> np.ndarray:
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < count:
            buffer = self.buffers[name] = np.empty((max(count, 16) * 5 // 4, width), dtype=np.float32)
        return buffer[:count]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buffers.values())


@dataclass
class Micro:
    """One micro-batch on this rank, as far as it has come."""

    batch: Batch | None = None
    x_td: Any = None
    normed_td: Any = None
    weight_tk: Any = None
    route: Route | None = None
    counts_in: Any = None
    n_recv_re: Any = None
    plan: Plan | None = None
    x_id: Any = None
    y_id: Any = None
    y_sd: Any = None
    tokens_in: Any = None
    header_in: Any = None
    rows_in: Any = None
    rounds: int = 0
    answer: tuple | None = None


class Stage:
    """One rank's part in its stage. Every method named after a kind takes the op, and returns a
    Handle where something is left in flight."""

    def __init__(self, model: ModelConfig, world: World, held: Holdings, limits: Limits,
                 works: list[Work], batcher: Batcher | None, record: RankRecord):
        self.model, self.world, self.held, self.limits = model, world, held, limits
        self.works, self.batcher, self.record = works, batcher, record
        self.transport = exchange.TRANSPORTS[world.transport]
        self.row = exchange.row_type(model.d, np.float32)
        layers, experts = record.layers, record.experts
        self.layers, self.experts = layers, experts
        place = world.here.place
        self.me, self.size = place, world.layout.stage_size
        owner_e = np.array(world.layout.owner_of_expert(model.router.experts))
        self.first_expert_r = np.searchsorted(owner_e, np.arange(self.size))
        self.most_experts = max(1, int(np.bincount(owner_e, minlength=self.size).max()))
        self.expert_column_e = np.arange(len(owner_e)) - self.first_expert_r[owner_e]
        self.owner_e = owner_e
        self.away_r = np.array(world.node_r) != world.node_r[place]
        self.micros = [Micro() for _ in range(limits.micros)]
        self.scratch = [Scratch() for _ in range(limits.lanes)]
        self.load_le = np.zeros((len(layers), len(experts)), dtype=np.int64)
        self.alive, self.done, self.tokens_out = True, 0, 0
        self.cache = None
        if world.leader is not None:
            a = model.attention
            self.cache = KVCache(np, layers, limits.slots * limits.micros, a.kv_heads, a.head_dim, limits.context)
        self.next_tokens = NextTokens(held, works) if world.last_stage and world.leader is not None else None

    def table(self) -> dict:
        """{kind: method}."""
        return {kind: getattr(self, kind.lower()) for kind in
                ("RECV", "ATTEND", "GATE", "COUNTS", "DISPATCH", "EXPERT", "COMBINE", "MERGE", "SEND", "SAMPLE")}

    def lane(self, op: Op) -> int:
        return op.micro % self.limits.lanes

    # ------------------------------------------------------------ in
    def recv(self, op: Op) -> Handle | None:
        """Posts what this step starts from: rows of the stage before, or the last step's tokens."""
        micro, world, pipe = self.micros[op.micro], self.world, self.world.pipe
        if not world.first_stage:
            source = world.counterpart[world.here.stage - 1]
            if micro.header_in is None:
                micro.header_in = np.empty(header_size(self.limits.rows), dtype=np.int64)
                micro.rows_in = np.empty((self.limits.rows, self.model.d), dtype=np.float32)
            return Handle([pipe.Irecv(micro.header_in, source, self._tag(TAG_HEADER, op)),
                           pipe.Irecv(micro.rows_in, source, self._tag(TAG_ROWS, op))], (micro.header_in, micro.rows_in))
        micro.rounds += 1
        if world.last_stage or micro.rounds == 1:
            return None
        micro.tokens_in = np.empty(2 + 2 * self.limits.rows, dtype=np.float64)
        source = world.counterpart[world.layout.pp - 1]
        return Handle([pipe.Irecv(micro.tokens_in, source, self._tag(TAG_TOKENS, op))], (micro.tokens_in,))

    def _tag(self, what: int, op: Op) -> int:
        return what + 4 * op.micro

    def _begin(self, op: Op) -> None:
        """The rows of this step: embedded tokens on the first stage, received rows elsewhere."""
        micro = self.micros[op.micro]
        if not self.world.first_stage:
            micro.batch = Batch.of(micro.header_in)
            micro.x_td = micro.rows_in[:micro.batch.rows].copy()
            return
        if micro.tokens_in is not None:
            sampled, scored = (int(n) for n in micro.tokens_in[:2])
            values = micro.tokens_in[2:]
            micro.answer = (values[:sampled].astype(np.int64), values[sampled:sampled + scored])
        if micro.answer is not None:
            self.batcher.accept(op.micro, *micro.answer)
            micro.answer = None
        micro.batch, token_t = self.batcher.build(op.micro)
        micro.x_td = to_fp32(self.held.embed[token_t])

    # ------------------------------------------------------------ one layer
    def attend(self, op: Op) -> None:
        if op.layer == self.layers[0]:
            self._begin(op)
        micro, block = self.micros[op.micro], self.held.blocks[op.layer]
        if micro.batch.rows:
            micro.x_td += block.attention(block.attn_norm(micro.x_td), micro.batch.segments, self.cache, op.layer)

    def gate(self, op: Op) -> None:
        micro, block = self.micros[op.micro], self.held.blocks[op.layer]
        micro.normed_td = block.ffn_norm(micro.x_td)
        expert_tk, micro.weight_tk = gate(block.router(micro.normed_td), self.model.router, block.router_bias)
        micro.route = route(expert_tk, self.model.router.experts)

    def counts(self, op: Op) -> Handle | None:
        """Tells each place how many rows of each of its experts come, and how far this leader is."""
        micro = self.micros[op.micro]
        out = np.zeros((self.size, self.most_experts + FLAGS), dtype=np.int32)
        if micro.route is not None:
            out[self.owner_e, self.expert_column_e] = micro.route.n_send_e
            out[:, self.most_experts] = micro.batch.alive
        if self.batcher:
            out[:, -2:] = len(self.batcher.finished), self.batcher.tokens_out
        if self.size == 1:
            micro.counts_in = out
            return None
        micro.counts_in = np.empty_like(out)
        self._count(op, self.size - 1 - self.away_r.sum(), self.away_r.sum(), out[0].nbytes)
        return Handle([self.world.lanes[self.lane(op)].Ialltoall(out, micro.counts_in)], (out, micro.counts_in))

    def dispatch(self, op: Op) -> Handle | None:
        """Rows to the ranks that own their experts: s -> i."""
        micro, scratch = self.micros[op.micro], self.scratch[self.lane(op)]
        self._read_counts(op, micro)
        n_send = 0 if micro.route is None else len(micro.route.token_s)
        n_send_r = self._n_send_r(micro)
        n_recv_r = micro.n_recv_re.sum(axis=1)
        x_sd = scratch.rows("x_sd", n_send, self.model.d)
        if n_send:
            np.take(micro.normed_td, micro.route.token_s, axis=0, out=x_sd, mode="clip")
        if self.size == 1:
            micro.x_id = x_sd
            self._count(op, 0, 0, 0, n_send)
            return None
        micro.plan = Plan.of(n_send_r, n_recv_r, self.me)
        micro.x_id = scratch.rows("x_id", int(n_recv_r.sum()), self.model.d)
        return self._exchange(op, x_sd, micro.x_id, micro.plan, int(n_send_r[self.me]))

    def _read_counts(self, op: Op, micro: Micro) -> None:
        micro.n_recv_re = micro.counts_in[:, :len(self.experts)].astype(np.int64)
        if op.layer == self.layers[0] and op.micro == 0:
            self.alive = bool(micro.counts_in[:, self.most_experts].any())
            self.done, self.tokens_out = (int(n) for n in micro.counts_in[:, -2:].sum(axis=0))
        self.load_le[op.layer - self.layers[0]] += micro.n_recv_re.sum(axis=0)

    def _n_send_r(self, micro: Micro) -> np.ndarray:
        if micro.route is None:
            return np.zeros(self.size, dtype=np.int64)
        return np.bincount(self.owner_e, weights=micro.route.n_send_e, minlength=self.size).astype(np.int64)

    def _exchange(self, op: Op, send, recv, plan: Plan, own: int) -> Handle:
        """Posts the rows to others; the own ones are copied here."""
        a, b = int(plan.first_send_r[self.me]), int(plan.first_recv_r[self.me])
        recv[b:b + own] = send[a:a + own]
        away = int(plan.n_send_r[self.away_r].sum())
        self._count(op, int(plan.n_send_r.sum()) - away, away, self.row.Get_size(), own)
        return self.transport(self.world.lanes[self.lane(op)], send, recv, plan, self.row)

    def expert(self, op: Op) -> None:
        """Each of this rank's experts on its rows."""
        micro, scratch = self.micros[op.micro], self.scratch[self.lane(op)]
        micro.y_id = scratch.rows("y_id", len(micro.x_id), self.model.d)
        order = by_expert(micro.n_recv_re)
        x_id = micro.x_id if order is None else micro.x_id[order]
        y_id = micro.y_id if order is None else scratch.rows("by_expert", len(x_id), self.model.d)
        first = 0
        for e, n in zip(self.experts, micro.n_recv_re.sum(axis=0)):
            if n:
                self.held.experts[op.layer, e](x_id[first:first + n], out=y_id[first:first + n])
            first += n
        if order is not None:
            micro.y_id[order] = y_id
        self.record.expert_rows += len(x_id)
        self.record.expert_flop += len(x_id) * flop_per_row(self.model.d, self.model.expert.f)

    def combine(self, op: Op) -> Handle | None:
        """Rows back to the leaders they came from: i -> s."""
        micro = self.micros[op.micro]
        if self.size == 1:
            micro.y_sd = micro.y_id
            self._count(op, 0, 0, 0, len(micro.y_id))
            return None
        n_send = 0 if micro.route is None else len(micro.route.token_s)
        micro.y_sd = self.scratch[self.lane(op)].rows("y_sd", n_send, self.model.d)
        own = int(micro.n_recv_re[self.me].sum())
        return self._exchange(op, micro.y_id, micro.y_sd, micro.plan.back(), own)

    def merge(self, op: Op) -> None:
        micro = self.micros[op.micro]
        merge(micro.x_td, micro.y_sd, micro.weight_tk, micro.route.slot_tk)

    # ------------------------------------------------------------ out
    def send(self, op: Op) -> Handle:
        """The step and its rows to the same leader of the next stage."""
        micro, world = self.micros[op.micro], self.world
        target = world.counterpart[world.here.stage + 1]
        header = micro.batch.header()
        self._count_message(op, target, micro.batch.rows, header.nbytes + micro.x_td.nbytes)
        return Handle([world.pipe.Isend(header, target, self._tag(TAG_HEADER, op)),
                       world.pipe.Isend(micro.x_td, target, self._tag(TAG_ROWS, op))], (header, micro.x_td))

    def sample(self, op: Op) -> Handle | None:
        """The next token of each sequence that wants one, or the log-probabilities of given ones."""
        micro, world = self.micros[op.micro], self.world
        token_n, logprob_n = self.next_tokens(micro.batch, micro.x_td)
        if world.first_stage:
            micro.answer = (token_n, logprob_n)
            return None
        if not self.alive:  # the last round: nobody listens any more
            return None
        message = np.concatenate([[len(token_n), len(logprob_n)], token_n, logprob_n])
        target = world.counterpart[0]
        self._count_message(op, target, len(token_n), message.nbytes)
        return Handle([world.pipe.Isend(message, target, self._tag(TAG_TOKENS, op))], (message,))

    # ------------------------------------------------------------ counting
    def _count_message(self, op: Op, target: int, rows: int, nbytes: int) -> None:
        first = self.world.here.dp * self.world.pipe.size
        away = self.world.node_of_rank[first + target] != self.world.node_of_rank[self.world.rank]
        self._count(op, 0 if away else rows, rows if away else 0, nbytes / max(rows, 1))

    def _count(self, op: Op, intra: int, inter: int, row_bytes: float, own: int = 0) -> None:
        r = self.record
        for table, amount in ((r.rows_own, own), (r.rows_intra, intra), (r.rows_inter, inter),
                              (r.bytes_intra, intra * row_bytes), (r.bytes_inter, inter * row_bytes)):
            table[op.kind] = table.get(op.kind, 0) + int(amount)
