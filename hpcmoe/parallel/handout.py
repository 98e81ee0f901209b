"""Requests are handed out while the run goes on: rank 0 keeps the list, leaders of stage 0 ask for more before they run dry.

At the start each leader gets a share, the longest requests first, each to the leader with the least work: as many as
the leaders have places for, and with several replicas at most half of the work. A share given later is the longest
requests left, of together at most 1 / (2 x leaders) of the tokens left, and at least one: guided self-scheduling
(Polychronopoulos & Kuck, IEEE Transactions on Computers C-36(12), 1987), which gives 1 / leaders, halved, since a
request's tokens are only a bound of its work, as in factoring (Hummel, Schonberg & Flynn, CACM 35(8), 1992). Shares
shrink with the list, and the shortest requests come last, so replicas end almost together. A single replica gets
all at the start: its leaders do every step together, none can be ahead of the others.

Nothing here waits: rank 0 answers between its rounds, a leader looks for the answer when it builds a step.
"""

from __future__ import annotations

from array import array

from mpi4py import MPI

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.step import Work
from hpcmoe.doing import HERE, waits
from hpcmoe.parallel import plan
from hpcmoe.parallel.plan import Room
from hpcmoe.parallel.requestlist import RequestList

TAG_ASK, TAG_SHARE = 10, 11  # beside Tally.TAG on the same communicator


class Supply:
    """A leader's side: asks rank 0 for requests, one question at a time.

    open: more may come; it stays false once it is.
    """

    def __init__(self, comm, more: bool):
        self.comm, self.open = comm, more
        self.question: MPI.Request | None = None  # unanswered
        self.answer: MPI.Request | None = None  # on its way

    def take(self) -> list[Work]:
        """What has come since the last call."""
        if self.question is None:
            return []
        if self.answer is None:
            message = self.comm.improbe(0, TAG_SHARE)
            self.answer = message.irecv() if message is not None else None
        arrived, content = self.answer.test() if self.answer is not None else (False, None)
        if not arrived:
            return []
        self.question.Wait()  # it was received, or there were no answer
        self.question = self.answer = HERE.question = None
        works, self.open = content
        return works

    @property
    def may_ask(self) -> bool:
        return self.open and self.question is None

    def ask(self, room: Room) -> None:
        """Asks for more if there is room."""
        if min(room) > 0:
            self.message, HERE.question = array("q", room), ("more requests from rank 0", None)
            self.question = self.comm.Isend(self.message, 0, TAG_ASK)


class HandOut:
    """One rank's part in handing requests out. works: of all requests, on rank 0; asks: whether this rank has a batcher.

    Collective. most: requests that a leader would get if all were dealt at once; total: requests (on rank 0).
    """

    def __init__(self, comm, works: list[Work] | None, asks: bool, replicas: int):
        self.comm, self.replicas = comm, replicas
        self.asks = comm.gather(asks)
        self.supply: Supply | None = None
        self.sending: list[MPI.Request] = []
        self.total = most = 0
        if comm.rank == 0:
            leaders = sum(self.asks)
            self.todo, self.total = RequestList(works, leaders), len(works)
            most = max(len(part) for part in plan.hand_out(works, leaders))
        self.most = comm.bcast(most)

    def start(self, sizes: Sizes) -> list[Work]:
        """Collective: this rank's first share, and its supply if it asks."""
        parts = None
        if self.comm.rank == 0:
            shares = iter(self.todo.start(Room.of(sizes) if self.replicas > 1 else None))
            more = bool(self.todo.left)
            parts = [(next(shares), more) if asks else None for asks in self.asks]
        part = self.comm.scatter(parts)
        if part is None:
            return []
        works, more = part
        self.supply = Supply(self.comm, more)
        return works

    def serve(self) -> None:
        """Rank 0 answers the questions that have come; nothing on other ranks."""
        if self.comm.rank or self.replicas == 1:
            return
        status, room = MPI.Status(), array("q", [0, 0])
        while self.comm.Iprobe(MPI.ANY_SOURCE, TAG_ASK, status):
            leader = status.Get_source()
            self.comm.Recv(room, leader, TAG_ASK)
            works = self.todo.share(Room(*room))
            self.sending.append(self.comm.isend((works, bool(self.todo.left)), leader, TAG_SHARE))
        self.sending = [request for request in self.sending if not request.Test()]

    def close(self) -> None:
        """After all replicas are done: every answer has been taken."""
        with waits("answers for requests to be taken"):
            for request in self.sending:
                request.Wait()
