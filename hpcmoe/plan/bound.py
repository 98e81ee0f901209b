"""What no candidate of a shape can beat: times that it takes whatever overlaps, from the kernels and links of its trial.

One micro-batch alone: its ops one after the other as a rank's host and device go (simulate/clock.py), every exchange with the network to
itself. That is the least that a round takes. Where M micro-batches are in flight on K lanes, a stage takes them in groups of K, one group
after the other, and a round takes no less than

    sum over groups of max(a micro-batch alone in the stage, K x its device, host, or busiest link's time within the stage)
    M x the device's, the host's, or the busiest link's time

of any stage. Rows are those of one round for each run of rounds that are alike (plan/rounds.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.parallel.layout import Layout
from hpcmoe.plan.candidates import Candidate, Shape
from hpcmoe.plan.frame import Frame, Frames, Way
from hpcmoe.plan.rounds import Short
from hpcmoe.plan.stand import Stand
from hpcmoe.simulate.durations import Took
from hpcmoe.simulate.workload import Rows

MARGIN = 0.01  # of a bound: rounds and lines stand for others nearly


class Alone(NamedTuple):
    """A micro-batch alone in a stage, seconds. whole: until its rows are with the next stage (or its tokens with the first); body: until
    its layers are done; inside: of the device until then; device, host, link: of each altogether."""

    whole: float
    body: float
    inside: float
    device: float
    host: float
    link: float


class Bound(NamedTuple):
    """tokens_per_s_per_gpu is at most, tpot_ms at least this."""

    candidate: Candidate
    tokens_per_s_per_gpu: float
    tpot_ms: float


def bounds(stand: Stand, frames: Frames, shape: Shape, cuts: list[tuple[int, int]]) -> list[Bound]:
    """Of the shape with these (micro-batches, lanes)."""
    outputs, found = stand.told.lengths[0][1], []
    made = [Candidate(shape, micros, lanes) for micros, lanes in cuts]
    short = stand.short(made[0])
    table_ipx = np.array([_stages(stand, frames, shape, short.rows_r[r]) for r, _ in short.point_r])
    count_i = np.array([count for _, count in short.point_r])
    at = np.concatenate([[0.0], np.cumsum(count_i)])
    whole_i = table_ipx[:, :, 0].sum(axis=1)  # one micro-batch takes no less from token to token
    for c in made:
        round_i = np.maximum(_round_s(table_ipx, c), whole_i)
        last_q = round_i[np.searchsorted(at, short.end_q) - 1] * (c.micros - 1) / (2 * c.micros)  # the others' last steps may be behind it
        rounds_s, alone_s = (_between(short, at, count_i * x_i) for x_i in (round_i, whole_i))
        tpot_s = (1 - MARGIN) * max(float(np.mean(rounds_s - last_q)), float(np.mean(alone_s))) / max(1, outputs - 1)
        run_s = (1 - MARGIN) * float((count_i * round_i).sum())
        found.append(Bound(c, c.sequences * outputs / run_s / stand.told.gpus, 1e3 * tpot_s if outputs > 1 else 0.0))
    return found


def _between(short: Short, at: np.ndarray, seconds_i: np.ndarray) -> np.ndarray:
    """Of each request, what passes from its first token to its last [q]. at: the rounds at which runs that take seconds_i begin and end."""
    ends = np.concatenate([[0.0], np.cumsum(seconds_i)])
    return np.interp(short.end_q, at, ends) - np.interp(short.first_q, at, ends)


def _round_s(table_ipx: np.ndarray, c: Candidate) -> np.ndarray:
    """No stage is done with a round of all micro-batches in less [i]. table_ipx: Alone of each round and stage."""
    _, body_ip, inside_ip, *totals = np.moveaxis(table_ipx, 2, 0)
    device_ip, host_ip, link_ip = totals
    full, rest = divmod(c.micros, c.lanes)
    most_ip = np.maximum(inside_ip, np.maximum(host_ip, link_ip))
    stage_ip = full * np.maximum(body_ip, c.lanes * most_ip) + (np.maximum(body_ip, rest * most_ip) if rest else 0.0)
    return np.max([stage_ip, *(c.micros * total_ip for total_ip in totals)], axis=(0, 2))


# ---------------------------------------------------------------- one micro-batch
def _stages(stand: Stand, frames: Frames, shape: Shape, rows: Rows) -> list[Alone]:
    """In each stage."""
    layout, made, found = shape.layout, {}, []
    layers = stand.told.model.layers
    parts = _parts(stand, frames, shape, rows)
    for p, kind in enumerate(frames.kind_p):
        key = (kind, len(layout.layers_of(p, layers)))
        if key not in made:
            made[key] = _stage(stand, frames.frame[kind], shape, rows, parts, key[1], p == 0, p == layout.pp - 1)
        found.append(made[key])
    return found


def _parts(stand: Stand, frames: Frames, shape: Shape, rows: Rows) -> dict[str, Took]:
    """What a leader's ops take, and the busiest place's experts ("expert": of all places, "own expert": of those that lead). Rows are
    of a stand's rounds, which are the same objects for shapes with the same rounds."""
    layout, tokens = shape.layout, rows.count * shape.leaders
    leading = tuple(frames.group.leaders_p[0])
    return stand.once((layout.tp, id(rows)), lambda: _leader(stand, layout.tp, rows)) | \
        stand.once((layout.ep, layout.tp, layout.replicas, leading, tokens), lambda: _experts(stand, frames, layout, leading, tokens))


def _leader(stand: Stand, tp: int, rows: Rows) -> dict[str, Took]:
    durations = stand.durations(tp)
    parts = {name: getattr(durations, name)(rows) for name in ("begin", "attend", "gate", "dispatch", "merge")}
    return parts | {name: getattr(durations, name)(rows, tp) for name in ("sample", "sums")}


def _experts(stand: Stand, frames: Frames, layout: Layout, leading: tuple[int, ...], tokens: int) -> dict[str, Took]:
    """Of the layers that stand for all, in the mean."""
    durations, slots_r, longest = stand.durations(layout.tp), frames.group.slots_r, []
    for rows_s in frames.rows_s(tokens, stand.told.model.router.top_k):
        rows_r = [tuple(rows_s[low:high].tolist()) for low, high in zip(slots_r, slots_r[1:])]
        took = {rows_e: durations.expert(rows_e) for rows_e in set(rows_r)}
        longest.append([max((took[rows_e] for rows_e in some), key=lambda t: t.device_s + t.host_s)
                        for some in (rows_r, [rows_r[r] for r in leading])])
    return {name: Took(*(sum(seconds) / len(took_l) for seconds in zip(*took_l))) for name, took_l in zip(("expert", "own expert"), zip(*longest))}


class _Walk:
    """The clock of a rank with one micro-batch."""

    def __init__(self, sync_s: float):
        self.now = self.device = self.worked = self.hosted = 0.0
        self.made, self.sync_s, self.over = -np.inf, sync_s, 0.0

    def does(self, *took: Took, post_s: float = 0.0) -> None:
        host_s, device_s = sum(t.host_s for t in took), sum(t.device_s for t in took)
        self.now += host_s + post_s
        self.hosted += host_s + post_s
        if device_s:
            self.device = self.made = max(self.device, self.now) + device_s
            self.worked += device_s

    def sends(self, way: Way | None, rows: int, *took: Took) -> None:
        """An op whose exchange, or device work alone, is awaited."""
        cost = way.at(rows) if way and rows else None
        self.does(*took, post_s=cost.post_s if cost else 0.0)
        self.over = max(self.now, self.made + self.sync_s) + (cost.wire_s if cost else 0.0)

    def awaits(self) -> None:
        self.now = max(self.now, self.over)


def _stage(stand: Stand, frame: Frame, shape: Shape, rows: Rows, parts: dict, layers: int, first: bool, last: bool) -> Alone:
    """A micro-batch alone in a stage of so many layers: two of them are walked through, and each more is as long as the first."""
    tp, n = shape.layout.tp > 1, rows.count
    walk = _Walk(stand.told.calibration.sync_s if stand.told.gpu else 0.0)
    load_l = 0.0 * stand.network.bandwidth_l
    begin = [parts["begin"]]
    if tp and first:
        walk.sends(frame.sums, n, parts["begin"], parts["sums"])
        walk.awaits()
        load_l, begin = load_l + frame.sums.at(n).load_l, []
    layer_l = sum((way.at(n).load_l for way in (frame.counts, frame.dispatch, frame.combine) if way), 0 * load_l)
    if tp:
        layer_l = layer_l + 2 * frame.sums.at(n).load_l
    states = []
    for layer in range(min(layers, 2)):
        states.append((walk.now, walk.worked, walk.hosted))
        inside = _layer(walk, frame, tp, n, parts, begin)
        begin = []
    more = layers - len(states)
    now_s, worked_s, hosted_s = (b - a for a, b in zip(states[0], states[1])) if more else (0.0, 0.0, 0.0)
    body, inside = walk.now + more * now_s, inside + more * worked_s
    load_l = load_l + layers * layer_l
    if last:
        walk.sends(None, 0, parts["sample"])
        for way in (frame.gather, frame.token):
            if way and rows.wanted:
                cost = way.at(rows.wanted)
                walk.now, walk.hosted = walk.now + cost.post_s, walk.hosted + cost.post_s
                walk.over, load_l = max(walk.over, walk.now) + cost.wire_s, load_l + cost.load_l
    else:
        walk.sends(frame.send, n)
        load_l = load_l + frame.send.at(n).load_l
    rate_l = stand.network.bandwidth_l
    link = float((load_l / rate_l).max()) if len(rate_l) else 0.0
    return Alone(walk.over + more * now_s, body, inside, walk.worked + more * worked_s, walk.hosted + more * hosted_s, link)


def _layer(walk: _Walk, frame: Frame, tp: bool, n: int, parts: dict, begin: list[Took]) -> float:
    """One layer; the device's seconds until its experts are done."""
    walk.does(*begin, parts["attend"])
    if tp:
        walk.sends(frame.sums, n, parts["sums"])
        walk.awaits()
    walk.does(parts["gate"])
    walk.sends(frame.counts, n)
    walk.awaits()
    walk.sends(frame.dispatch, n, parts["dispatch"])
    if frame.dispatch:
        walk.awaits()
    worked, own = walk.worked, parts["own expert"]
    walk.does(parts["expert"])
    inside = walk.worked = worked + own.device_s
    if frame.combine:
        walk.sends(frame.combine, n)
        walk.awaits()
    walk.does(parts["merge"])
    if tp:
        walk.sends(frame.sums, n, parts["sums"])
        walk.awaits()
    return inside
