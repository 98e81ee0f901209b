"""What the tensor shards of one leader do together: sums of what each has made, logits, the step's description.

A sum goes in two exchanges, reduce-scatter and all-gather: each shard adds up a share of the rows, in the
shards' order, and gives the result to all, so that all have the same bits. Rows travel by the transport of the
run. MPI reduces nothing: its reductions do not take device memory everywhere.
"""

from __future__ import annotations

from typing import Callable, Iterator

import numpy as np

from hpcmoe.compute.base import Compute
from hpcmoe.compute.step import Batch, header_size
from hpcmoe.config import ModelConfig
from hpcmoe.model.shard import Shard
from hpcmoe.parallel import exchange
from hpcmoe.parallel.exchange import Channel, Plan
from hpcmoe.parallel.handle import NOTHING, Chain, Handle
from hpcmoe.parallel.layout import share
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.world import World

TAG_STEP, TAG_LOGITS = 1, 2  # transports use 0


class Shards:
    """One rank among the shards of its leader. model: the whole one; count(op, rows within the node, rows between
    nodes, bytes of a row) books what is sent."""

    def __init__(self, world: World, compute: Compute, model: ModelConfig, count: Callable):
        self.compute, self.count, self.direct = compute, count, world.direct
        self.transport = exchange.TRANSPORTS[world.flat]
        self.me, self.size = world.here.shard, world.layout.tp
        self.channels = [Channel(comm, compute.device, lane) for comm, lane in zip(world.shards, compute.lanes)]
        first = world.rank - self.me
        self.away_j = np.array([world.node_of_rank[first + j] != world.node_of_rank[world.rank] for j in range(self.size)])
        self.vocab_j = [Shard.of(model, j, self.size).model.vocab for j in range(self.size)]
        self.rows_of: dict[int, object] = {}  # MPI datatype of a row by its bytes
        self.drawing: list[Handle] = [NOTHING] * len(self.channels)  # by lane

    def _channel(self, op: Op) -> Channel:
        return self.channels[op.micro % len(self.channels)]

    # ------------------------------------------------------------ sums
    def sum(self, op: Op, what: str, beside: Handle = NOTHING) -> Handle:
        """x_td += the sum over the shards of what `what` (EMBED, ATTEND, MERGE) has made of the step's rows;
        over when `beside` is, too."""
        return Chain(self._sum(op, what, beside))

    def _sum(self, op: Op, what: str, beside: Handle) -> Iterator[Handle]:
        compute, channel, m = self.compute, self._channel(op), op.micro
        with channel.lane:
            part = compute.part(m, what)
            n_j = np.array([len(share(len(part), self.size, j)) for j in range(self.size)])
            first_j, n = np.cumsum(n_j) - n_j, int(n_j[self.me])
            even_j = np.full(self.size, n)
            parts = compute.parts(m, n * self.size)
            scatter = self._exchange(op, part, parts, Plan(n_j, first_j, even_j, np.arange(self.size) * n))
        yield scatter
        with channel.lane:
            mine = compute.sum_parts(m, parts, self.size)
            gather = self._exchange(op, mine, compute.total(m, what), Plan(even_j, 0 * even_j, n_j, first_j))
        yield gather
        with channel.lane:
            compute.add_total(m, what)
        yield beside

    def _exchange(self, op: Op, send, recv, plan: Plan) -> Handle:
        """Rows to the other shards; the own ones are copied."""
        a, b, n = (int(x[self.me]) for x in (plan.first_send_r, plan.first_recv_r, plan.n_send_r))
        if n:
            self.compute.device.copy(recv[b:b + n], send[a:a + n])
        others = np.arange(self.size) != self.me
        n_send, n_recv = np.where(others, plan.n_send_r, 0), np.where(others, plan.n_recv_r, 0)
        row = self._row(recv.shape[1] * recv.dtype.itemsize)
        self.count(op, int(n_send[~self.away_j].sum()), int(n_send[self.away_j].sum()), row.Get_size(), n)
        return self.transport(self._channel(op), send, recv, plan._replace(n_send_r=n_send, n_recv_r=n_recv), row)

    def _row(self, nbytes: int):
        if nbytes not in self.rows_of:
            self.rows_of[nbytes] = exchange.row_type(nbytes)
        return self.rows_of[nbytes]

    # ------------------------------------------------------------ what the first shard tells the others
    def tell(self, op: Op, batch: Batch, token_t: np.ndarray) -> Handle:
        """A step and its rows' tokens to the other shards."""
        comm, message = self._channel(op).comm, np.concatenate([batch.header(), token_t])
        tag = TAG_STEP + 2 * op.micro
        self._count_messages(op, len(token_t), message.nbytes)
        return Handle(lambda: [comm.Isend(message, j, tag) for j in range(1, self.size)], (message,))

    def hear(self, op: Op, rows: int, pages: int) -> tuple[np.ndarray, Handle]:
        """Where `tell`'s message comes to, at most so many rows and pages: numbers for `told`."""
        comm, message = self._channel(op).comm, np.empty(header_size(rows, pages) + rows, dtype=np.int64)
        return message, Handle(lambda: [comm.Irecv(message, 0, TAG_STEP + 2 * op.micro)], (message,))

    @staticmethod
    def told(message: np.ndarray) -> tuple[Batch, np.ndarray]:
        """(step, its rows' tokens [t]) of a message that has come."""
        batch = Batch.of(message)
        first = len(batch.header())
        return batch, message[first:first + batch.rows]

    def _count_messages(self, op: Op, rows: int, nbytes: int) -> None:
        away = int(self.away_j.sum())
        self.count(op, rows * (self.size - 1 - away), rows * away, nbytes / max(rows, 1))

    # ------------------------------------------------------------ logits
    def next_tokens(self, op: Op, done: Callable) -> Handle:
        """Logits of all shards to the first, which draws from them; there, done(compute.drawn's Pending) gives a last Handle."""
        lane = op.micro % len(self.channels)
        steps = self._draw(op, done) if self.me == 0 else self._give(op)
        self.drawing[lane] = Chain(_after(self.drawing[lane], steps))  # a lane's logits have one place
        return self.drawing[lane]

    def _give(self, op: Op) -> Iterator[Handle]:
        compute, channel, m = self.compute, self._channel(op), op.micro
        with channel.lane:
            parts = compute.wanted(m)
        for part in parts:
            with channel.lane:
                logit_nv = compute.logits(m, part)
                given = exchange.send_rows(channel, channel.comm, logit_nv, 0, TAG_LOGITS + 2 * op.micro, self.direct)
            away = bool(self.away_j[0])
            self.count(op, len(logit_nv) * (not away), len(logit_nv) * away, logit_nv.nbytes / max(len(logit_nv), 1))
            yield given

    def _draw(self, op: Op, done: Callable) -> Iterator[Handle]:
        compute, channel, m = self.compute, self._channel(op), op.micro
        with channel.lane:
            parts = compute.wanted(m)
        for part in parts:
            rooms = [compute.logits_room(m, j, part.stop - part.start, self.vocab_j[j]) for j in range(1, self.size)]
            with channel.lane:
                coming = [exchange.recv_rows(channel, channel.comm, room, j, TAG_LOGITS + 2 * op.micro, self.direct)
                          for j, room in enumerate(rooms, 1)]
                own = compute.logits(m, part)
            yield from coming
            with channel.lane:
                compute.draw(m, part, [own, *rooms])
        with channel.lane:
            last = done(compute.drawn(m))
        yield last


def _after(before: Handle, steps: Iterator[Handle]) -> Iterator[Handle]:
    yield before
    yield from steps
