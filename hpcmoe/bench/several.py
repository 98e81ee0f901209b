"""Section `several`: the step of a rank that holds several experts, its products queued in different ways.

one stream     as a run does with many rows (compute/gpu_experts.py): gate|up products of all experts, one activation, all down products
N streams      runs of experts, each with an activation of its own, on N streams that events fork and join: a run does so with 2
grouped GEMM   cuBLAS's grouped products: all gate|up products in one call, one activation, all down products in one call

Timed as queued, not as graphs: the rows of each expert change with every step. For the same reason grouped products
bring their addresses to the device in every step.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.bench.bed import Bed
from hpcmoe.bench.cases import ULP, differ
from hpcmoe.bench.record import FAILED, LATE, Section
from hpcmoe.bench.timing import Deadline, Timer, ring
from hpcmoe.cublas import GROUPED, NOT_SUPPORTED
from hpcmoe.device import to_host
from hpcmoe.kernels.swiglu import swiglu
from hpcmoe.model.dtypes import to_fp32

EXPERTS = (2, 4, 8)
ROWS, SKEWED_ROWS = (4, 16, 64, 256), 64  # per expert, on average
STREAMS = (2, 4)
ONE, GEMM = "one stream", "grouped GEMM"  # the first is what the others are held against
SECONDS = 0.1       # for each time


class Place(NamedTuple):
    """An expert's weights, gate|up [2 f, d] and down [d, f], and where its rows stand."""

    both_fd: object
    down_df: object
    rows: slice


class Step:
    """Experts of one rank with buffers for their rows, which stand one expert after the other.

    weights: gate|up and down of each expert; n_e: rows of each; one without rows has no place.
    """

    def __init__(self, bed: Bed, weights: list[tuple], n_e: list[int]):
        (d, f), rows, ends = weights[0][1].shape, sum(n_e), np.cumsum(n_e).tolist()
        self.gpu, self.kernels = bed.gpu, bed.kernels()
        self.x_id, self.y_id = bed.normal((rows, d)), bed.empty((rows, d), bed.t_dtype)
        self.both_if, self.h_if = bed.empty((rows, 2 * f), bed.t_dtype), bed.empty((rows, f), bed.t_dtype)
        self.places = [Place(*pair, slice(end - n, end)) for pair, n, end in zip(weights, n_e, ends) if n]

    def queue(self, places: list[Place]) -> None:
        """The step of neighbouring experts on the current lane."""
        rows = slice(places[0].rows.start, places[-1].rows.stop)
        for place in places:
            self.gpu.gemm(self.x_id[place.rows], place.both_fd, self.both_if[place.rows])
        swiglu(self.kernels, self.both_if[rows], self.h_if[rows], act="silu")
        for place in places:
            self.gpu.gemm(self.h_if[place.rows], place.down_df, self.y_id[place.rows])

    def spoil(self) -> None:
        """NaN in all that a step writes."""
        for array in (self.both_if, self.h_if, self.y_id):
            array.view(np.uint8)[...] = 0xFF


# ---------------------------------------------------------------- the ways
def spread(step: Step, sides: list) -> Callable[[], None]:
    """The experts in equal runs, one on the current lane and one on each of `sides`."""
    gpu, count = step.gpu, len(step.places)
    cuts = [i * count // (len(sides) + 1) for i in range(len(sides) + 2)]
    own, *others = (step.places[a:b] for a, b in zip(cuts, cuts[1:]))
    start, ends = gpu.event(), [gpu.event() for _ in sides]

    def call() -> None:
        here = gpu.current
        start.record()
        for lane, run, end in zip(sides, others, ends):
            lane.after(start)
            with lane:
                step.queue(run)
                end.record()
        step.queue(own)
        for end in ends:
            here.after(end)

    return call


def grouped(step: Step) -> Callable[[], None]:
    """Two grouped products around one activation, after one copy of the addresses of both."""
    gpu, places, dtype = step.gpu, step.places, step.x_id.dtype
    up = [(p.both_fd, step.x_id[p.rows], step.both_if[p.rows]) for p in places]
    down = [(p.down_df, step.h_if[p.rows], step.y_id[p.rows]) for p in places]
    up_shapes, down_shapes = ([(len(x), *weight.shape) for weight, x, _ in products] for products in (up, down))
    host, there = gpu.pinned((2, 3, len(places)), np.int64), gpu.empty((2, 3, len(places)), np.int64)
    host[...] = [[[array.data.ptr for array in kind] for kind in zip(*products)] for products in (up, down)]

    def call() -> None:
        gpu.copy(there, host)
        gpu.blas.grouped(gpu.current.handle, up_shapes, dtype, there[0])
        swiglu(step.kernels, step.both_if, step.h_if, act="silu")
        gpu.blas.grouped(gpu.current.handle, down_shapes, dtype, there[1])

    return call


def ways(step: Step, sides: list) -> dict[str, Callable[[], None]]:
    """By name, the product's own first; streams only where each has an expert."""
    found = {ONE: lambda: step.queue(step.places)}
    found |= {f"{n} streams": spread(step, sides[:n - 1]) for n in STREAMS if n <= len(step.places)}
    return found | {GEMM: grouped(step)}


# ---------------------------------------------------------------- the section
def skewed(experts: int, rows: int) -> list[int]:
    """Each expert takes three quarters of the rows that are left, the last one the rest: some may have none."""
    n_e, left = [], experts * rows
    for _ in range(experts - 1):
        n_e.append(left * 3 // 4)
        left -= n_e[-1]
    return [*n_e, left]


def deals(experts: int, small: bool) -> list[tuple[str, int, list[int]]]:
    """(name, rows per expert on average, rows of each) of what is measured."""
    rows, mean = (ROWS[:2], ROWS[0]) if small else (ROWS, SKEWED_ROWS)
    return [*(("balanced", n, [n] * experts) for n in rows), ("skewed", mean, skewed(experts, mean))]


def several(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Every way at some numbers of experts and rows, against one stream and against reading the weights at the copy rate.

    A way whose result is not that of plain products is not timed, and fails the section.
    """
    d, f = (64, 96) if bed.small else (5120, 8192)
    section.figures["copy_gb_per_s"] = bed.copy_gb_per_s()
    timer = Timer(bed.gpu, bed.small, graphs=False)
    sides = [bed.gpu.lane(products=True) for _ in range(max(STREAMS) - 1)]
    rings = {experts: ring(6 * experts * d * f, bed.small) for experts in EXPERTS}
    weights = [(bed.normal((2 * f, d), d**-0.5), bed.normal((d, f), f**-0.5)) for _ in range(max(e * n for e, n in rings.items()))]
    for experts, count in rings.items():
        for deal, rows, n_e in deals(experts, bed.small):
            if deadline.over:
                if section.status != FAILED:
                    section.status, section.error = LATE, f"{experts} experts, {rows} rows, {deal} and what follows it were left out"
                return
            steps = [Step(bed, weights[i * experts:(i + 1) * experts], n_e) for i in range(count)]
            _case(section, timer, [ways(step, sides) for step in steps], steps[0], {"experts": experts, "rows": rows, "deal": deal})


def _case(section: Section, timer: Timer, calls: list[dict], step: Step, case: dict) -> None:
    """Points of all ways, whose calls are on equal steps, the first on `step`; a note names the fastest."""
    words = f"{case['experts']} experts, {case['rows']} rows each on average, {case['deal']}"
    step.gpu.event().record().wait()  # what made the buffers, on another stream
    with timer.lane:
        refused = {GEMM: why} if (why := _refusal(step.gpu, calls[0][GEMM])) else {}
        want = _plain(step)
        faults = {way: fault for way, call in calls[0].items() if way not in refused and (fault := _fault(step, call, want))}
    for way, fault in faults.items():
        section.status, section.error = FAILED, section.error or f"{words}: {way}: {fault}"
        section.notes.append(f"{words}: {way}: {fault}")
    if ONE in faults:
        return
    times = {way: timer([of[way] for of in calls], SECONDS).ms for way in calls[0] if way not in refused | faults}
    again = timer([of[ONE] for of in calls], SECONDS).ms  # before and after: the clock may move
    spread_ms, times[ONE] = abs(again - times[ONE]), (again + times[ONE]) / 2
    weights_ms = 1e-6 * sum(p.both_fd.nbytes + p.down_df.nbytes for p in step.places) / section.figures["copy_gb_per_s"]
    for way, ms in times.items():
        section.add_point("several", **case, way=way, time_ms=ms, over_one_stream_ratio=ms / times[ONE], over_weights_ratio=ms / weights_ms)
    section.points["several"][-len(times)]["spread_ms"] = spread_ms
    for way, why in refused.items():
        section.add_point("several", **case, way=way, refused=why)
    best = min(times, key=times.get)
    section.notes.append(f"{words}: fastest is {best}, {times[best]:.4g} ms, {times[best] / times[ONE]:.3f} of {ONE}")


def _refusal(gpu, call: Callable[[], None]) -> str:
    """Why this cuBLAS does not take grouped products, "" where it does."""
    if not gpu.blas.has_grouped:
        return f"this cuBLAS has no {GROUPED}: CUDA 12.5 and later have it"
    try:
        call()
    except gpu.blas.cublas.CUBLASError as error:
        if error.status != NOT_SUPPORTED:
            raise
        return f"{GROUPED}: {error}"
    return ""


def _plain(step: Step) -> np.ndarray:
    """y of the step, one expert after the other and nothing at once."""
    step.spoil()
    for place in step.places:
        step.queue([place])
        step.gpu.event().record().wait()
    return to_host(step.y_id)


def _fault(step: Step, call: Callable[[], None], want: np.ndarray) -> str:
    """"" where a way gives `want`, but for what 16-bit hidden values and results are rounded to: a unit or two of the last place."""
    step.spoil()
    call()
    got, dtype = to_host(step.y_id), step.kernels.dtype
    if not np.isfinite(to_fp32(want)).all():
        return "plain products give numbers that are not finite"
    return "" if np.array_equal(got, want) else differ("y", got, want, dtype, 2 * ULP[dtype], floor=0.1)
