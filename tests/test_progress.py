"""Progress: the bar on a real terminal (a pty), the lines of a log, and time by a clock of our own."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from hpcmoe.report.progress import Progress, _time


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal:
    """A pty whose far end collects what a terminal would get."""

    def __init__(self, columns=100):
        self.far, near = pty.openpty()
        fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(near, "w")

    def text(self) -> str:
        self.stream.flush()
        os.set_blocking(self.far, False)
        found = b""
        while True:
            try:
                found += os.read(self.far, 65536)
            except BlockingIOError:
                return found.decode()


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.stream.close()
    os.close(made.far)


def test_live_bar(terminal):
    clock = Clock()
    progress = Progress(8, stream=terminal.stream, clock=clock)
    progress.update(0, 0)
    assert terminal.text() == "\r[........................] 0/8 requests  0 tokens/s  0:00 so far\x1b[K"
    clock.now += 2
    progress.update(2, 5000)
    assert terminal.text() == "\r[######..................] 2/8 requests  2,500 tokens/s  0:06 left\x1b[K"
    clock.now += 2
    progress.update(8, 8000)
    progress.close()
    last = terminal.text().split("\r")[-2]  # the terminal writes its line end as \r\n
    assert last == "[########################] 8/8 requests  2,000 tokens/s  0:04 in all\x1b[K"


def test_a_terminal_is_redrawn_ten_times_a_second_at_most(terminal):
    clock = Clock()
    progress = Progress(10_000, stream=terminal.stream, clock=clock)
    for step in range(10_000):  # one step a millisecond
        progress.update(step, step)
        clock.now += 0.001
    assert 95 <= terminal.text().count("\r") <= 101


def test_the_bar_fits_a_narrow_terminal():
    narrow = Terminal(columns=30)
    Progress(8, stream=narrow.stream).update(1, 1)
    shown = narrow.text()
    assert shown.startswith("\r[###....") and len(shown.strip("\r").removesuffix("\x1b[K")) == 29
    narrow.stream.close()
    os.close(narrow.far)


def test_lines_in_a_log():
    clock, log = Clock(), io.StringIO()
    progress = Progress(4, "requests", log, every_s=5, clock=clock)
    for step in range(1, 121):  # 12 seconds in steps of 0.1
        clock.now += 0.1
        progress.update(step // 40, step * 10)
    progress.close()
    progress.update(4, 0)
    progress.close()
    assert log.getvalue().splitlines() == ["1/4 requests  100 tokens/s  0:15 left",
                                           "2/4 requests  100 tokens/s  0:10 left",
                                           "3/4 requests  100 tokens/s  0:12 in all"]


def test_tokens_per_second_are_those_of_late(terminal):
    clock = Clock()
    progress = Progress(100, stream=terminal.stream, clock=clock)
    for second in range(1, 121):  # slow for a minute, then fast
        clock.now += 1
        progress.update(1, second * 10 if second <= 60 else 600 + (second - 60) * 1000)
    rates = [int(r.replace(",", "")) for r in re.findall(r"([\d,]+) tokens/s", terminal.text())]
    assert rates[58] == 10 and rates[-1] == 1000


def test_time_left_from_an_estimate_of_tokens():
    clock, log = Clock(), io.StringIO()
    progress = Progress(4, stream=log, every_s=1, total_tokens=1000, clock=clock)
    clock.now += 10
    progress.update(0, 100)
    progress.update(0, 100)  # at once again: not shown
    clock.now += 10
    progress.update(4, 500)  # all ended early
    assert [text.split("  ")[-1] for text in log.getvalue().splitlines()] == ["1:30 left", "0:00 left"]


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"),
                                           (7384, "2:03:04"), (90_000, "25:00:00")])
def test_times(seconds, text):
    assert _time(seconds) == text


def test_quiet_and_nothing_to_do(terminal):
    with Progress(5, stream=terminal.stream, quiet=True) as progress:
        progress.update(3, 3)
    assert terminal.text() == ""
    with Progress(0, stream=io.StringIO()) as progress:
        progress.update(0, 0)


def test_a_log_that_is_gone_does_not_end_the_run():
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    os.close(reader)
    progress = Progress(5, stream=stream, every_s=0)
    for step in range(5):
        progress.update(step, step)
    progress.close()
    try:
        stream.close()
    except BrokenPipeError:
        pass
    closed = io.StringIO()
    closed_progress = Progress(5, stream=closed, every_s=0)
    closed.close()
    closed_progress.update(1, 1)
    closed_progress.close()


def test_standard_error_of_a_process():
    code = ("from hpcmoe.report.progress import Progress\n"
            "p = Progress(2, every_s=0.0)\np.update(1, 5)\np.close()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and "\r" not in done.stderr
    assert [text.split("  ")[0] for text in done.stderr.splitlines()] == ["1/2 requests"] * 2


def test_update_is_cheap():
    progress = Progress(10, stream=io.StringIO())
    begin = time.perf_counter()
    for step in range(100_000):
        progress.update(1, step)
    assert time.perf_counter() - begin < 2.0  # 20 microseconds a step would do; it takes 0.2
