"""`hpcmoe bench gpu`: runs sections of measurements one after the other, each with a budget of time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

from hpcmoe import device
from hpcmoe.bench import calibrate, compare, correct, demo, experts, jobs, kernels, layers, record, several
from hpcmoe.bench.bed import Bed, Options
from hpcmoe.bench.record import FAILED, LATE, SKIPPED, Section
from hpcmoe.bench.timing import Deadline
from hpcmoe.errors import EXIT_FAILED, EXIT_OK, UserError

BUDGET_S = 480.0
SLOW = 20  # a section's budget is so much longer at the small scale, where a CPU may play the GPU
LOOKALIKE = "look-alike"  # in the name of the device that tests use: its figures are no measurements
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "memory.total")


class Part(NamedTuple):
    """One section: what it does, its budget in seconds, its help."""

    run: Callable[[Bed, Section, Deadline], None]
    seconds: float
    words: str


PARTS: dict[str, Part] = {
    "correct": Part(correct.correct, 120, "every kernel against its NumPy twin"),
    "expert": Part(experts.expert, 25, "expert step against the bare cuBLAS pair"),
    "wide": Part(experts.wide, 15, "expert of hidden 8192, width 32768 against the copy rate"),
    "several": Part(several.several, 25, "several experts on a rank: one stream, more streams, grouped GEMM"),
    "kernels": Part(kernels.run, 45, "rate of each other kernel"),
    "gemm": Part(experts.gemm, 30, "products for the simulator"),
    "peers": Part(compare.peers, 45, "PyTorch's and transformers' experts"),
    "layer": Part(layers.layer, 110, "one decode layer, end to end"),
    "model": Part(demo.model, 60, "the shipped model: speed and parity"),
    "stack": Part(layers.stack, 110, "Mixtral- and Scout-shaped layers against transformers"),
    "exchange": Part(layers.exchange, 90, "ranks that share the GPU (needs --mpiexec)"),
    "calibrate": Part(calibrate.run, 150, "all that the simulator is calibrated with"),
}


def bench(out: str, only: list[str], budget_s: float, options: Options) -> int:
    """Runs the sections `only` (all where empty), writes `out` and prints the table; the exit code.

    EXIT_FAILED where a section ended in an error or a kernel is not correct; goals that are missed
    do not count. Raises UserError where there is no GPU.
    """
    gpu = open_gpu()
    start = time.monotonic()
    whole = Deadline(budget_s)
    head = {"date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "scale": "small" if options.small else "full",
            "dtype": options.dtype, "measured": LOOKALIKE not in gpu.name, "budget_s": budget_s, "device": facts(gpu),
            "versions": versions()}
    sections: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="hpcmoe-bench-") as folder:
        bed = Bed(gpu, options, Path(folder))
        bed.keep = lambda: record.write(out, head, sections)
        for name in only or PARTS:
            _say(f"{name}: {PARTS[name].words}")
            sections.append(Section(name))
            _run(bed, sections[-1], whole)
            _say(f"{name}: {sections[-1].status} after {sections[-1].seconds:.1f} s" + _last_line(sections[-1].error))
            head["elapsed_s"] = round(time.monotonic() - start, 3)
            head["device"] |= {"clocks_after": clocks(gpu)}
            bed.keep()  # what was found so far is kept whatever comes
    print(record.table(head, sections))
    print(f"written to {out}")
    return EXIT_FAILED if any(s.status == FAILED for s in sections) else EXIT_OK


def open_gpu():
    """The first visible GPU. UserError where there is none."""
    _, reason = device.cupy_status()
    if reason:
        raise UserError(f"bench gpu: no GPU can be used: {reason}")
    return device.Gpu(0)


def _run(bed: Bed, section: Section, whole: Deadline) -> None:
    """One section; whatever goes wrong in it is its result."""
    name, start = section.name, time.monotonic()
    if whole.over:
        section.status, section.error = SKIPPED, "no time left"
        return
    deadline = Deadline(min(PARTS[name].seconds * (SLOW if bed.small else 1), whole.left()))
    try:
        PARTS[name].run(bed, section, deadline)
    except Exception as error:  # pylint: disable=broad-except
        late = isinstance(error, jobs.JobFailed) and deadline.over
        section.status, section.error = LATE if late else FAILED, f"{type(error).__name__}: {error}"
        if not isinstance(error, (UserError, jobs.JobFailed)):
            section.notes += traceback.format_exc().splitlines()
    section.seconds = time.monotonic() - start
    bed.release()


def _last_line(error: str) -> str:
    return f": {error.splitlines()[-1]}" if error else ""


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what was measured
def facts(gpu) -> dict:
    """Name, capability, memory, CUDA and driver versions, clocks of the GPU."""
    runtime = gpu.xp.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return {"name": gpu.name, "compute_capability": ".".join(map(str, gpu.capability)), "multiprocessors": gpu.sms,
            "memory_bytes": int(properties["totalGlobalMem"]), "l2_bytes": int(properties["l2CacheSize"]),
            "cuda_runtime": _dotted(runtime.runtimeGetVersion()), "cuda_of_driver": _dotted(runtime.driverGetVersion()),
            "cupy": gpu.xp.__version__, "clocks_before": clocks(gpu)}


def _dotted(number: int) -> str:
    """13000 -> 13.0, as CUDA counts."""
    return f"{number // 1000}.{number % 1000 // 10}"


def clocks(gpu) -> dict[str, str]:
    """What nvidia-smi says now of driver, clocks, power and temperature, with units; {} where there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None or LOOKALIKE in gpu.name:
        return {}
    ask = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    for more in ([f"--id={gpu.info.pci}"], []):  # some virtual machines show another address
        done = subprocess.run(ask + more, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0 and done.stdout.strip():
            break
    else:
        return {}
    return dict(zip(QUERY, (cell.strip() for cell in done.stdout.splitlines()[0].split(","))))


def version(name: str) -> str:
    """The installed version of a distribution, "not installed" where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of what computes and what is compared with."""
    return {"hpcmoe": version("hpcmoe"), "python": platform.python_version(), "numpy": version("numpy"), "torch": version("torch"),
            "transformers": version("transformers"), "cpus": str(len(os.sched_getaffinity(0)))}
