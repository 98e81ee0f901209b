"""What a candidate takes: its schedule on the clock of the simulator, with rounds that are alike left out."""

from __future__ import annotations

from math import fsum
from typing import NamedTuple

import numpy as np

from hpcmoe.plan.candidates import Candidate
from hpcmoe.plan.rounds import Short
from hpcmoe.plan.stand import Stand
from hpcmoe.simulate.clock import Clock
from hpcmoe.simulate.group import Group

TERMS = ("attention", "gate and merge", "experts: reading weights", "experts: the rest", "sums of shards", "sampling", "posting messages",
         "waiting: exchanges, other ranks", "waiting: pipeline bubble")
PARTS = {"attention": ("ATTEND",), "gate and merge": ("GATE", "MERGE", "COUNTS", "DISPATCH", "COMBINE", "RECV", "SEND"), "sampling": ("SAMPLE",),
         "sums of shards": ("EMBED", "REDUCE_ATTEND", "REDUCE_MERGE")}


class Outcome(NamedTuple):
    """Of a candidate. tokens_per_s_per_gpu: output tokens; terms_us: where a GPU's time goes, by TERMS, in GPU-us per output token: they add up to
    1e6 / tokens_per_s_per_gpu; link, link_share: the busiest one, and the part of the run that its bytes take at its rate."""

    candidate: Candidate
    tokens_per_s_per_gpu: float
    tpot_ms: float
    ttft_ms: float
    run_s: float
    terms_us: tuple[float, ...]
    link: str
    link_share: float


def run_trial(stand: Stand, c: Candidate, whole: bool = False) -> Outcome:
    """Clocks a candidate; whole: without leaving rounds out."""
    short = stand.short(c, whole)
    groups = stand.groups(c, short)
    Clock([crew for group, _ in groups for crew in group.crews.values()], stand.network.bandwidth_l).run()
    run_s = max(float((crew.now + crew.left_out_s).max()) for group, _ in groups for crew in group.crews.values())
    first_ms, tpot_ms = _latency(stand, groups, short, c)
    tokens, gpus = c.sequences * stand.told.lengths[0][1], stand.told.gpus
    link, busy_s = _busiest(stand, groups)
    terms = tuple(1e6 * gpus * seconds / tokens for seconds in _terms(stand, groups, short, c, run_s))
    return Outcome(c, tokens / run_s / gpus, tpot_ms, first_ms, run_s, terms, link, busy_s / run_s)


def when(short: Short, begin_r: np.ndarray, round_q: np.ndarray) -> np.ndarray:
    """When rounds of the whole (numbers) began; begin_r: when the kept ones did, and between them as evenly as the rounds that they stand for."""
    ahead_r = np.concatenate([[0.0], np.cumsum(short.weight_r)[:-1]])
    return np.interp(round_q, ahead_r, begin_r)


def _latency(stand: Stand, groups, short: Short, c: Candidate) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) in ms; TPOT is 0 for outputs of one token, which have none."""
    first_s, tpot_s, count, more = 0.0, 0.0, 0, max(1, stand.told.lengths[0][1] - 1)
    for group, members in groups:
        crew = next(crew for role, crew in group.crews.items() if role.stage == 0 and role.leader)
        for m in range(c.micros):
            begin_r = np.array([np.mean(crew.begun[r, group.first_op(m)]) for r in range(len(short.rows_r))])
            first_q, end_q = when(short, begin_r, short.first_q), when(short, begin_r, short.end_q)
            first_s += len(members) * float(first_q.mean())
            tpot_s += len(members) * float((end_q - first_q).mean()) / more
            count += len(members)
    return 1e3 * first_s / count, 1e3 * tpot_s / count


def _terms(stand: Stand, groups, short: Short, c: Candidate, run_s: float) -> list[float]:
    """Seconds of the run by TERMS, mean over all ranks."""
    gpus, gpu, ranks = stand.told.gpus, stand.told.gpu, []
    for group, members in groups:
        for role, crew in group.crews.items():
            took = crew.device_s if gpu else {kind: seconds - crew.post_s.get(kind, 0.0) for kind, seconds in crew.busy_s.items()}
            own = {name: _sum(took, kinds, crew) for name, kinds in PARTS.items()}
            expert = _sum(took, ("EXPERT",), crew)
            own["experts: reading weights"] = np.minimum(expert, _reading_s(stand, group, role, short, c))
            own["experts: the rest"] = expert - own["experts: reading weights"]
            if not gpu:
                own["posting messages"] = _sum(crew.post_s, list(crew.post_s), crew)
            idle = run_s - sum(own.values())  # what is queued on a device may run while its host waits
            own["waiting: pipeline bubble"] = np.minimum(idle, _sum(crew.wait_s, ("RECV",), crew) + run_s - (crew.now + crew.left_out_s))
            ranks.append([len(members) * float(np.sum(own.get(name, 0.0))) for name in TERMS])
    found = [fsum(column) / gpus for column in zip(*ranks)]
    found[TERMS.index("waiting: exchanges, other ranks")] = run_s - fsum(found)
    return found


def _sum(table: dict, kinds, crew) -> np.ndarray:
    return sum((np.broadcast_to(table[kind], crew.now.shape) for kind in kinds if kind in table), np.zeros(crew.now.shape))


def _reading_s(stand: Stand, group: Group, role, short: Short, c: Candidate) -> np.ndarray:
    """Seconds in which the ranks of a role read the weights of experts that have rows, once in each step, at the memory's rate."""
    durations, layout = stand.durations(c.shape.layout.tp), c.shape.layout
    x, d = durations.model.expert, stand.told.model.d
    one_s = (2 + x.gated) * d * x.f * durations.item / (stand.told.calibration.gemm.memory_gb_per_s * 1e9)
    places, layers = np.array(group.places(role)), group.setting.schedule.layers_of(role.stage)
    used_s = np.zeros(len(group.slots_r) - 1)
    for rnd, weight in enumerate(short.weight_r):
        for layer in layers:  # all micro-batches of a round have as many rows
            used_s += weight * c.micros * np.add.reduceat(group.load_rls[rnd, layer] > 0, group.slots_r[:-1])
    return np.repeat(used_s[places] * one_s, layout.tp)


def _busiest(stand: Stand, groups) -> tuple[str, float]:
    """(the link whose bytes take longest, seconds that they take)."""
    load_l = sum((count * leg.load_l for group, _ in groups for counted in group.moved.values() for moved, count in counted.values()
                  for leg in moved.legs if leg.load_l is not None), 0 * stand.network.bandwidth_l)
    found = stand.network.busiest(load_l)
    return found.kind, found.seconds
