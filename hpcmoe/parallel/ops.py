"""The operations of a schedule and their text form."""

from __future__ import annotations

from typing import NamedTuple

from hpcmoe.errors import UserError
from hpcmoe.report.record import KINDS

COLLECTIVES = ("COUNTS", "DISPATCH", "COMBINE")  # all ranks of a stage post them, in one order per lane
EXPERT_KINDS = ("COUNTS", "DISPATCH", "EXPERT", "COMBINE")  # what a rank that is no leader does


class Op(NamedTuple):
    """One thing a rank does for one layer and one micro-batch; its text is e.g. DISPATCH.2.0."""

    kind: str
    layer: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}.{self.micro}"


class Step(NamedTuple):
    """An op in its place, with the ops of the same rank whose results it needs.

    A needed op that stands at the same place or later in the program is the previous round's.
    """

    op: Op
    needs: tuple[Op, ...]

    def __str__(self) -> str:
        return str(self.op) + (" <- " + " ".join(map(str, self.needs)) if self.needs else "")


def parse_op(text: str) -> Op:
    """The op of a text such as "DISPATCH.2.0"; UserError where it is none."""
    kind, *numbers = text.split(".")
    if kind not in KINDS or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise UserError(f"schedule: {text!r}: expected KIND.layer.micro with KIND one of {', '.join(KINDS)}")
    return Op(kind, int(numbers[0]), int(numbers[1]))


def parse_step(text: str) -> Step:
    op, _, needs = text.partition(" <- ")
    return Step(parse_op(op.strip()), tuple(parse_op(n) for n in needs.split()))
