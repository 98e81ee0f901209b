"""How far a run is: a live bar on a terminal, a plain line now and then in a batch job's log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Callable, TextIO

_REDRAW_S = 0.1     # a terminal is not redrawn more often
_WINDOW_S = 10.0    # tokens/s is that of the last so many seconds
_BAR_WIDTH = 24


class Progress:
    """Progress of one run. Use it on rank 0 alone; with `quiet` it does nothing.

    total: items to do; every_s: seconds between lines where the stream is no terminal;
    total_tokens: an estimate of all tokens (0: none), which gives the time left before the first
    item is done; clock: seconds, for tests.
    """

    def __init__(self, total: int, unit: str = "requests", stream: TextIO | None = None,
                 quiet: bool = False, every_s: float = 5.0, total_tokens: int = 0,
                 clock: Callable[[], float] = time.perf_counter):
        self.total, self.unit, self.total_tokens = total, unit, total_tokens
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet or self._stream is None
        self._clock = clock
        self._live = not self._quiet and self._stream.isatty()
        self._pause = _REDRAW_S if self._live else every_s
        self._begin = self._next = clock()
        self._next += 0.0 if self._live else every_s
        self._seen: deque[tuple[float, int]] = deque([(self._begin, 0)])
        self._done = self._tokens = 0

    def update(self, done: int, tokens: int) -> None:
        """`done` items and `tokens` tokens since the start (totals, not steps). Cheap."""
        self._done, self._tokens = done, tokens
        if not self._quiet and self._clock() >= self._next:
            self._show()

    def close(self) -> None:
        """Write the last state and end the line. Further calls do nothing."""
        if not self._quiet:
            self._show(last=True)
        self._quiet = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _show(self, last: bool = False) -> None:
        now = self._clock()
        self._next = now + self._pause
        self._seen.append((now, self._tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        text = self._text(now, last)
        if self._live:
            text = "\r" + text[:self._columns() - 1] + "\x1b[K" + ("\n" if last else "")
        else:
            text += "\n"
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal or log is gone; the run itself is as good as before.
            self._quiet = True

    def _text(self, now: float, last: bool) -> str:
        spent = now - self._begin
        if last:  # the mean of the whole run
            rate, clock = _rate(self._tokens, spent), f"{_time(spent)} in all"
        else:
            then, tokens = self._seen[0]
            rate, left = _rate(self._tokens - tokens, now - then), self._left(spent)
            clock = f"{_time(left)} left" if left is not None else f"{_time(spent)} so far"
        words = f"{self._done}/{self.total} {self.unit}  {rate:,.0f} tokens/s  {clock}"
        if not self._live:
            return words
        full = _BAR_WIDTH * min(self._done, self.total) // max(self.total, 1)
        return f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {words}"

    def _left(self, spent: float) -> float | None:
        """Seconds left if the rest goes like the past; None where nothing tells."""
        share = 0.0
        if self.total_tokens > 0:
            share = self._tokens / self.total_tokens
        elif self.total > 0:
            share = self._done / self.total
        # Requests that stop early leave the estimate short of 1 while all are done.
        if self.total > 0 and self._done >= self.total:
            share = 1.0
        return spent * (1.0 / min(share, 1.0) - 1.0) if share > 0 else None

    def _columns(self) -> int:
        try:
            # a terminal that does not say its width says 0
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _time(seconds: float) -> str:
    """1:05, or 2:03:04 from an hour on."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
