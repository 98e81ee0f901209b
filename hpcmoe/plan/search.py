"""The search: all candidates bounded, then those clocked that could still be on the front, the most promising first.

A candidate is on the front if no other has more tokens/s per GPU at no more TPOT, or as many at less. One whose bound is already beaten
in both by an outcome cannot be on it. Whatever is clocked together is chosen before any of it is, in an order of its own: the number of
processes changes nothing but the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.plan.bound import Bound, bounds
from hpcmoe.plan.candidates import Candidate, Choices
from hpcmoe.plan.frame import Frames
from hpcmoe.plan.room import Needs, Room
from hpcmoe.plan.stand import Stand
from hpcmoe.plan.trial import Outcome, run_trial
from hpcmoe.simulate.run import Told

AT_ONCE = 8  # trials, at most, between two looks at what they rule out


class Found(NamedTuple):
    """refused: how many candidates (of "layouts ...": layouts) by why; least: of those that memory refuses, the one that lacks least, and what it
    needs; bounds: of all others; outcomes: of those that were clocked."""

    layouts: int
    refused: Counter
    least: tuple[Candidate, Needs] | None
    bounds: list[Bound]
    outcomes: list[Outcome]


class Searched(NamedTuple):
    """Of one layout with its leaders: bounds of what fits; how many memory refuses, and which of them lacks least."""

    bounds: list[Bound]
    refused: int
    least: tuple[Candidate, Needs] | None


# ---------------------------------------------------------------- in each process
class Worker:
    """What a process keeps from one piece of work to the next."""

    def __init__(self, told: Told, fixed: set[str]):
        self.stand, self.room, self.choices = Stand(told), Room(told), Choices(told, fixed)

    def bounded(self, number: int) -> Searched:
        """All candidates of a layout, by its number."""
        layout, found, refused, lacking = self.choices.layouts[number], [], 0, []
        cuts, asked = self.choices.cuts(layout), {False: [], True: []}
        for shape in self.choices.shapes(layout):
            fitting = []
            for cut in cuts:
                c = Candidate(shape, *cut)
                if not self.choices.takes_batch(c):
                    continue
                needs = self.room.needs(c)
                if needs.over > 0:
                    refused += 1
                    lacking.append((c, needs))
                else:
                    fitting.append(cut)
            if fitting:
                asked[shape.hierarchical].append((shape, fitting))
        for some in filter(None, asked.values()):
            found += bounds(self.stand, Frames(self.stand, some[0][0]), some)
        return Searched(found, refused, min(lacking, key=lambda x: (x[1].over, x[0].name), default=None))

    def tried(self, c: Candidate) -> Outcome:
        return run_trial(self.stand, c)


WORKER: Worker | None = None


def _start(told: Told, fixed: set[str]) -> None:
    """In a process of its own: signals are the first one's business, which ends the others."""
    global WORKER
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    WORKER = Worker(told, fixed)


def _bounded(number: int) -> Searched:
    return WORKER.bounded(number)


def _tried(c: Candidate) -> Outcome:
    return WORKER.tried(c)


# ---------------------------------------------------------------- the search
def search(told: Told, fixed: set[str], tpot_ms: float | None, say: Callable[[str, int, int], None], processes: int | None = None) -> Found:
    """Everything. tpot_ms: the limit that the best must keep; say(what, done, of): progress; processes: default, as many as cores."""
    choices = Choices(told, fixed)
    processes = processes or len(os.sched_getaffinity(0))
    with _pool(processes, told, fixed) as pool:
        parts = []
        for part in pool.imap(_bounded, range(len(choices.layouts))):
            parts.append(part)
            say("layouts bounded", len(parts), len(choices.layouts))
        left = [bound for part in parts for bound in part.bounds]
        refused = choices.refused + Counter({"memory": sum(part.refused for part in parts)})
        least = min((part.least for part in parts if part.least), key=lambda x: (x[1].over, x[0].name), default=None)
        outcomes = _front(left, pool, say)
        outcomes = _runner_up(left, outcomes, tpot_ms, pool, say)
    return Found(len(choices.layouts), refused, least, left, sorted(outcomes, key=order))


class _Here:
    """A pool of this process alone."""

    def __init__(self, told: Told, fixed: set[str]):
        global WORKER
        WORKER = Worker(told, fixed)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    imap = staticmethod(map)


def _pool(processes: int, told: Told, fixed: set[str]):
    return multiprocessing.get_context("fork").Pool(processes, _start, (told, fixed)) if processes > 1 else _Here(told, fixed)


def order(outcome: Outcome | Bound) -> tuple:
    """Best first: most tokens/s, least TPOT; equal ones by name."""
    return -outcome.tokens_per_s_per_gpu, outcome.tpot_ms, outcome.candidate.name


def front(outcomes: list) -> list:
    """Of outcomes, or bounds: those that none beats, fastest first."""
    found, least = [], np.inf
    for outcome in sorted(outcomes, key=order):
        if outcome.tpot_ms < least:
            found.append(outcome)
            least = outcome.tpot_ms
    return found


def _front(left: list[Bound], pool, say) -> list[Outcome]:
    """Outcomes of all that could be on the front. Those that are said to be left are many of them ruled out before their turn."""
    outcomes: list[Outcome] = []
    while left := _open(left, outcomes):
        chosen = dict.fromkeys(sorted((bound.candidate for bound in front(left)), key=lambda c: (c.micros, c.name))[:AT_ONCE])  # cheap ones first
        left = [bound for bound in left if bound.candidate not in chosen]
        for outcome in pool.imap(_tried, list(chosen)):
            outcomes.append(outcome)
            say("candidates clocked", len(outcomes), len(outcomes) + len(left))
    return outcomes


def _open(left: list[Bound], outcomes: list[Outcome]) -> list[Bound]:
    """Those whose bound no outcome beats, or equals, in both."""
    if not outcomes or not left:
        return left
    best = front(outcomes)
    tpot, tokens = np.array([o.tpot_ms for o in best[::-1]]), np.array([o.tokens_per_s_per_gpu for o in best[::-1]])
    at = np.searchsorted(tpot, [bound.tpot_ms for bound in left], side="right")  # outcomes with no more TPOT, the last is the fastest
    reached = np.concatenate([[-np.inf], tokens])[at]
    return [bound for bound, most in zip(left, reached) if bound.tokens_per_s_per_gpu > most]


def within(outcomes: list[Outcome], tpot_ms: float | None) -> list[Outcome]:
    """Those that keep the limit, best first."""
    return sorted((o for o in outcomes if tpot_ms is None or o.tpot_ms <= tpot_ms), key=order)


def split(candidate: Candidate) -> tuple[int, ...]:
    """dp, pp, ep, tp."""
    layout = candidate.shape.layout
    return layout.dp, layout.pp, layout.ep, layout.tp


def runner_up(outcomes: list[Outcome], tpot_ms: float | None) -> Outcome | None:
    """The best within the limit that has another dp, pp, ep or tp than the best."""
    best, *others = within(outcomes, tpot_ms) or [None]
    return next((o for o in others if split(o.candidate) != split(best.candidate)), None)


def _runner_up(left: list[Bound], outcomes: list[Outcome], tpot_ms: float | None, pool, say) -> list[Outcome]:
    """The outcomes, and those of all that could be the runner-up, which need not be on the front."""
    known = {o.candidate for o in outcomes}
    while best := next(iter(within(outcomes, tpot_ms)), None):
        second = runner_up(outcomes, tpot_ms)
        least = second.tokens_per_s_per_gpu if second else 0.0
        open_ = sorted((b for b in left if b.candidate not in known and b.tokens_per_s_per_gpu > least and (tpot_ms is None or b.tpot_ms <= tpot_ms)
                        and split(b.candidate) != split(best.candidate)), key=order)[:AT_ONCE]
        if not open_:
            break
        outcomes = outcomes + list(pool.imap(_tried, [bound.candidate for bound in open_]))
        known |= {bound.candidate for bound in open_}
        say("candidates clocked", len(outcomes), len(outcomes))
    return outcomes
