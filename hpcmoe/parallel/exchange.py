"""Moving rows between the ranks of a stage: interchangeable transports, on host or device buffers.

Counts are in rows; a committed MPI datatype carries the width and type of a row. A rank's own rows
never pass through MPI: callers give their own place a count of 0 and copy. A transport is called
on the lane whose work made `send`; it posts when that work is done.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from hpcmoe.compute.step import ROWS
from hpcmoe.device import Device, Event, Lane, address
from hpcmoe.parallel.handle import Handle
from hpcmoe.parallel.plan import STAGED_BYTES

TAG = 0  # of rows between two ranks
NO_ROWS = np.zeros(2, np.uint8)  # two addresses


class Plan(NamedTuple):
    """Rows to and from each place of the stage: counts, and the row at which each block starts."""

    n_send_r: np.ndarray
    first_send_r: np.ndarray
    n_recv_r: np.ndarray
    first_recv_r: np.ndarray

    @classmethod
    def of(cls, n_send_r, n_recv_r, me: int) -> "Plan":
        """The plan in which the own block keeps its place and travels by copy (count 0)."""
        first_send_r, first_recv_r = np.cumsum(n_send_r) - n_send_r, np.cumsum(n_recv_r) - n_recv_r
        n_send_r, n_recv_r = n_send_r.copy(), n_recv_r.copy()
        n_send_r[me] = n_recv_r[me] = 0
        return cls(n_send_r, first_send_r, n_recv_r, first_recv_r)

    def back(self) -> "Plan":
        """The same rows on their way back."""
        return Plan(self.n_recv_r, self.first_recv_r, self.n_send_r, self.first_send_r)


class Channel:
    """What a lane's exchanges go through: its communicator, its device and stream, host memory for `staged`.

    copies: a second stream, for copies that must not wait for the lane's arithmetic.
    """

    def __init__(self, comm, device: Device, lane: Lane):
        self.comm, self.device, self.lane = comm, device, lane
        self.copies = device.lane()
        self._host: dict[str, np.ndarray] = {}
        self._outgrown: list[np.ndarray] = []  # copies out of them may still be queued
        self.turn = 0
        self.emptied = [Event(), Event()]  # of the two halves of host memory that `staged` receives into

    def host(self, name: str, nbytes: int) -> np.ndarray:
        """Pinned bytes, kept and grown: one user of a name at a time."""
        if name not in self._host or len(self._host[name]) < nbytes:
            self._outgrown += [self._host[name]] if name in self._host else []
            self._host[name] = self.device.pinned(max(nbytes, 4096) * 5 // 4, np.uint8)
        return self._host[name][:nbytes]


def buffer(array):
    """An array as MPI takes it: device arrays by their address."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    return MPI.buffer.fromaddress(address(array), array.nbytes)


# ---------------------------------------------------------------- transports
def ialltoallv(channel: Channel, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """One MPI_Ialltoallv (MPI 4.1, section 6.12.6) on the buffers themselves.

    A side without rows has an address of its own: Open MPI (5.0.7, 5.0.11) takes equal addresses for MPI_IN_PLACE, and
    an empty part of the other side's buffer would have the same one.
    """
    def post() -> list:
        outgoing = buffer(send) if plan.n_send_r.any() else NO_ROWS[:1]
        incoming = buffer(recv) if plan.n_recv_r.any() else NO_ROWS[1:]
        return [channel.comm.Ialltoallv([outgoing, (plan.n_send_r, plan.first_send_r), row],
                                        [incoming, (plan.n_recv_r, plan.first_recv_r), row])]

    return Handle(post, (send, recv), after=channel.device.event().record())


def pairwise(channel: Channel, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """Isend and Irecv with each peer that has rows, nearest higher place first."""
    def post() -> list:
        comm, width, requests = channel.comm, row.Get_size(), []
        send_bytes, recv_bytes = buffer(send), buffer(recv)
        for shift in range(1, comm.size):
            source, target = (comm.rank - shift) % comm.size, (comm.rank + shift) % comm.size
            n, first = int(plan.n_recv_r[source]), int(plan.first_recv_r[source])
            if n:
                requests.append(comm.Irecv([recv_bytes[first * width:(first + n) * width], n, row], source, TAG))
            n, first = int(plan.n_send_r[target]), int(plan.first_send_r[target])
            if n:
                requests.append(comm.Isend([send_bytes[first * width:(first + n) * width], n, row], target, TAG))
        return requests

    return Handle(post, (send, recv), after=channel.device.event().record())


class Staged(Handle):
    """Rows through pinned host memory, by chunks: one is on the network while the next is being copied.

    For an MPI that cannot read the buffers where they are. A chunk leaves when its copy to the host is
    done, and is copied to the device when it has come. Exchanges receive into two halves by turns: one
    may still be on its way to the device when the next exchange begins.
    """

    def __init__(self, channel: Channel, send, recv, plan: Plan, row: MPI.Datatype):
        self.channel, self.width = channel, row.Get_size()
        self.send, self.recv = (a.reshape(-1).view(np.uint8) for a in (send, recv))
        self.half = channel.turn = 1 - channel.turn
        self.send_host = channel.host("send", self.send.nbytes)
        self.recv_host = channel.host(f"recv {self.half}", self.recv.nbytes)
        comm = channel.comm
        peers = [(comm.rank + shift) % comm.size for shift in range(1, comm.size)]
        self.wanted = [(peer, part) for peer in reversed(peers)
                       for part in self._parts(plan.first_recv_r[peer], plan.n_recv_r[peer])]
        self.coming: list = []
        start = channel.device.event().record()
        self.leaving, self.sends = [], []
        with channel.copies:
            channel.copies.after(start)
            for peer in peers:
                for part in self._parts(plan.first_send_r[peer], plan.n_send_r[peer]):
                    channel.device.copy(self.send_host[part], self.send[part])
                    self.leaving.append((channel.device.event().record(), part, peer))
        super().__init__(keep=(send, recv), after=channel.emptied[self.half])

    def start(self) -> bool:
        """Posts what can be: all receives, and chunks that are on the host. Whether everything is posted."""
        begin = time.monotonic()
        if self.wanted and self.after.done:
            self.coming = [(self.channel.comm.Irecv(self.recv_host[part], peer, TAG), part) for peer, part in self.wanted]
            self.wanted = []
        while self.leaving and self.leaving[0][0].done:
            _, part, peer = self.leaving.pop(0)
            self.sends.append(self.channel.comm.Isend(self.send_host[part], peer, TAG))
        self.post_s += time.monotonic() - begin
        return self.posted

    @property
    def posted(self) -> bool:
        return not self.wanted and not self.leaving

    def _parts(self, first: int, n: int) -> list[slice]:
        """Byte ranges of at most STAGED_BYTES of rows first to first + n."""
        a, b = int(first) * self.width, int(first + n) * self.width
        return [slice(x, min(x + STAGED_BYTES, b)) for x in range(a, b, STAGED_BYTES)]

    def test(self) -> bool:
        if self.over:
            return True
        self.start()
        waiting = []
        with self.channel.copies:
            for request, part in self.coming:
                if request.Test():
                    self.channel.device.copy(self.recv[part], self.recv_host[part])
                else:
                    waiting.append((request, part))
            self.coming = waiting
            if self.wanted or self.coming or self.leaving or not MPI.Request.Testall(self.sends):
                return False
            self.channel.emptied[self.half] = arrived = self.channel.device.event().record()
        self.channel.lane.after(arrived)
        self.over = True
        return True


def staged(channel: Channel, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """Through host memory: see Staged."""
    return Staged(channel, send, recv, plan, row)


TRANSPORTS = {"ialltoallv": ialltoallv, "pairwise": pairwise, "staged": staged}


def row_type(nbytes: int) -> MPI.Datatype:
    """A committed datatype of one row of so many bytes."""
    return MPI.BYTE.Create_contiguous(nbytes).Commit()


# ---------------------------------------------------------------- from one rank to another
def send_rows(channel: Channel, comm, array, target: int, tag: int, direct: bool, header: np.ndarray | None = None) -> Handle:
    """An array to another rank, and the host's `header`, if there is one, with tag - 1.

    direct: MPI reads device memory; else the rows go through the host.
    """
    source = array
    if not direct:
        source = channel.host(f"out {tag}", array.nbytes)
        channel.device.copy(source, array)

    def post() -> list:
        before = [comm.Isend(header, target, tag - 1)] if header is not None else []
        return before + [comm.Isend(buffer(source), target, tag)]

    return Handle(post, (header, array, source), after=channel.device.event().record())


def recv_rows(channel: Channel, comm, array, source: int, tag: int, direct: bool, header: np.ndarray | None = None) -> Handle:
    """What `send_rows` sent: into an array and a header (Batch.header) that may be longer."""
    target = array if direct else channel.host(f"in {tag} {source}", array.nbytes)

    def post() -> list:
        before = [comm.Irecv(header, source, tag - 1)] if header is not None else []
        return before + [comm.Irecv(buffer(target), source, tag)]

    def finish() -> None:
        if not direct:
            rows = array if header is None else array[:int(header[ROWS])]  # room for a prompt, a step of decode has few
            with channel.lane:
                channel.device.copy(rows, target[:rows.nbytes])

    # What came before may still be read by queued work.
    return Handle(post, (header, array, target), finish, after=channel.device.event().record())
