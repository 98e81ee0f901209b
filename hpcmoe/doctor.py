"""`hpcmoe doctor`: what this machine, its MPI and its libraries can do, and whether a run could start.

Alone it looks at one process; below mpiexec or srun it asks all ranks. Libraries are imported where
they are looked at, so that a missing one is a line of the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcmoe import device
from hpcmoe.environment import AloneError, env_rank, launched_size, local_rank, node_name
from hpcmoe.errors import EXIT_OK, EXIT_USER, UserError
from hpcmoe.launch import start_mpi, vendor_name

EXAMPLES = """examples:
  hpcmoe doctor
  mpiexec -n 16 hpcmoe doctor
  srun -n 64 --mpi=pmi2 hpcmoe doctor --json
"""
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")
GB = 1e9


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, the problem that keeps a run from starting, a warning; "" for none."""

    name: str
    value: str
    problem: str = ""
    warning: str = ""


def add_parser(subparsers) -> None:
    """Adds `doctor` to the sub-commands."""
    parser = subparsers.add_parser(
        "doctor", help="what this machine can do, and whether a run could start", epilog=EXAMPLES,
        description="Shows MPI, transports, GPUs, libraries, memory and threads; exit code 0 only when a run could start.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(handler=run)


def run(args) -> int:
    """Looks, prints on rank 0, and returns EXIT_OK or EXIT_USER, the same on every rank."""
    checks, MPI, comm = [], None, None
    try:
        device.early_context(local_rank(os.environ), os.environ)
        MPI = start_mpi()
        from hpcmoe.parallel.watched import Watched
        comm = Watched(MPI.COMM_WORLD)
        checks += mpi_checks(MPI, comm)
    except AloneError as error:
        if env_rank(os.environ):
            raise  # the first of these lonely processes prints for all
        checks.append(Check("MPI", "does not fit the launcher", str(error)))
    except UserError as error:
        checks.append(Check("MPI", "none", str(error)))
    facts = local_facts()
    more, line, transports = gpu_part(MPI, comm)
    mine = facts | {check.name: check for check in more}, line
    every = [mine] if comm is None else comm.gather(mine)
    if comm is None or comm.rank == 0:
        checks += transport_checks(transports) + merge([facts for facts, _ in every])
        report(checks, args.json, transports, [{"rank": rank, **line} for rank, (_, line) in enumerate(every) if line])
    problems = any(check.problem for check in checks)
    if comm is not None:
        problems = comm.bcast(problems)
    return EXIT_USER if problems else EXIT_OK


# ---------------------------------------------------------------- MPI
def mpi_checks(MPI, comm) -> list[Check]:
    """Library, thread level, launcher, ranks per node. Collective over comm, of all ranks."""
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
              MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple"}
    numbers = ".".join(str(number) for number in MPI.get_vendor()[1])
    launched = launched_size(os.environ)
    places = comm.allgather((node_name(os.environ), sorted(os.sched_getaffinity(0))))
    nodes = Counter(name for name, _ in places)
    cores = {name: len({core for at, mine in places if at == name for core in mine}) for name in nodes}
    worst = min(nodes, key=lambda name: cores[name] / nodes[name])
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    sharing = comm.allgather(shared.size)
    shared.Free()
    return [
        Check("MPI", f"{vendor_name(MPI)} {numbers}, MPI {'.'.join(map(str, MPI.Get_version()))}"),
        Check("threads in MPI", levels[MPI.Query_thread()]),
        Check("launcher", launched.source if launched else "none (one process)"),
        Check("ranks", f"{comm.size} on {len(nodes)} node{'s' * (len(nodes) > 1)}: "
              + ", ".join(f"{name} {count}" for name, count in list(nodes.items())[:8]) + ", ..." * (len(nodes) > 8)),
        Check("ranks sharing memory", _span(sharing)),
        Check("cores per rank", f"{cores[worst] / nodes[worst]:.3g} ({cores[worst]} for {nodes[worst]} on {worst})"),
    ]


def gpu_part(MPI, comm) -> tuple[list[Check], dict, dict[str, dict[str, str]]]:
    """(checks, this rank's line of the table of GPUs, faults of the transports). Collective over comm.

    comm None: a process without MPI; its transports are {}. The line is {} without a GPU.
    """
    from hpcmoe import doctor_gpu
    choice, checks = doctor_gpu.choose(comm)
    gpu, more = doctor_gpu.open_gpu(choice)
    line = {"host": node_name(os.environ), **doctor_gpu.row(choice, gpu)} if choice else {}
    if comm is None:
        return checks + more, line, {}
    return checks + more + [doctor_gpu.mpi_check(MPI)], line, doctor_gpu.transports(comm, gpu)


def transport_checks(transports: dict[str, dict[str, str]]) -> list[Check]:
    """Whether any transport can be used; none for a process without MPI."""
    if not transports:
        return []
    good = [name for name, faults in transports.items() if not faults["host"]]
    return [Check("transports", ", ".join(good) or "none", "" if good else "no transport passes its self-test")]


# ---------------------------------------------------------------- this process
def local_facts() -> dict[str, Check]:
    """What this process sees, by name."""
    checks = [*_machine(), *_arithmetic(), *_files(), *_gpus()]
    return {check.name: check for check in checks}


def _machine() -> list[Check]:
    from hpcmoe import memory
    model, flags = cpu()
    free = memory.available()
    return [
        Check("Python", platform.python_version()),
        Check("interpreter", sys.executable),
        Check("hpcmoe", _version("hpcmoe")),
        Check("CPU", model),
        Check("CPU features", " ".join(name for name in FEATURES if name in flags) or "none of those that matter here"),
        Check("cores", str(memory.cores())),
        Check("memory", f"{memory.total() / GB:.1f} GB, {free / GB:.1f} GB free",
              "" if free > 0.2 * GB else "less than 0.2 GB of memory is free"),
    ]


def cpu() -> tuple[str, set[str]]:
    """Model name and feature flags of the first core, from /proc/cpuinfo."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), set(flags.split())


def processor() -> str:
    """The CPU in words that tell it from others: model name, family and model."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    numbers = ", ".join(f"{name.lstrip('cpu ')} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return cpu()[0] + (f" ({numbers})" if numbers else "")


def _arithmetic() -> list[Check]:
    try:
        import numpy
    except ImportError as error:
        return [Check("NumPy", "missing", f"NumPy does not import: {error}")]
    checks = [Check("NumPy", f"{numpy.__version__}, BLAS: {_blas(numpy)}"),
              Check("threads per rank", _threads())]
    from hpcmoe import linear
    for dtype in linear.DTYPES:
        try:
            backend = linear.choose("auto", dtype)
            checks.append(Check(f"products in {dtype}", f"{backend.name} {backend.version}"))
        except UserError as error:
            checks.append(Check(f"products in {dtype}", f"not here: {error}", str(error) if dtype == "fp32" else ""))
    return checks + [Check(f"backend {name}", f"not here: {fault}") for name, fault in linear.backends().items() if fault]


def _blas(numpy) -> str:
    try:
        blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    except (TypeError, KeyError):  # before NumPy 1.25
        return "unknown"
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _threads() -> str:
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return f"{os.environ[name]} ({name})"
    return "as many as cores (OMP_NUM_THREADS is not set)"


def _files() -> list[Check]:
    try:
        h5py = importlib.import_module("h5py")
        checks = [Check("HDF5", f"{h5py.version.hdf5_version}, h5py {h5py.__version__}")]
    except ImportError as error:
        checks = [Check("HDF5", "missing", f"h5py does not import: {error}")]
    for name, use in (("tokenizers", "text prompts"), ("jinja2", "chat messages")):
        checks.append(Check(name, _version(name) if _imports(name) else f"missing; {use} need hpcmoe[text]"))
    return checks


def _gpus() -> list[Check]:
    from hpcmoe import doctor_gpu
    return doctor_gpu.checks()


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _version(name: str) -> str:
    from importlib import metadata
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---------------------------------------------------------------- all ranks together
SAME = ("hpcmoe", "Python", "NumPy", "HDF5")  # must not differ between ranks


def merge(every: list[dict[str, Check]]) -> list[Check]:
    """One line per name over all ranks: the value where it is the same, else the values with their first ranks."""
    merged = []
    for name in dict.fromkeys(name for facts in every for name in facts):
        found = [facts.get(name, Check(name, "-")) for facts in every]
        values = list(dict.fromkeys(check.value for check in found))
        ranks = [next(rank for rank, check in enumerate(found) if check.value == value) for value in values]
        value, problem = values[0], next((check.problem for check in found if check.problem), "")
        warning = next((check.warning for check in found if check.warning), "")
        if len(values) > 1 and name == "memory":  # ranks look one after the other
            value = min(values, key=lambda text: float(text.split()[-3]))
        elif len(values) > 1:
            value = "; ".join(f"rank {rank}: {text}" for rank, text in list(zip(ranks, values))[:4]) + "; ..." * (len(values) > 4)
            if name in SAME:
                problem = problem or f"{name} differs between ranks"
        merged.append(Check(name, value, problem, warning))
    return merged


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def report(checks: list[Check], as_json: bool, transports: dict[str, dict[str, str]], gpus: list[dict]) -> None:
    """Prints tables, or one JSON object {"ok", "checks": [{"name", "value", "problem", "warning"}],
    "transports": {name: {"host", "device"}} (faults, "" for a pass), "gpus": [a line per rank]}."""
    problems = [check for check in checks if check.problem]
    if as_json:
        print(json.dumps({"ok": not problems, "checks": [asdict(check) for check in checks], "transports": transports,
                          "gpus": gpus}, indent=1))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.name:<{width}}  {check.value}")
    if transports:
        print(f"\n{'transport':<12}  {'host buffers':<14}  device buffers")
        for name, faults in transports.items():
            print(f"{name:<12}  {faults['host'] or 'pass':<14}  {faults['device'] or 'pass'}")
    if gpus:
        print(f"\n{'rank':>4}  {'host':<16}  {'memory, free':<16}  capability  GPU")
        for line in gpus:
            memory = f"{line['memory_gb']}, {line['free_gb']} GB"
            print(f"{line['rank']:>4}  {line['host']:<16}  {memory:<16}  {line['capability']:<10}  {line['name']}, {line['gpu']}")
    for check in checks:
        if check.warning:
            print(f"\nWARNING, {check.name}: {check.warning}")
    for check in problems:
        print(f"\nPROBLEM, {check.name}: {check.problem}")
    print("\nA run could start here." if not problems else "\nA run could not start here.")
