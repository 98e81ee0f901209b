"""Which experts change seats, and which weights travel for it: decisions that all ranks of a stage make alike.

Letters: s slot, r place, e expert; old_s and new_s: the expert in each slot of a layer, before and after.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.config import ModelConfig, RunJob
from hpcmoe.errors import at
from hpcmoe.parallel import balance
from hpcmoe.parallel.layout import Layout

WORSE = (0.05, 0.25)  # a seating that moves less may have a place so much heavier than the best that was found


class Transfer(NamedTuple):
    """One expert's weights from one place to another."""

    expert: int
    source: int
    target: int


class Move(NamedTuple):
    """A new seating of one layer. heaviest: rows of the heaviest place over the mean, as the window's rows are
    seated now and as they would be; gain_s: seconds over the coming interval, less cost_s, what moving takes."""

    layer: int
    new_s: np.ndarray
    transfers: list[Transfer]
    heaviest: tuple[float, float]
    gain_s: float
    cost_s: float


class Price(NamedTuple):
    """What rows and moves take: seconds of an expert per row, of one expert's weights from a place to another, and of
    looking for a layer's seating."""

    row_s: float
    move_s: float
    search_s: float = 0.0


def transfers(old_s, new_s, slots_of_place, node_r) -> list[Transfer]:
    """The weights that places lack for their new seats, each from a place that holds it: from one that sends least so far,
    among those one of the same node, among those the first."""
    ends = np.cumsum(slots_of_place)
    old_r, new_r = ([list(map(int, part)) for part in np.split(np.asarray(seats), ends[:-1])] for seats in (old_s, new_s))
    sent_r, found = [0] * len(ends), []
    for r, (old, new) in enumerate(zip(old_r, new_r)):
        for e in lacking(old, new):
            holders = [q for q in range(len(ends)) if q != r and e in old_r[q]]
            if holders:  # else this place alone has it, and both slots will
                source = min(holders, key=lambda q: (sent_r[q], node_r[q] != node_r[r], q))
                sent_r[source] += 1
                found.append(Transfer(e, source, r))
    return found


def lacking(old: list[int], new: list[int]) -> list[int]:
    """Of the experts that a place is to hold, those that it holds too few times, in the order of its slots."""
    left, missing = list(old), []
    for e in new:
        if e in left:
            left.remove(e)
        else:
            missing.append(e)
    return missing


def busiest(found: list[Transfer], places: int) -> int:
    """Experts that pass through the place which most pass through."""
    ends = [r for t in found for r in (t.source, t.target)]
    return int(np.bincount(ends, minlength=places).max())


def decide(layer: int, old_s, load_e, slots_of_place, node_r, price: Price, interval: float) -> Move | None:
    """The move of a layer, None where none pays. load_e: rows of each expert in the window; interval: the coming one, in windows.

    A move pays where the rows that the heaviest place would have had less in the window, so often and at row_s each, take
    longer than the weights through the place which most pass through. Where even perfect balance would not be worth one
    expert's weights and the search, no seating is looked for. With one slot per place, where that takes no time, one that
    moves less is tried, too.
    """
    mean, now = float(load_e.sum()) / len(slots_of_place), balance.heaviest(old_s, load_e, slots_of_place)
    if (now - mean) * interval * price.row_s <= price.move_s + price.search_s:
        return None
    moves = []
    for worse in WORSE[:2 if max(slots_of_place) == 1 else 1]:
        new_s = balance.seat_again(old_s, load_e, slots_of_place, worse)
        then = balance.heaviest(new_s, load_e, slots_of_place)
        travelling = transfers(old_s, new_s, slots_of_place, node_r)
        cost_s = price.move_s * busiest(travelling, len(slots_of_place))
        moves.append(Move(layer, new_s, travelling, (now / mean, then / mean), (now - then) * interval * price.row_s - cost_s, cost_s))
    best = max(moves, key=lambda move: move.gain_s)
    return best if best.transfers and best.gain_s > 0 else None


def check(run: RunJob, layout: Layout, model: ModelConfig) -> None:
    """UserError where a job asks for rebalancing and there is nothing that could be moved."""
    if not run.rebalance_every:
        return
    if layout.ep == 1 or (layout.ep == model.router.experts and not layout.replicas):
        what = "one place holds all experts" if layout.ep == 1 else "every place holds one expert, and there are no spare slots"
        raise at("job", "run.rebalance_every", run.rebalance_every, f"0 for {layout}: {what}, so that no seat is better "
                 "than another; layout.replicas = N makes spare slots")
