"""Decode at full batch, for as long as one likes: what a step takes once every step is like the one before it.

The simulator's own parts (schedule, durations, exchanges, clock) are used as they are; only the steps are not those of a list of
requests: every micro-batch has the same decode rows in every round. So a few rounds tell what thousands would.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.balance_run import power_law
from hpcmoe.cluster.clusterfile import ClusterFile
from hpcmoe.cluster.kernels import Calibration
from hpcmoe.cluster.network import Network
from hpcmoe.compute.base import Sizes
from hpcmoe.config import ModelConfig, RouterConfig, RunJob
from hpcmoe.errors import UserError
from hpcmoe.parallel import balance
from hpcmoe.parallel.check import check
from hpcmoe.parallel.layout import Layout, share
from hpcmoe.parallel.schedule import Role, Schedule, build
from hpcmoe.simulate.alike import alike
from hpcmoe.simulate.clock import Clock
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.group import Group, Setting
from hpcmoe.simulate.memory import fit, shard_of
from hpcmoe.simulate.ways import Ways
from hpcmoe.simulate.workload import Feed, Rows

WARM, MEASURED = 6, 4  # rounds before those that are timed, and those; one each where a single batch is in flight
GRAPHS = RunJob().graphs


class Machine(NamedTuple):
    """What a case runs on."""

    cluster: ClusterFile
    calibration: Calibration


@dataclass(frozen=True)
class Case:
    """One decode to be clocked. batch: tokens of a micro-batch of one replica; keys: tokens in the cache of each sequence; skew: exponent
    of the power law by which tokens choose experts, None for even shares; lanes: micro-batches interleaved on a stage."""

    model: ModelConfig
    layout: Layout
    batch: int
    keys: int
    micros: int = 1
    lanes: int = 1
    skew: float | None = None
    hierarchical: bool = False


class Steady(NamedTuple):
    """tpot_s: from one token of a sequence to its next, which is one round of all micro-batches; tokens: in flight; device_s: by kind of op,
    of the busiest rank of a stage, in one round, summed over the stages; busiest: rows of the busiest rank over the mean, in the layer where
    that is worst."""

    tpot_s: float
    tokens: int
    gpus: int
    device_s: dict[str, float]
    busiest: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.tpot_s

    @property
    def per_gpu(self) -> float:
        return self.tokens_per_s / self.gpus


def steady(case: Case, machine: Machine) -> Steady:
    """Clocks a case. Raises UserError where it does not fit the memory, or the cluster."""
    model, layout, (c, calibration) = case.model, case.layout, machine
    network = Network(c, np.arange(layout.size) // c.nodes.ranks_per_node)
    leaders_dp = [layout.leader_places(network.node_r, dp) for dp in range(layout.dp)]
    leaders = layout.ep
    check_memory(case, machine)
    durations = _durations(calibration, model, layout.tp)
    warm, measured = (WARM, MEASURED) if case.micros > 1 else (1, 1)
    share_ls, expert_ls = _loads(model.layers, model.router, layout, case.skew, case.batch)
    setting = Setting(model, layout, _schedule(layout.pp, model.layers, case.micros, case.lanes, layout.tp > 1), durations, share_ls, case.micros,
                      False, case.hierarchical, expert_ls)
    feeds = {n: Feed([[_rows(n, case.keys)] * case.micros] * (warm + measured), []) for n in {len(share(case.batch, leaders, j)) for j in range(leaders)}}
    feed_j = [feeds[len(share(case.batch, leaders, j))] for j in range(leaders)]
    groups = [Group(i, setting, Ways(network, layout, members, leaders_dp[members[0]], share_ls.shape[1]), leaders_dp[members[0]], feed_j)
              for i, members in enumerate(alike(layout, network, [0] * layout.dp))]
    Clock([crew for group in groups for crew in group.crews.values()], network.bandwidth_l).run()
    return Steady(max(_round_s(group, measured) for group in groups), case.batch * case.micros * layout.dp, layout.size, _device_s(groups[0]),
                  _busiest(groups[0]))


def clock_all(cases: list[tuple[Case, Machine]], jobs: int) -> list[Steady | None]:
    """Every case clocked, in their order, on so many processes; None for one that does not fit."""
    if jobs == 1 or len(cases) < 2:
        return [_or_none(*case) for case in cases]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _end_with_parent) as pool:
        return list(pool.map(_or_none, *zip(*cases), chunksize=4))


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would wait for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _or_none(case: Case, machine: Machine) -> Steady | None:
    try:
        return steady(case, machine)
    except UserError:
        return None


def _rows(count: int, keys: int) -> Rows:
    none = np.zeros(0, int)
    return Rows(none, none, float(count * keys), count, count, 0, count)


@lru_cache(maxsize=None)
def _schedule(pp: int, layers: int, micros: int, lanes: int, shards: bool) -> Schedule:
    found = build("queued", pp, layers, micros, lanes, shards)
    check(found)
    return found


KEPT: dict[tuple, Durations] = {}  # their products are worked out once


def _durations(calibration: Calibration, model: ModelConfig, tp: int) -> Durations:
    key = (calibration, repr(model), tp)
    if key not in KEPT:
        KEPT[key] = Durations(calibration, shard_of(model, tp).model if tp > 1 else model, model, True, GRAPHS, False)
    return KEPT[key]


def _round_s(group: Group, measured: int) -> float:
    """From the begin of a micro-batch's step to the begin of its next, in the mean over the measured rounds, which are the last ones."""
    begun, last = group.crews[Role(0, True)].begun, group.rounds - 1
    return max(float((begun[last, op] - begun[last - measured, op]).max()) for op in map(group.first_op, range(group.setting.micros))) / measured


def _device_s(group: Group) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in range(group.setting.layout.pp):
        for kind, seconds in group.crews[Role(stage, True)].device_s.items():
            found[kind] = found.get(kind, 0.0) + float(np.max(seconds)) / group.rounds
    return found


def _busiest(group: Group) -> float:
    rows_lr = np.add.reduceat(group.load_rls[-1], group.slots_r[:-1], axis=1)
    return float((rows_lr.max(axis=1) / rows_lr.mean(axis=1)).max())


# ---------------------------------------------------------------- rows of experts
@lru_cache(maxsize=None)
def _loads(layers: int, router: RouterConfig, layout: Layout, skew: float | None, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(of each layer's rows the share of each slot, the expert in each slot) [l, s]. Experts and their copies are seated for this load
    (parallel/balance.py); it is drawn once, with a fixed seed."""
    rows_le = np.ones((layers, router.experts)) if skew is None else power_law(skew, router.experts, router.top_k, batch, 1, layers, 0)[0]
    slots_r = [len(layout.slots_of(place, router.experts)) for place in range(layout.ep)]
    expert_ls = np.stack([balance.plan(rows_e, slots_r) for rows_e in rows_le])
    count_le = np.stack([np.bincount(expert_s, minlength=router.experts) for expert_s in expert_ls])
    return np.take_along_axis(rows_le / rows_le.sum(axis=1, keepdims=True) / count_le, expert_ls, axis=1), expert_ls


# ---------------------------------------------------------------- memory
def check_memory(case: Case, machine: Machine) -> None:
    """Raises UserError where weights, buffers and cache are more than a rank has; all places lead."""
    model, layout, run, leaders = case.model, case.layout, RunJob(), case.layout.ep
    rows = -(-case.batch // leaders)
    chosen = min(model.router.top_k, -(-layout.slots(model.router.experts) // layout.ep))
    wanted = Sizes(case.micros, case.lanes, rows, rows, case.keys + 1, 0, 0, rows * leaders * chosen)
    sizes, _ = fit(machine.cluster, model, layout, run, wanted, leaders, machine.calibration.gemm.item_bytes, True)
    needed = wanted.slots * wanted.micros * -(-wanted.context // run.page_tokens)
    if sizes.pages < needed:
        raise UserError(f"{layout}: the KV cache of {case.batch * case.micros} sequences needs {needed} pages, {sizes.pages} fit")
