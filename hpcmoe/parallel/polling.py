"""How often a rank that waits looks whether it can go on, where ranks are more than cores: in a run, and in a simulation of one."""

from __future__ import annotations

YIELDS = 20        # looks without a pause, in which others get the core
PAUSE_S = 0.0002   # the shortest pause
LATE_S = 60e-6     # a sleep of Linux ends so much later (its timer slack is 50 us)


def pause_s(waited_s: float) -> float:
    """What a rank sleeps between two looks. A look of many ranks over a network costs system calls: the longer the wait, the rarer."""
    return min(max(PAUSE_S, waited_s / 100), 0.005)


def woken_s(start_s: float, ready_s: float) -> float:
    """When a rank that looks with pauses from start_s on sees what is there from ready_s on."""
    now_s = start_s
    while now_s < ready_s:
        now_s += pause_s(now_s - start_s) + LATE_S
    return now_s
