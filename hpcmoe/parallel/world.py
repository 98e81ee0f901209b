"""The communicators of a run, who leads, and agreement on errors. Nothing else makes communicators."""

from __future__ import annotations

import os
import time
from array import array
from typing import Callable

from mpi4py import MPI

from hpcmoe.doing import waits
from hpcmoe.errors import AgreedError, UserError
from hpcmoe.parallel.layout import Layout


def agree(comm, func: Callable, *args):
    """func(*args) on every rank; if any of them raises UserError, all raise AgreedError with its text."""
    result, error = None, None
    try:
        result = func(*args)
    except UserError as caught:
        error = str(caught)
    errors = comm.allgather(error)
    bad = [(rank, text) for rank, text in enumerate(errors) if text]
    if bad:
        rank, text = bad[0]
        raise AgreedError(text if len(bad) == comm.size else f"{text} (on rank {rank}" +
                          (f" and {len(bad) - 1} more)" if len(bad) > 1 else ")"))
    return result


def on_root(comm, func: Callable, *args):
    """func(*args) on rank 0, its result on all ranks; a UserError becomes an AgreedError everywhere."""
    result, error = None, None
    if comm.rank == 0:
        try:
            result = func(*args)
        except UserError as caught:
            error = str(caught)
    result, error = comm.bcast((result, error))
    if error is not None:
        raise AgreedError(error)
    return result


def node_names(comm) -> list[str]:
    """The host of each rank. HPCMOE_RANKS_PER_NODE=n pretends that each n ranks are a node."""
    pretend = os.environ.get("HPCMOE_RANKS_PER_NODE", "")
    if pretend:
        if not pretend.isdecimal() or int(pretend) < 1:
            raise UserError(f"environment: HPCMOE_RANKS_PER_NODE = {pretend!r}: expected a number >= 1")
        name = f"{MPI.Get_processor_name()}/{comm.rank // int(pretend)}"
    else:
        name = MPI.Get_processor_name()
    return comm.allgather(name)


class World:
    """This rank's place in the layout and its communicators.

    lanes: one communicator per lane over the ranks of the stage with this rank's shard, ordered by place: they
    exchange rows; shards: one per lane over the tensor shards of this rank's place, which sum what they make; pipe: the
    replica's ranks, in order; moving: as a lane, for weights on their way, where the run moves any. hosts: the node of each rank; node_r: node number of each place of the stage.
    leaders: the places that lead, the same number in every stage; leader: this rank's place among
    them, or None; counterpart: the rank in `pipe` of this leader's fellow in each stage, of the same shard.
    transport: the name of the one chosen for rows; flat: that of the one for messages between any two ranks;
    direct: rows go from stage to stage without a copy on the host.
    """

    def __init__(self, comm, layout: Layout, lanes: int, hosts: list[str], moving: bool = False):
        self.comm, self.layout = comm, layout
        self.rank = comm.rank
        self.transport, self.flat, self.direct = "", "", True
        self.here = layout.place(comm.rank)
        self.hosts = hosts
        number = {host: node for node, host in enumerate(dict.fromkeys(self.hosts))}
        self.node_of_rank = [number[host] for host in self.hosts]
        self.pipe = comm.Split(self.here.dp, comm.rank)
        here = self.here
        self.lanes = _copies(self.pipe.Split(here.stage * layout.tp + here.shard, here.place), lanes)
        self.moving = self.lanes[0].Dup() if moving else None
        self.shards = _copies(self.pipe.Split(here.stage * layout.ep + here.place, here.shard), lanes)
        self.node_r = [self.node_of_rank[r] for r in layout.column(here.dp, here.stage, here.shard)]
        self.leaders = layout.leader_places(self.node_of_rank, here.dp)[here.stage]
        self.leader = self.leaders.index(self.here.place) if self.here.place in self.leaders else None
        table = self.pipe.allgather((here.stage, self.leader, here.shard))
        self.counterpart = {s: r for r, (s, *fellow) in enumerate(table)
                            if self.leader is not None and fellow == [self.leader, here.shard]}

    def node_comm(self):
        """The ranks of this stage on this node, by place; None where MPI says that they share no memory. Collective over the stage."""
        mates = self.lanes[0].Split(self.node_r[self.here.place], self.here.place)
        sharing = mates.Split_type(MPI.COMM_TYPE_SHARED)
        whole = mates.allreduce(sharing.size == mates.size, MPI.LAND)
        sharing.Free()
        return mates if whole else None

    def keep_lanes(self, count: int) -> None:
        """Gives back the communicators of all lanes but the first `count`. Collective."""
        for comms in (self.lanes, self.shards):
            while len(comms) > count:
                comms.pop().Free()

    @property
    def ranks_on_node(self) -> int:
        return self.hosts.count(self.hosts[self.rank])

    @property
    def first_stage(self) -> bool:
        return self.here.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.here.stage == self.layout.pp - 1


def _copies(comm, count: int) -> list:
    """The communicator and copies of it, `count` in all."""
    return [comm] + [comm.Dup() for _ in range(count - 1)]


class Tally:
    """Progress of all replicas on rank 0: the first rank of each other replica tells it now and then, unasked."""

    TAG, EVERY_S = 9, 0.5

    def __init__(self, world: World):
        self.world, self.comm = world, world.comm
        self.speaks = world.here.dp > 0 and world.pipe.rank == 0
        self.others = {dp: (0, 0) for dp in range(1, world.layout.dp)}
        self.next_s, self.sent, self.mine = 0.0, None, (0, 0)

    def update(self, done: int, tokens: int, now: float) -> tuple[int, int]:
        """This replica's requests finished and tokens made; returns the sums that are known here."""
        self.mine = (done, tokens)
        if self.speaks and now >= self.next_s and (self.sent is None or self.sent.Test()):
            self.next_s = now + self.EVERY_S
            self._speak()
        if self.comm.rank == 0 and self.others:
            self._listen()
        return done + sum(d for d, _ in self.others.values()), tokens + sum(t for _, t in self.others.values())

    def all_done(self, update: Callable[[], None]) -> None:
        """Collective: returns when all replicas are done; rank 0 calls `update` meanwhile and hears the others out."""
        if self.speaks:
            with waits("rank 0 to hear that a replica is done"):
                if self.sent is not None:
                    self.sent.Wait()
                self._speak()
                self.sent.Wait()  # received, since it is a synchronous send
        with waits("the other replicas"):
            barrier = self.comm.Ibarrier()
            while not barrier.Test():
                if self.comm.rank == 0:
                    update()  # elsewhere it might speak once more, and rank 0 have left
                time.sleep(0.001)

    def _speak(self) -> None:
        self.message = array("q", [self.world.here.dp, *self.mine])
        self.sent = self.comm.Issend(self.message, 0, self.TAG)

    def _listen(self) -> None:
        message = array("q", [0, 0, 0])
        while self.comm.Iprobe(MPI.ANY_SOURCE, self.TAG):
            self.comm.Recv(message, MPI.ANY_SOURCE, self.TAG)
            self.others[message[0]] = (message[1], message[2])
