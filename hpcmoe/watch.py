"""A watch on progress: no rank waits for ever for one that is dead, cut off or stopped.

Neither MPI reports such a rank. So every process has two threads beside its main thread. The judge looks now and then
at what the main thread does (doing.py), and calls no MPI. Once that has waited for half of the deadline run.stall_s,
the post asks all other ranks what they do, over and over, on a communicator of its own; it also answers for this
rank, whatever the main thread does: a rank in a long product answers, one that is stopped or cut off does not. The
judge ends the job where a rank has been silent for the other half of the deadline, where one stands still, or where
all wait for one another.
"""

from __future__ import annotations

import threading
import time
from typing import Callable

from hpcmoe.doing import HERE, RUN, Status, status

ASKING = 1 / 2     # of the deadline: from then on a waiting rank asks
AGAIN = 1 / 8      # of the deadline: then it asks again
PATIENCE = 10      # deadlines that a rank may stand still outside of the rounds: files may be slow to come
SPEAK_S = 1.0      # for ranks that end the job at the same time: the first one speaks
TICK_S = 1.0       # between two looks, at most
CPU_S = 0.001      # of a core, used since the last look: the main thread does something
MOST_HOSTS = 8     # named in a message
TAG = 1
QUESTION, ANSWER, THE_END = range(3)


# ---------------------------------------------------------------- what is to be said
def verdict(me: int, silent: list[int], answers: dict[int, Status], size: int, deadline_s: float) -> str:
    """Why the job must end, or "". answers: of those that are not silent, this rank among them."""
    still = [r for r, s in answers.items() if not s.waits and s.quiet_s >= deadline_s * (1 if s.order[0] == RUN else PATIENCE)]
    if silent:
        why = f"no answer from {ranks_in_words(silent)} (dead, cut off, stopped or stuck)"
    elif still:
        why = f"{_one(min(still), answers)} stands still"
    elif len(answers) == size and all(s.waits and s.quiet_s >= deadline_s for s in answers.values()):
        why = "all ranks answer, and wait for one another"
    else:
        return ""
    earliest = min((r for r in answers if r != me and r not in still), key=lambda r: (answers[r].order, r), default=None)
    more = "" if earliest is None else f"; the earliest other one of {len(answers)} that answer: {_one(earliest, answers)}"
    return f"no progress for {deadline_s:g} s (run.stall_s): {why}; {_one(me, answers)}{more}"


def _one(rank: int, answers: dict[int, Status]) -> str:
    s = answers[rank]
    return f"rank {rank} on {HERE.host(rank)} {s.words} (since {s.quiet_s:.0f} s)"


def ranks_in_words(ranks: list[int]) -> str:
    """By host: "ranks 2-4, 7 on n1; rank 9 on n2"."""
    by_host: dict[str, list[int]] = {}
    for r in sorted(ranks):
        by_host.setdefault(HERE.host(r), []).append(r)
    words = [f"rank{'s' * (len(group) > 1)} {_spans(group)} on {host}" for host, group in by_host.items()]
    more = [f"those of {len(words) - MOST_HOSTS} more hosts"] if len(words) > MOST_HOSTS else []
    return "; ".join(words[:MOST_HOSTS] + more)


def _spans(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)


# ---------------------------------------------------------------- questions and answers
class Post:
    """Questions and answers, by a thread of its own: an MPI may let it wait, the judge goes on.

    comm: nothing else sends messages from rank to rank on it; answer: this rank's status. asking: while this is true
    the others are asked; heard: rank -> (when, its last answer); enders: ranks that said that they end the job.
    """

    def __init__(self, comm, answer: Callable[[], Status]):
        self.comm, self.answer = comm, answer
        self.others = [r for r in range(comm.size) if r != comm.rank]
        self.asking, self.closed, self.ends = False, False, False
        self.heard: dict[int, tuple[float, Status]] = {}
        self.enders: set[int] = set()
        self.asked: dict[int, float] = {}  # questions without an answer: a rank gets one at a time
        self.sending: list = []
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="post")
        self.thread.start()

    def close(self) -> None:
        """No MPI after this, if MPI lets go of the thread within a second."""
        self.closed = True
        self.wake.set()
        self.thread.join(1.0)

    def ask(self, asking: bool) -> None:
        self.asking = asking
        if asking:
            self.wake.set()

    def tell_the_end(self) -> None:
        """To all who have answered: this rank ends the job."""
        self.ends = True
        self.wake.set()

    def _run(self) -> None:
        from mpi4py import MPI
        try:
            while not self.closed:
                self._receive(MPI)
                self._ask()
                self.sending = [request for request in self.sending if not request.Test()]
                self.wake.wait(tick_s())
                self.wake.clear()
        except MPI.Exception:  # then nobody hears this rank, and it hears nobody
            pass

    def _receive(self, MPI) -> None:
        found = MPI.Status()
        while (message := self.comm.improbe(MPI.ANY_SOURCE, TAG, found)) is not None:
            source, (kind, content) = found.source, message.recv()
            if kind == QUESTION:
                self._send((ANSWER, self.answer()), source)
            elif kind == ANSWER:
                self.heard[source] = time.monotonic(), content
                self.asked.pop(source, None)
            else:
                self.enders.add(source)

    def _ask(self) -> None:
        now = time.monotonic()
        for r in self.others if self.asking else ():
            if r not in self.asked and (r not in self.heard or now - self.heard[r][0] >= AGAIN * HERE.stall_s):
                self.asked[r] = now
                self._send((QUESTION, None), r)
        if self.ends:
            self.ends = False
            for r in self.heard:
                self._send((THE_END, None), r)

    def _send(self, message: tuple, r: int) -> None:
        self.sending.append(self.comm.isend(message, r, TAG))


def tick_s() -> float:
    return min(TICK_S, max(0.02, HERE.stall_s / 20))


# ---------------------------------------------------------------- the judge
class Watch:
    """The judge of one process of several, from after MPI_Init to before MPI_Finalize.

    comm: see Post; talks: whether this MPI lets several threads call it, else nobody can be asked; end: ends this rank,
    and all others that it can reach, with a message ("": another rank speaks). To be made by the main thread.
    """

    def __init__(self, comm, talks: bool, end: Callable[[str], None]):
        self.rank, self.size, self.end, self.closed = comm.rank, comm.size, end, False
        self.cpu_clock = time.pthread_getcpuclockid(threading.main_thread().ident)
        self.seen: tuple | None = None
        self.cpu_s = 0.0
        self.moved_s = time.monotonic()
        self.since: dict[str, tuple] = {}  # "wait", "question" -> (that pair, since when)
        self.asking_since: float | None = None
        self.post = Post(comm, lambda: status(self._quiet_s(time.monotonic()))) if talks else None
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def close(self) -> None:
        """Before MPI_Finalize."""
        self.closed = True
        if self.post:
            self.post.close()

    def _run(self) -> None:
        while not self.closed:
            time.sleep(tick_s())
            now = time.monotonic()
            self._look(now)
            if self.post and self.post.enders:
                self.end("")
                return
            text = self._judge(now)
            if text:
                self._end(text)
                return

    def _look(self, now: float) -> None:
        """Notes when the main thread last went on."""
        seen = HERE.wait, HERE.phase, HERE.position()
        cpu_s = time.clock_gettime(self.cpu_clock)
        if self.seen is None or seen[0] is not self.seen[0] or seen[1:] != self.seen[1:] or (
                seen[0] is None and cpu_s - self.cpu_s > CPU_S):
            self.moved_s, self.seen, self.cpu_s = now, seen, cpu_s

    def _quiet_s(self, now: float) -> float:
        return now - self.moved_s

    def _waited_s(self, now: float) -> float:
        """How long this rank has been waiting for the same thing."""
        longest = 0.0
        for name in ("wait", "question"):
            pair = getattr(HERE, name)
            if pair is None:
                self.since.pop(name, None)
                continue
            if name not in self.since or self.since[name][0] is not pair:
                self.since[name] = pair, now
            longest = max(longest, now - self.since[name][1])
        return longest

    def _judge(self, now: float) -> str:
        """Why the job must end, or ""."""
        waited_s, post, deadline_s = self._waited_s(now), self.post, HERE.stall_s
        mine = status(self._quiet_s(now))
        if post is None:
            return "" if waited_s < deadline_s else (f"no progress for {deadline_s:g} s (run.stall_s): rank {self.rank} {mine.words}; "
                                                     "this MPI has no MPI_THREAD_MULTIPLE: no other rank could be asked")
        if waited_s < ASKING * deadline_s:
            self.asking_since = None
            post.ask(False)
            return ""
        if self.asking_since is None:
            self.asking_since = now
            post.ask(True)
        heard = {r: (at, s) for r, (at, s) in list(post.heard.items()) if at >= self.asking_since}
        silent = [r for r in post.others if now - (heard[r][0] if r in heard else self.asking_since) >= (1 - ASKING) * deadline_s]
        answers = {r: s for r, (_, s) in heard.items() if r not in silent} | {self.rank: mine}
        return verdict(self.rank, silent, answers, self.size, deadline_s)

    def _end(self, text: str) -> None:
        if self.post:
            self.post.tell_the_end()
            time.sleep(SPEAK_S)
            if any(r < self.rank for r in self.post.enders):
                text = ""
        self.end(text)
