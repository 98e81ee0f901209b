"""The node-aware exchange: a row crosses to a node once, however many of its experts live there; one row comes back.

A leader sends a row to a forwarder on each other node that holds any of its experts (a parcel, nodes.py);
the choices and weights that concern that node go ahead of it. The forwarder hands rows on to the ranks of its
node, its own rows as a leader among them. On the way back it adds the weighted rows of a parcel in the
order of choices and returns the sum. The leader adds the choices of its own node in their order, then
the sums of other nodes in the order of nodes: the same bits at every repetition. What is done to rows
between messages is Compute's (relay.py): here are numbers of rows, and messages.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

import numpy as np

from hpcmoe.compute.base import Compute, Pending, RelaySizes, Sizes
from hpcmoe.compute.relay import Chosen, Relay, rows_as_bytes
from hpcmoe.config import RouterConfig
from hpcmoe.parallel import exchange
from hpcmoe.parallel.exchange import Channel, Plan
from hpcmoe.parallel.flat import Exchange, FlatExchange, Flags
from hpcmoe.parallel.handle import Chain, Handle, Together
from hpcmoe.parallel.nodes import Nodes, Parcels, parcels, way
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.world import World
from hpcmoe.parallel.window import Mates, Messages, open_window
from hpcmoe.report.record import RankRecord

HIERARCHICAL = "hierarchical"
TAG_COUNTS, TAG_MATES, TAG_HEADS = 1, 2, 3  # transports use 0, window.py those after


class Flight:
    """One micro-batch's rows on their way through a layer.

    As leader: chosen, parcels; as forwarder: parcels of each sender, and their heads (experts and the bits of weights,
    int32 [2, j, k]); plan: of rows between nodes; n_qq: rows handed on from each mate to each.
    """

    chosen: Chosen | None = None
    parcels: Parcels | None = None
    n_parcels_r: dict[int, int]
    heads: list[np.ndarray]
    plan: Plan
    counts_in: np.ndarray
    n_qq: np.ndarray
    y_sd: Any = None


class HierarchicalExchange(Exchange):
    """Rows by way of a forwarder on each node, in messages between two ranks."""

    def __init__(self, world: World, compute: Compute, channels: list[Channel], record: RankRecord, router: RouterConfig, sizes: Sizes):
        super().__init__(world, compute, channels, record, router)
        self.nodes = nodes = Nodes(world.node_r, self.me)
        self.senders = nodes.senders(world.leaders)
        self.node_e = nodes.number_r[self.owner_e]
        self.here_e = np.flatnonzero(self.node_e == nodes.here)
        self.key_e = self.owner_e * self.most_experts + self.column_e
        self.mate_e = np.searchsorted(nodes.mates, self.owner_e[self.here_e])  # of each expert of this node
        self.choices, self.me_q = router.top_k, nodes.mates.index(self.me)
        self.transport = exchange.TRANSPORTS["pairwise" if world.direct else "staged"]
        self.window = None
        if self.device.in_host_memory:
            self.window = open_window(world.node_comm(), len(channels), self._most_bytes(world, sizes), world.ranks_on_node)
        self.out, self.back = ([self._mates(lane, direction) for lane in range(len(channels))] for direction in (0, 1))
        self.flights = [Flight() for _ in range(sizes.micros)]

    def _most_bytes(self, world: World, sizes: Sizes) -> int:
        """Of the rows that this rank can get from its mates: as expert, and back as leader and forwarder."""
        to_expert = len(world.leaders) * sizes.rows * min(self.choices, self.most_experts) * self.compute.send_width
        back = (1 + len(self.senders)) * sizes.rows * min(self.choices, len(self.here_e)) * self.compute.back_width
        return max(to_expert, back)

    def _mates(self, lane: int, direction: int) -> Mates | Messages:
        """Rows between the ranks of this node, out (0) or back (1)."""
        channel, mates = self.channels[lane], self.nodes.mates
        if self.window:
            return Mates(channel, mates, self.me_q, self.window, lane, direction)
        return Messages(channel, mates, self.me_q, self.transport, (self.send_row, self.back_row)[direction])

    def close(self) -> None:
        if self.window:
            for mates in (*self.out, *self.back):
                mates.parts = []
            self.window.close()

    # ------------------------------------------------------------ counts
    def counts(self, op: Op, routed: Pending | None, flags: Callable[[], Flags]) -> Handle:
        event = routed.event if routed is not None else self.device.event().record()
        return Chain(self._counts(op, routed, flags), after=event)

    def _counts(self, op: Op, routed: Pending | None, flags: Callable[[], Flags]) -> Iterator[Handle]:
        """To forwarders: parcels, flags, rows of each expert of their node. Then, to mates: what they will get from here."""
        flight, comm = self.flights[op.micro], self.channel(op).comm
        mine, n_here_e = np.array(flags()), np.zeros(len(self.here_e), dtype=np.int64)
        coming = {r: np.empty(1 + len(mine) + len(self.here_e), dtype=np.int32) for r in self.senders}
        requests, messages = [comm.Irecv(message, r, TAG_COUNTS) for r, message in coming.items()], []
        if routed is not None:
            n_send_e, = routed.read()
            n_here_e = n_send_e[self.here_e]
            flight.chosen = self.compute.chosen(op.micro)
            flight.parcels = parcels(flight.chosen.expert_tk, flight.chosen.weight_tk, self.node_e, self.nodes)
            for node in self.nodes.others:
                messages.append(np.concatenate([[flight.parcels.n_send_n[node]], mine, n_send_e[self.node_e == node]]).astype(np.int32))
                self.record.count(op, inter=1, row_bytes=messages[-1].nbytes)
                requests.append(comm.Isend(messages[-1], self.nodes.forwarder(self.me, node), TAG_COUNTS))
        yield Handle(lambda: requests, (coming, messages))
        flight.n_parcels_r = {r: int(message[0]) for r, message in coming.items()}
        total = np.concatenate([mine, n_here_e]) + sum(message[1:].astype(np.int64) for message in coming.values())
        heads = self._heads(comm, flight)
        yield self._tell_mates(op, flight, total[:len(mine)], total[len(mine):])
        yield heads

    def _heads(self, comm, flight: Flight) -> Handle:
        """Experts and weights of parcels, ahead of their rows: one message per node."""
        flight.heads, out = [np.empty((2, n, self.choices), dtype=np.int32) for n in flight.n_parcels_r.values()], []
        requests = [comm.Irecv(head, r, TAG_HEADS) for r, head in zip(flight.n_parcels_r, flight.heads) if head.size]
        for node, block in flight.parcels.blocks() if flight.parcels is not None else []:
            out.append(np.stack([flight.parcels.expert_uk[block], flight.parcels.weight_uk[block].view(np.int32)]))
            requests.append(comm.Isend(out[-1], self.nodes.forwarder(self.me, node), TAG_HEADS))
        return Handle(lambda: requests, (out,))

    def _tell_mates(self, op: Op, flight: Flight, flags: np.ndarray, n_here_e: np.ndarray) -> Handle:
        """To each mate: rows of each of its experts, the flags, and how many rows every mate gets from here."""
        comm, mates, most = self.channel(op).comm, self.nodes.mates, self.most_experts
        out = np.zeros((len(mates), most + len(flags) + len(mates)), dtype=np.int32)
        out[self.mate_e, self.column_e[self.here_e]] = n_here_e
        out[:, most + len(flags):] = out[:, :most].sum(axis=1)
        out[:, most:most + len(flags)] = flags
        flight.counts_in = out.copy()  # the own row stays
        others = [(q, r) for q, r in enumerate(mates) if q != self.me_q]
        self.record.count(op, intra=len(others), row_bytes=out[0].nbytes)
        return Handle(lambda: [comm.Irecv(flight.counts_in[q], r, TAG_MATES) for q, r in others] +
                              [comm.Isend(out[q], r, TAG_MATES) for q, r in others], (out,))

    def arrived(self, op: Op) -> tuple[np.ndarray, Flags]:
        flight = self.flights[op.micro]
        n_recv_qe, flags_q, flight.n_qq = np.split(flight.counts_in.astype(np.int64),
                                                   [self.most_experts, self.most_experts + len(Flags._fields)], axis=1)
        return n_recv_qe[:, :self.experts], Flags(*map(int, flags_q.sum(axis=0)))

    # ------------------------------------------------------------ dispatch
    def dispatch(self, op: Op) -> tuple[Any, Handle | None]:
        flight, mates, relay = self.flights[op.micro], self.out[op.micro % len(self.out)], self.compute.relay(op.micro)
        expert_jk, weight_jk = np.concatenate([np.zeros((2, 0, self.choices), dtype=np.int32), *flight.heads], axis=1)
        relay.begin(flight.chosen, way(flight.chosen, flight.parcels, expert_jk, weight_jk.view(np.float32),
                                       self.node_e == self.nodes.here, self.key_e))
        flight.plan = self._plan(flight)
        memory = mates.memory(flight.n_qq, self.compute.send_width)
        if memory is None:
            x_id = self.compute.incoming(op.micro, int(flight.n_qq[:, self.me_q].sum()))
        else:
            x_id = _like(memory, self.compute.incoming(op.micro, 0))
        return x_id, Chain(self._dispatch(op, mates, relay, x_id), (x_id,))

    def _dispatch(self, op: Op, mates: Mates | Messages, relay: Relay, x_id) -> Iterator[Handle]:
        """Parcels to forwarders; then rows to mates."""
        flight, channel = self.flights[op.micro], self.channel(op)
        with channel.lane:
            # Booked with their heads: an expert and a weight for each choice.
            self.record.count(op, inter=int(flight.plan.n_send_r.sum()), row_bytes=self.compute.send_width + 8 * self.choices)
            crossing = self.transport(channel, relay.parcels_out(), relay.parcels_in(), flight.plan, self.send_row)
        yield crossing
        with channel.lane:
            self._count_mates(op, flight.n_qq, self.compute.send_width)
            handed = mates.move(flight.n_qq, relay.hand_on, x_id)
        yield handed

    def _plan(self, flight: Flight) -> Plan:
        """Parcels: to the forwarders of other nodes, in the order of nodes; from senders, in theirs."""
        n_send_r, first_send_r, n_recv_r, first_recv_r = np.zeros((4, self.size), dtype=np.int64)
        for node, block in flight.parcels.blocks() if flight.parcels is not None else []:
            r = self.nodes.forwarder(self.me, node)
            n_send_r[r], first_send_r[r] = block.stop - block.start, block.start
        for r, n in flight.n_parcels_r.items():
            n_recv_r[r], first_recv_r[r] = n, n_recv_r.sum()
        return Plan(n_send_r, first_send_r, n_recv_r, first_recv_r)

    def _count_mates(self, op: Op, n_qq: np.ndarray, width: int) -> None:
        own = int(n_qq[self.me_q, self.me_q])
        self.record.count(op, intra=int(n_qq[self.me_q].sum()) - own, row_bytes=width, own=own)

    # ------------------------------------------------------------ combine
    def combine(self, op: Op, y_id) -> Handle | None:
        flight, mates, relay = self.flights[op.micro], self.back[op.micro % len(self.back)], self.compute.relay(op.micro)
        memory = mates.memory(flight.n_qq.T, self.compute.back_width)
        if memory is None:
            flight.y_sd = relay.handed(int(flight.n_qq[self.me_q].sum()))
        else:
            flight.y_sd = _like(memory, relay.handed(0))
        return Chain(self._combine(op, mates, relay, y_id), (y_id,))

    def _combine(self, op: Op, mates: Mates | Messages, relay: Relay, y_id) -> Iterator[Handle]:
        """Rows back to the forwarders, then sums back to the leaders."""
        flight, channel, plan = self.flights[op.micro], self.channel(op), self.flights[op.micro].plan.back()

        def standing(part: slice, out: np.ndarray | None = None):
            if out is None:
                return y_id[part]
            out[:] = rows_as_bytes(y_id)[part]
            return out

        with channel.lane:  # sums may come while rows are still on their way here
            sums_ud = relay.sums_in()
            coming = self.transport(channel, sums_ud[:0], sums_ud, plan._replace(n_send_r=0 * plan.n_send_r), self.back_row)
            self._count_mates(op, flight.n_qq.T, self.compute.back_width)
            handed = mates.move(flight.n_qq.T, standing, flight.y_sd)
        yield Together(handed, beside=(coming,))
        with channel.lane:
            self.record.count(op, inter=int(plan.n_send_r.sum()), row_bytes=self.compute.back_width)
            sums_jd = relay.sums_out(flight.y_sd)
            leaving = self.transport(channel, sums_jd, sums_jd[:0], plan._replace(n_recv_r=0 * plan.n_recv_r), self.back_row)
        yield Together(leaving, coming)  # neither side sends before the other receives

    def merge(self, op: Op) -> None:
        """The choices of the own node in their order, then the sums of the others in the order of nodes."""
        self.compute.merge_terms(op.micro, self.compute.relay(op.micro).terms(self.flights[op.micro].y_sd))


def relay_sizes(world: World, router: RouterConfig, rows: int) -> RelaySizes:
    """Most rows of this rank; rows: of a step of a leader."""
    nodes = Nodes(world.node_r, world.here.place)
    senders, leads = len(nodes.senders(world.leaders)), int(world.leader is not None)
    here = int(np.isin(world.layout.owner_of_slot(router.experts), nodes.mates).sum())
    return RelaySizes(senders * rows, leads * rows * min(router.top_k, len(nodes.others)),
                      (leads + senders) * rows * min(router.top_k, here))


def open_exchange(world: World, compute: Compute, channels: list[Channel], record: RankRecord, router: RouterConfig,
                  sizes: Sizes) -> Exchange:
    """The exchange that world.transport names."""
    kind = HierarchicalExchange if world.transport == HIERARCHICAL else FlatExchange
    return kind(world, compute, channels, record, router, sizes)


def _like(memory: np.ndarray, rows) -> np.ndarray:
    """Bytes of rows, as rows of the type and width of others: a view."""
    return memory.reshape(-1).view(rows.dtype).reshape(len(memory), rows.shape[1])
