"""The list from which requests are handed out, and how large the shares are (handout.py says why)."""

from __future__ import annotations

from collections import deque
from itertools import islice

from hpcmoe.compute.step import Work
from hpcmoe.parallel import plan
from hpcmoe.parallel.plan import Room

START = 0.5  # of the list's tokens, at most, are dealt before the run when there are several replicas


class RequestList:
    """The requests that no leader has, longest first. tokens: theirs, prompts and longest outputs."""

    def __init__(self, works: list[Work], leaders: int):
        self.left = deque(sorted(works, key=lambda w: (-w.most_tokens, w.index)))
        self.tokens, self.leaders = sum(w.most_tokens for w in works), leaders

    def start(self, room: Room | None) -> list[list[Work]]:
        """Shares of all leaders, each with this room; None: everything is dealt."""
        if room is None:
            return plan.hand_out(self._take(len(self.left)), self.leaders)
        enough = min(START * self.tokens, self.leaders * room.tokens)
        count = tokens = 0
        for work in islice(self.left, self.leaders * room.sequences):
            if count >= self.leaders and tokens + work.most_tokens > enough:
                break
            count, tokens = count + 1, tokens + work.most_tokens
        return plan.hand_out(self._take(count), self.leaders)

    def share(self, room: Room) -> list[Work]:
        """The share of a leader that asks: at least one request while there are any."""
        most = min(self.tokens / (2 * self.leaders), room.tokens)
        count = tokens = 0
        for work in islice(self.left, max(1, room.sequences)):
            if count and tokens + work.most_tokens > most:
                break
            count, tokens = count + 1, tokens + work.most_tokens
        return self._take(count)

    def _take(self, count: int) -> list[Work]:
        taken = [self.left.popleft() for _ in range(count)]
        self.tokens -= sum(w.most_tokens for w in taken)
        return taken
