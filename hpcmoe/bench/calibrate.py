"""Section `calibrate`: what the simulator is calibrated with, on this GPU: times of the kernels, products, launches and copies
that a run makes. cluster/gpu_fit.py fits a calibration to it, here or elsewhere.

Each item is measured by itself: one that fails, or for which there is no time, is noted by its name with the reason, and the
others go on.
"""

from __future__ import annotations

import sys
import time
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np

from hpcmoe.bench import kernels, layers
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.jobs import JobFailed
from hpcmoe.bench.record import FAILED, Section
from hpcmoe.bench.timing import Deadline, Timer, ring
from hpcmoe.errors import UserError
from hpcmoe.kernels import loader, norm

SECONDS = 0.02     # of one case
SEVERAL = 30       # repetitions on the host's clock
HOST = layers.Shape("host", 4, 256, 256, 2, 1, 4, 2, 64)  # so little for the device that the host is what takes time
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
NK = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (2048, 8192), (8192, 8192), (16384, 2048), (16384, 4096), (4096, 16384),
      (28672, 4096), (5120, 8192), (16384, 5120), (3072, 6144))
HEADS = ((32, 8, 128), (16, 16, 128))
DECODE = tuple((sequences, context) for sequences in (1, 8, 32, 128, 512) for context in (128, 512, 2048, 8192) if sequences * context <= 1 << 18)
PREFILL = ((1, 128), (8, 128), (64, 128), (1, 512), (8, 512), (32, 512), (1, 2048), (4, 2048), (1, 8192))
PASSES = ((1, 4096), (16, 4096), (256, 4096), (1024, 2048), (4096, 4096), (1024, 8192))  # rows, width
COPIES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
LATE = "out of time"


class Item(NamedTuple):
    """measure(bed, section, deadline) adds points or figures to the section; seconds: the most that it may take."""

    name: str
    measure: Callable[[Bed, Section, Deadline], None]
    seconds: float


def run(bed: Bed, section: Section, deadline: Deadline) -> None:
    """All items. The section fails where one of them was not measured, in whole or in part."""
    missing: dict[str, str] = {}
    for item in ITEMS:
        start, within = time.monotonic(), Deadline(min(item.seconds * (100 if bed.small else 1), deadline.left()))
        try:
            if deadline.over:
                raise TimeoutError(LATE)
            item.measure(bed, section, within)
        except Exception as error:  # pylint: disable=broad-except
            words = str(error) if isinstance(error, (TimeoutError, UserError, JobFailed)) else f"{type(error).__name__}: {error}"
            missing[item.name] = words.strip().splitlines()[-1]
            section.add_point("not_measured", item=item.name, why=missing[item.name])
        took = time.monotonic() - start
        print(f"calibrate: {item.name}: " + (f"not measured: {missing[item.name]}" if item.name in missing else f"{took:.1f} s"),
              file=sys.stderr, flush=True)
        bed.release()
        bed.keep()
    if missing:
        section.status = FAILED
        section.error = "; ".join(f"{name}: not measured: {why}" for name, why in missing.items())


def _in_time(deadline: Deadline, cases: Iterable) -> Iterator:
    """The cases for which there is time. Raises TimeoutError, naming the first that is left out."""
    for case in cases:
        if deadline.over:
            raise TimeoutError(f"{LATE}: {getattr(case, 'name', case)} and what follows it")
        yield case


# ---------------------------------------------------------------- the host's clock
def _settled(bed: Bed) -> float:
    """Now, with nothing queued."""
    bed.gpu.runtime.deviceSynchronize()
    return time.perf_counter()


def _host_s(bed: Bed, call: Callable[[], None], calls: int) -> float:
    """Seconds of the host for one of so many calls in a row that queue work: the median of several rows."""
    found = []
    with bed.timer.lane:
        call()
        for _ in range(2 if bed.small else SEVERAL):
            start = _settled(bed)
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - start) / calls)
    return float(np.median(found))


def _little(bed: Bed) -> dict[str, Callable[[], None]]:
    """Calls that give the device next to nothing to do."""
    gpu, m, d = bed.gpu, bed.kernels(), 256
    x_td, out_td, weight_d = bed.normal((4, d), kind="fp32"), bed.empty((4, d), bed.t_dtype), bed.upload(np.ones(d, np.float32))
    a_td, w_dd, b_td = bed.normal((4, d)), bed.normal((d, d), d**-0.5), bed.empty((4, d), bed.t_dtype)
    event = gpu.event()
    return {"kernel": lambda: norm.norm(m, x_td, out_td, weight_d, eps=1e-5), "product": lambda: gpu.gemm(a_td, w_dd, b_td),
            "copy": lambda: gpu.copy(b_td, a_td), "event": event.record}


def _launches(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Host time to queue one kernel, product, copy, event."""
    for name, call in _in_time(deadline, _little(bed).items()):
        section.add_point("launch", call=name, host_us=1e6 * _host_s(bed, call, 100))


def _graphs(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Host time to start a graph of so many kernels, and the device's time for it: from start to start, in a row."""
    call, timer = _little(bed)["kernel"], bed.timer
    for nodes in _in_time(deadline, (1, 5, 20)):
        with timer.lane:
            call()
            graph = timer.lane.capture(lambda n=nodes: [call() for _ in range(n)])
            graph.launch(timer.lane.stream)
        host = _host_s(bed, lambda g=graph: g.launch(timer.lane.stream), 20)
        section.add_point("graph", nodes=nodes, host_us=1e6 * host, device_us=1e3 * timer([call] * nodes, SECONDS).ms * nodes)


def _syncs(bed: Bed, section: Section, deadline: Deadline) -> None:
    """What passes from the end of a launch until the host, which polls an event as the engine does, or waits for it, goes on; the
    device's own time, known from many such copies in a row, left out."""
    gpu, timer, n = bed.gpu, bed.timer, 1 << 20 if bed.small else 64 << 20  # tens of microseconds: longer than a launch takes
    source, target = bed.empty((n,), np.uint8), bed.empty((n,), np.uint8)
    device_s = 1e-3 * timer([lambda: gpu.copy(target, source)] * 4, SECONDS).ms
    for how in _in_time(deadline, ("poll", "wait")):
        found = []
        with timer.lane:
            for _ in range(2 if bed.small else SEVERAL):
                _settled(bed)
                gpu.copy(target, source)
                launched, event = time.perf_counter(), gpu.event().record()
                if how == "wait":
                    event.wait()
                while not event.done:
                    pass
                found.append(time.perf_counter() - launched - device_s)
        section.add_point("sync", how=how, host_us=1e6 * float(np.median(found)))


def _engine(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Host time of the engine's ops in decode steps of a model that gives the device little to do, with graphs and without: of a
    run less that of a shorter one, since the first steps load what all others use."""
    shape = layers.TINY if bed.small else HOST
    for graphs in _in_time(deadline, (True, False)):
        short, long = (_engine_totals(layers.throughput(bed, shape, 8 if bed.small else 64, deadline, **{
            "run.graphs": graphs, "throughput.output_tokens": tokens})) for tokens in ((6, 12) if bed.small else (48, 144)))
        more = {name: long[name] - short[name] for name in long}
        section.add_point("engine", graphs=int(graphs), layers=shape.layers, ops=more["steps"] * (7 * shape.layers + 2), **more)


def _engine_totals(report: dict) -> dict:
    """Steps, host seconds and launches of a run."""
    busy = {f"{name}_busy_s": phase["busy_s"] for name, phase in report["phases"].items() if phase.get("busy_s")}
    return {"steps": report["steps"]["steps"], "busy_s": sum(busy.values()), **busy, **report["run"]["gpu_work"]}


# ---------------------------------------------------------------- the device's clock
def _copy_rate(bed: Bed, section: Section, deadline: Deadline) -> None:
    section.figures["copy_gb_per_s"] = bed.copy_gb_per_s()


def _pinned(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Copies between device and pinned host memory, queued one after the other."""
    gpu, timer = bed.gpu, Timer(bed.gpu, bed.small, graphs=False)
    for nbytes in _in_time(deadline, COPIES[:2] if bed.small else COPIES):
        host, there = gpu.pinned((nbytes,), np.uint8), bed.empty((nbytes,), np.uint8)
        host[:] = 0x5A
        for way, target, source in (("to host", host, there), ("to device", there, host)):
            timed = timer([lambda t=target, s=source: gpu.copy(t, s)] * 4, SECONDS)
            section.add_point("pinned", way=way, copied_bytes=nbytes, time_us=1e3 * timed.ms)


def _timed(bed: Bed, load: kernels.Load) -> float:
    calls = [load.make() for _ in range(ring(load.nbytes, bed.small))]
    return 1e3 * bed.timer(calls, SECONDS).ms


def _passes(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Kernels that pass over rows once; bytes as the simulator counts them."""
    for t, d in _in_time(deadline, ((16, 64),) if bed.small else PASSES):
        loads = [*kernels.norms(bed, t, d), *kernels.moves(bed, t, d), *kernels.routers(bed, t, 16 if bed.small else 64, 2),
                 *kernels.around_attention(bed, t)]
        for load in _in_time(deadline, [load for load in loads if "fp8" not in load.name]):
            section.add_point("pass", kernel=load.name, moved_bytes=load.nbytes, time_us=_timed(bed, load))


def _decode(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Attention of one new row per sequence."""
    for heads, kv_heads, c in ((4, 2, 16),) if bed.small else HEADS:
        for sequences, context in _in_time(deadline, ((1, 80), (3, 80)) if bed.small else DECODE):
            time_us = _timed(bed, kernels.decode(bed, (heads, kv_heads, c), sequences, context))
            section.add_point("decode", heads=heads, kv_heads=kv_heads, head_dim=c, sequences=sequences, context=context, time_us=time_us)


def _prefill(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Attention of whole prompts."""
    for heads, kv_heads, c in ((4, 2, 16),) if bed.small else HEADS[:1]:
        for sequences, length in _in_time(deadline, ((1, 40), (2, 40)) if bed.small else PREFILL):
            time_us = _timed(bed, kernels.prefill(bed, (heads, kv_heads, c), sequences, length))
            section.add_point("prefill", heads=heads, kv_heads=kv_heads, head_dim=c, sequences=sequences, length=length, time_us=time_us)


def _products(bed: Bed, section: Section, deadline: Deadline) -> None:
    """y[m, n] = x[m, k] W[n, k]^T."""
    gpu, shapes = bed.gpu, ((96, 64), (64, 96), (128, 128), (192, 64)) if bed.small else NK
    for n, k in _in_time(deadline, shapes):
        weights = [bed.normal((n, k), k**-0.5) for _ in range(ring(2 * n * k, bed.small))]
        for m in _in_time(deadline, (1, 2, 4, 8, 16, 32) if bed.small else ROWS):
            x_mk, y_mn = bed.normal((m, k)), bed.empty((m, n), bed.t_dtype)
            timed = bed.timer([lambda w=w: gpu.gemm(x_mk, w, y_mn) for w in weights], SECONDS)
            section.add_point("gemm", m=m, n=n, k=k, time_ms=timed.ms)
        del weights


def _compile(bed: Bed, section: Section, deadline: Deadline) -> None:
    """So that no kernel's compilation, once per machine, counts as an item's time."""
    bed.kernels().compile(loader.names())


ITEMS = (Item("compilation", _compile, 120), Item("copy rate", _copy_rate, 3), Item("launches", _launches, 2), Item("graphs", _graphs, 2),
         Item("waits", _syncs, 2), Item("pinned copies", _pinned, 3), Item("passes over rows", _passes, 10),
         Item("attention, decode", _decode, 10), Item("attention, prefill", _prefill, 6), Item("products", _products, 16),
         Item("engine", _engine, 30))
