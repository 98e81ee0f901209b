"""What one rank does for each kind of op: the methods are named after the kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmoe.compute.base import Compute, Pending, Sizes
from hpcmoe.compute.step import Batch, header_size
from hpcmoe.config import ModelConfig
from hpcmoe.model.experts import flop_per_row
from hpcmoe.parallel import exchange
from hpcmoe.parallel.batch import Batcher
from hpcmoe.parallel.exchange import Channel
from hpcmoe.parallel.flat import Flags
from hpcmoe.parallel.handle import NOTHING, Handle
from hpcmoe.parallel.hierarchical import open_exchange
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.shards import Shards
from hpcmoe.parallel.timer import Timer
from hpcmoe.parallel.world import World
from hpcmoe.report.record import KINDS, RankRecord

TAG_HEADER, TAG_ROWS, TAG_TOKENS = 1, 2, 3


@dataclass
class Micro:
    """One micro-batch on this rank, as far as it has come."""

    batch: Batch | None = None
    routed: Pending | None = None
    n_recv_re: Any = None
    x_id: Any = None
    y_id: Any = None
    tokens_in: Any = None
    header_in: Any = None
    told: Any = None
    rounds: int = 0
    answer: tuple | None = None


class Stage:
    """One rank's part in its stage. Every method named after a kind takes the op, and returns a
    Handle where something is left in flight. model: as this rank's tensor shard sees it; whole: all of it."""

    def __init__(self, whole: ModelConfig, model: ModelConfig, world: World, compute: Compute, sizes: Sizes,
                 batcher: Batcher | None, record: RankRecord, timer: Timer):
        self.model, self.world, self.compute, self.sizes = model, world, compute, sizes
        self.batcher, self.record, self.timer = batcher, record, timer
        self.device = compute.device
        self.channels = [Channel(comm, self.device, lane) for comm, lane in zip(world.lanes, compute.lanes)]
        self.layers = record.layers
        self.exchange = open_exchange(world, compute, self.channels, record, model.router, sizes)
        self.micros = [Micro() for _ in range(sizes.micros)]
        self.load_le = np.zeros((len(self.layers), len(record.slots)), dtype=np.int64)
        self.alive, self.done, self.tokens_out = True, 0, 0
        self.ready, self.agreed = lambda: False, False  # whether experts can change seats: what this leader knows; what all have heard
        self.round = 0
        self.shards = Shards(world, compute, whole, record.count) if world.layout.tp > 1 and world.leader is not None else None

    def table(self) -> dict:
        """{kind: function}: each queues its op on the lane of its micro-batch."""
        return {kind: self._on_lane(getattr(self, kind.lower())) for kind in KINDS}

    def _on_lane(self, method):
        def call(op: Op) -> Handle | None:
            with self.compute.lane(op.micro), self.device.range(str(op)):
                return self.timer(op, self.round, method)
        return call

    def end_round(self) -> np.ndarray:
        """After each round: the rows that this rank's experts got in it, [layer, slot]."""
        self.round += 1
        self.timer.collect()
        load, self.load_le = self.load_le, np.zeros_like(self.load_le)
        return load

    def channel(self, op: Op) -> Channel:
        return self.channels[op.micro % len(self.channels)]

    # ------------------------------------------------------------ in
    def recv(self, op: Op) -> Handle | None:
        """Posts what this step starts from: rows of the stage before, or the last step's tokens."""
        micro, world, pipe = self.micros[op.micro], self.world, self.world.pipe
        micro.rounds += 1
        if not world.first_stage:
            source = world.counterpart[world.here.stage - 1]
            if micro.header_in is None:
                micro.header_in = np.empty(header_size(self.sizes.rows, self.sizes.pages), dtype=np.int64)
            return exchange.recv_rows(self.channel(op), pipe, self.compute.rows_in(op.micro), source,
                                      self._tag(TAG_ROWS, op), world.direct, micro.header_in)
        if self.shards and self.shards.me:
            micro.told, handle = self.shards.hear(op, self.sizes.rows, self.sizes.pages)
            return handle
        if world.last_stage or micro.rounds == 1:
            return None
        micro.tokens_in = np.empty(2 + 2 * self.sizes.rows, dtype=np.float64)
        source = world.counterpart[world.layout.pp - 1]
        return Handle(lambda: [pipe.Irecv(micro.tokens_in, source, self._tag(TAG_TOKENS, op))], (micro.tokens_in,))

    def _tag(self, what: int, op: Op) -> int:
        return what + 4 * op.micro

    def _begin(self, op: Op) -> np.ndarray | None:
        """The rows of this step: embedded tokens on the first stage, received rows elsewhere. Returns the tokens [t]."""
        micro, token_t = self.micros[op.micro], None
        if not self.world.first_stage:
            micro.batch = Batch.of(micro.header_in)
        elif micro.told is not None:
            micro.batch, token_t = self.shards.told(micro.told)
        else:
            micro.batch, token_t = self._next_step(op)
        self.compute.begin(op.micro, micro.batch, token_t)
        return token_t

    def _next_step(self, op: Op) -> tuple[Batch, np.ndarray]:
        """Takes what the last stage made of the step before, and builds the next one."""
        micro = self.micros[op.micro]
        if micro.tokens_in is not None:
            sampled, scored = (int(n) for n in micro.tokens_in[:2])
            values = micro.tokens_in[2:]
            micro.answer = (values[:sampled].astype(np.int64), values[sampled:sampled + scored])
        if micro.answer is not None:
            self.batcher.accept(op.micro, *micro.answer)
            micro.answer = None
        return self.batcher.build(op.micro)

    # ------------------------------------------------------------ one layer
    def embed(self, op: Op) -> Handle:
        """Begins a step of the first stage on tensor shards: each knows the embeddings of a part of the vocabulary."""
        token_t = self._begin(op)
        told = NOTHING if self.shards.me else self.shards.tell(op, self.micros[op.micro].batch, token_t)
        return self.shards.sum(op, "EMBED", told)

    def attend(self, op: Op) -> None:
        if op.layer == self.layers[0] and not (self.shards and self.world.first_stage):
            self._begin(op)
        self.compute.attend(op.micro, op.layer)

    def reduce_attend(self, op: Op) -> Handle:
        return self.shards.sum(op, "ATTEND")

    def gate(self, op: Op) -> None:
        self.micros[op.micro].routed = self.compute.gate(op.micro, op.layer)

    def counts(self, op: Op) -> Handle:
        """Tells each place how many rows of each of its experts come, and how far this leader is."""
        micro = self.micros[op.micro]

        def flags() -> Flags:
            progress = (len(self.batcher.finished), self.batcher.tokens_out) if self.batcher else (0, 0)
            return Flags(int(micro.routed is not None and micro.batch.alive), *progress, int(self.ready()))

        return self.exchange.counts(op, micro.routed, flags)

    def dispatch(self, op: Op) -> Handle | None:
        """Rows to the ranks that own their experts."""
        micro = self.micros[op.micro]
        micro.n_recv_re, flags = self.exchange.arrived(op)
        if op.layer == self.layers[0] and op.micro == 0:
            self.alive, self.done, self.tokens_out, self.agreed = bool(flags.alive), flags.done, flags.tokens, bool(flags.ready)
        self.load_le[op.layer - self.layers[0]] += micro.n_recv_re.sum(axis=0)
        micro.x_id, handle = self.exchange.dispatch(op)
        return handle

    def expert(self, op: Op) -> None:
        """Each of this rank's experts on its rows."""
        micro = self.micros[op.micro]
        micro.y_id = self.compute.expert(op.micro, op.layer, micro.x_id, micro.n_recv_re)
        self.record.expert_rows += len(micro.x_id)
        self.record.expert_flop += len(micro.x_id) * flop_per_row(self.model.d, self.model.expert.f)

    def combine(self, op: Op) -> Handle | None:
        """Rows back to the leaders they came from."""
        return self.exchange.combine(op, self.micros[op.micro].y_id)

    def merge(self, op: Op) -> None:
        self.exchange.merge(op)

    def reduce_merge(self, op: Op) -> Handle:
        return self.shards.sum(op, "MERGE")

    # ------------------------------------------------------------ out
    def send(self, op: Op) -> Handle:
        """The step and its rows to the same leader of the next stage."""
        world, pipe = self.world, self.world.pipe
        target = world.counterpart[world.here.stage + 1]
        header, rows = self.micros[op.micro].batch.header(), self.compute.rows_out(op.micro)
        self._count_message(op, target, len(rows), header.nbytes + rows.nbytes)
        return exchange.send_rows(self.channel(op), pipe, rows, target, self._tag(TAG_ROWS, op), world.direct, header)

    def sample(self, op: Op) -> Handle:
        """The next token of each sequence that wants one, or the log-probabilities of given ones."""
        alive = self.alive  # this round's
        if self.shards:
            return self.shards.next_tokens(op, lambda drawn: self._answer(op, drawn, alive))
        return self._answer(op, self.compute.next_tokens(op.micro), alive)

    def _answer(self, op: Op, pending: Pending, alive: bool) -> Handle:
        """What has been drawn, to the leader that began the step."""
        micro, world = self.micros[op.micro], self.world
        if world.first_stage:
            def answer() -> None:
                micro.answer = pending.read()
            return Handle(finish=answer, after=pending.event)

        target = world.counterpart[0]

        def post() -> list:
            if not alive:  # the last round: nobody listens any more
                return []
            token_n, logprob_n = pending.read()
            message = np.concatenate([[len(token_n), len(logprob_n)], token_n, logprob_n])
            self._count_message(op, target, len(token_n), message.nbytes)
            return [world.pipe.Isend(message, target, self._tag(TAG_TOKENS, op))]

        return Handle(post, after=pending.event)

    # ------------------------------------------------------------ counting
    def _count_message(self, op: Op, target: int, rows: int, nbytes: int) -> None:
        first = self.world.here.dp * self.world.pipe.size
        away = self.world.node_of_rank[first + target] != self.world.node_of_rank[self.world.rank]
        self.record.count(op, 0 if away else rows, rows if away else 0, nbytes / max(rows, 1))
