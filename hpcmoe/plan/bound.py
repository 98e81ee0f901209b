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
    """A micro-batch alone in a stage, seconds, arrays over steps. whole: until its rows are with the next stage (or its tokens with the first); body: until
    its layers are done; inside: of the device until then; device, host, link: of each altogether."""

    whole: np.ndarray
    body: np.ndarray
    inside: np.ndarray
    device: np.ndarray
    host: np.ndarray
    link: np.ndarray


class Bound(NamedTuple):
    """tokens_per_s_per_gpu is at most, tpot_ms at least this."""

    candidate: Candidate
    tokens_per_s_per_gpu: float
    tpot_ms: float


def bounds(stand: Stand, frames: Frames, asked: list[tuple[Shape, list[tuple[int, int]]]]) -> list[Bound]:
    """Of shapes of one layout and transport, each with its (micro-batches, lanes)."""
    shorts = [stand.short(Candidate(shape, *cuts[0])) for shape, cuts in asked]
    rows_n = [(shape, short.rows_r[r]) for (shape, _), short in zip(asked, shorts) for r, _ in short.point_r]
    table_npx, found, at = _stages(stand, frames, rows_n), [], 0
    for (shape, cuts), short in zip(asked, shorts):
        found += _of_shape(stand, short, [Candidate(shape, *cut) for cut in cuts], table_npx[at:at + len(short.point_r)])
        at += len(short.point_r)
    return found


def _of_shape(stand: Stand, short: Short, candidates: list[Candidate], table_ipx: np.ndarray) -> list[Bound]:
    """table_ipx: Alone of each of the shape's rounds, in each stage."""
    outputs, found = stand.told.lengths[0][1], []
    count_i = np.array([count for _, count in short.point_r])
    at = np.concatenate([[0.0], np.cumsum(count_i)])
    whole_i = table_ipx[:, :, 0].sum(axis=1)  # one micro-batch takes no less from token to token
    alone_s = float(np.mean(_between(short, at, count_i * whole_i)))
    end_q = np.searchsorted(at, short.end_q) - 1
    for c in candidates:
        round_i = np.maximum(_round_s(table_ipx, c), whole_i)
        last_q = round_i[end_q] * (c.micros - 1) / (2 * c.micros)  # the others' last steps may come after it
        tpot_s = (1 - MARGIN) * max(float(np.mean(_between(short, at, count_i * round_i) - last_q)), alone_s) / max(1, outputs - 1)
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
class Parts(NamedTuple):
    """What ops take of a host and of its device, by name, arrays over steps [n]. Names: those of Durations; "own expert": the busiest
    place's that leads, "expert": of all."""

    host: dict[str, np.ndarray]
    device: dict[str, np.ndarray]


def _stages(stand: Stand, frames: Frames, rows_n: list[tuple[Shape, Rows]]) -> np.ndarray:
    """Alone of each step in each stage [n, p, x]."""
    layout, made, found = rows_n[0][0].layout, {}, []
    parts_n = [_parts(stand, frames, shape, rows) for shape, rows in rows_n]
    parts = Parts(*({name: np.array([part[name][i] for part in parts_n]) for name in parts_n[0]} for i in (0, 1)))
    count_n, wanted_n = (np.array([getattr(rows, name) for _, rows in rows_n]) for name in ("count", "wanted"))
    for p, kind in enumerate(frames.kind_p):
        key = (kind, len(layout.layers_of(p, stand.told.model.layers)))
        if key not in made:
            made[key] = np.array(_stage(stand, frames.frame[kind], layout, count_n, wanted_n, parts, key[1], p == 0, p == layout.pp - 1))
        found.append(made[key].T)
    return np.stack(found, axis=1)


def _parts(stand: Stand, frames: Frames, shape: Shape, rows: Rows) -> dict[str, Took]:
    """Of one step. Rows are of a stand's rounds, which are the same objects for shapes with the same rounds."""
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
    """The clock of a rank with one micro-batch: of many steps at once [n]. op_s: of the host, for any op."""

    def __init__(self, parts: Parts, count_n: np.ndarray, links: int, sync_s: float, op_s: float):
        self.parts, self.count_n, self.op_s = parts, count_n, op_s
        self.now, self.device, self.worked, self.hosted, self.over = (np.zeros(len(count_n)) for _ in range(5))
        self.made, self.sync_s, self.load_nl = np.full(len(count_n), -np.inf), sync_s, np.zeros((len(count_n), links))

    def does(self, *names: str, post_s=0.0, ops: int = 1) -> None:
        """ops: as so many of the schedule."""
        host_s, device_s = (sum(table[name] for name in names) if names else 0.0 for table in self.parts)
        host_s = host_s + ops * self.op_s
        self.now = self.now + host_s + post_s
        self.hosted = self.hosted + host_s + post_s
        if np.any(device_s):
            self.device = np.where(device_s > 0, np.maximum(self.device, self.now) + device_s, self.device)
            self.made = np.where(device_s > 0, self.device, self.made)
            self.worked = self.worked + device_s

    def sends(self, way: Way | None, *names: str, rows_n: np.ndarray | None = None, ops: int = 1) -> None:
        """An op (or a part of one: ops = 0) whose exchange, or device work alone, is awaited."""
        wire_s, post_s, load_nl = way.of(self.count_n if rows_n is None else rows_n) if way else (0.0, 0.0, 0.0)
        self.does(*names, post_s=post_s, ops=ops)
        self.over = np.maximum(self.now, self.made + self.sync_s) + wire_s
        self.load_nl = self.load_nl + load_nl

    def awaits(self) -> None:
        self.now = np.maximum(self.now, self.over)


def _stage(stand: Stand, frame: Frame, layout: Layout, count_n, wanted_n, parts: Parts, layers: int, first: bool, last: bool) -> Alone:
    """A micro-batch alone in a stage of so many layers: two of them are walked through, and each more is as long as the first."""
    tp, rate_l = layout.tp > 1, stand.network.bandwidth_l
    calibration = stand.told.calibration
    walk = _Walk(parts, count_n, len(rate_l), calibration.sync_s if stand.told.gpu else 0.0, calibration.calls.op_us * 1e-6)
    walk.hosted = walk.hosted + walk.op_s  # RECV, which a rank may do while it waits
    begin = ["begin"]
    if tp and first:
        walk.sends(frame.sums, "begin", "sums")
        walk.awaits()
        begin = []
    states = []
    for layer in range(min(layers, 2)):
        states.append((walk.now, walk.worked, walk.hosted, walk.load_nl))
        inside = _layer(walk, frame, tp, begin)
        begin = []
    more = layers - len(states)
    now_s, worked_s, hosted_s, load_nl = (b - a for a, b in zip(*states)) if more > 0 else (0.0,) * 4
    body = walk.now + more * now_s
    if last:
        walk.sends(None, "sample")
        for way in (frame.gather, frame.token):
            if way:
                over = walk.over
                walk.sends(way, rows_n=wanted_n, ops=0)
                walk.over = np.maximum(over, walk.now) + way.of(wanted_n)[0]
    else:
        walk.sends(frame.send)
    link = ((walk.load_nl + more * load_nl) / rate_l).max(axis=1) if len(rate_l) else 0 * body
    return Alone(walk.over + more * now_s, body, inside + more * worked_s, walk.worked + more * worked_s, walk.hosted + more * hosted_s, link)


def _layer(walk: _Walk, frame: Frame, tp: bool, begin: list[str]) -> np.ndarray:
    """One layer; the device's seconds until its experts are done."""
    walk.does(*begin, "attend")
    if tp:
        walk.sends(frame.sums, "sums")
        walk.awaits()
    walk.does("gate")
    walk.sends(frame.counts)
    walk.awaits()
    walk.sends(frame.dispatch, "dispatch")
    if frame.dispatch:
        walk.awaits()
    worked = walk.worked
    walk.does("expert")
    inside = walk.worked = worked + walk.parts.device["own expert"]
    walk.sends(frame.combine)
    if frame.combine:
        walk.awaits()
    walk.does("merge")
    if tp:
        walk.sends(frame.sums, "sums")
        walk.awaits()
    return inside
