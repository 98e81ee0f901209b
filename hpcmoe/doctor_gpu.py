"""The GPU part of `hpcmoe doctor`: driver and CuPy, the GPU of each rank, transports on device buffers."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpcmoe import affinity, device
from hpcmoe.doctor import Check
from hpcmoe.environment import local_rank, local_size, node_name
from hpcmoe.errors import UserError
from hpcmoe.kernels.loader import Kernels

WITH_HEADERS = ["attention_prefill.cu", "permute.cu"]  # kernels that take headers of the CUDA toolkit, together all of them
NEEDED_DRIVER = {12: "525", 13: "580"}  # the oldest driver branch for each CUDA that CuPy has wheels for
LIBRARIES = "`pip install hpcmoe[{extra}]` brings the CUDA libraries; so does the site's CUDA module"
SHOWN = ("MPICH_GPU_SUPPORT_ENABLED", "MPICH_GPU_IPC_ENABLED", "MPIR_CVAR_NOLOCAL", "OMPI_MCA_pml",
         "OMPI_MCA_btl", "UCX_TLS", "UCX_NET_DEVICES", "UCX_MEMTYPE_CACHE", "CUDA_VISIBLE_DEVICES")
GB = 1e9


# ---------------------------------------------------------------- driver and CuPy
@dataclass(frozen=True)
class Machine:
    """devices: NVIDIA devices there are, and `mine` of them this process may open; driver: its version,
    "" for none; cuda: the newest CUDA it knows, (0, 0) for none; wheels: CuPy's distributions -> versions;
    hidden: CUDA_VISIBLE_DEVICES, None where it is not set."""

    devices: int = 0
    mine: int = 0
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    wheels: tuple[tuple[str, str], ...] = ()
    hidden: str | None = None

    def built_for(self) -> int:
        """The CUDA of the CuPy wheel, 0 where its name does not tell."""
        found = [re.search(r"cuda(\d+)x$", name) for name, _ in self.wheels]
        return int(found[0].group(1)) if found and found[0] else 0

    def extra(self) -> str:
        """The extra of hpcmoe that fits the driver."""
        return "cuda12" if self.cuda[0] == 12 else "cuda13" if self.cuda[0] > 12 else "cuda12] or hpcmoe[cuda13"


def machine(root="/") -> Machine:
    """What the system says about its GPUs, without CUDA's runtime."""
    paths = [path for path in Path(root, "dev").glob("nvidia*") if path.name[6:].isdigit()]
    version = Path(root, "proc/driver/nvidia/version")
    text = version.read_text() if version.exists() else ""
    driver = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    wheels = {(d.metadata["Name"].lower(), d.version) for d in metadata.distributions()
              if re.fullmatch(r"cupy(-cuda\w+)?", (d.metadata["Name"] or "").lower())}
    return Machine(len(paths), sum(map(_opens, paths)), driver.group(1) if driver else "", driver_cuda(),
                   tuple(sorted(wheels)), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _opens(path: Path) -> bool:
    """Whether this process may use a device: a batch system can leave it in view and forbid it."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def driver_cuda() -> tuple[int, int]:
    """The newest CUDA that the installed driver knows, (0, 0) without a driver."""
    number = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def diagnose(reason: str, m: Machine) -> Check:
    """Why no GPU can be used (`reason` is CuPy's), and whether that is a problem: only where there is a GPU
    that this process may use, and CuPy was installed to use it."""
    if not m.mine or not m.wheels:
        there = f"{m.devices} NVIDIA device{'s' * (m.devices != 1)}, " if m.devices else ""
        kept = "none is given to this process; " if m.devices and not m.mine else ""
        hint = f"GPUs are not used: `pip install hpcmoe[{m.extra()}]` installs CuPy" if m.mine else ""
        return Check("GPUs", f"{there or 'none '}({kept}{reason})", warning=hint)
    value, (major, minor) = f"none of {m.mine} can be used", m.cuda
    if m.hidden in ("", "-1", "NoDevFiles"):
        return Check("GPUs", f"none of {m.mine}: CUDA_VISIBLE_DEVICES = {m.hidden!r} hides them")
    if not major:
        problem = ("the driver's library libcuda.so.1 does not load: install the NVIDIA driver; in a container, start that "
                   "with its GPU option (apptainer: --nv, docker: --gpus all)")
    elif m.built_for() > major:
        problem = (f"the driver is too old for this CuPy: {m.wheels[0][0]} wants a driver of {NEEDED_DRIVER.get(m.built_for(), '?')} "
                   f"or later, {m.driver or 'this one'} knows CUDA {major}.{minor}: " +
                   (f"`pip uninstall {m.wheels[0][0]}` and `pip install hpcmoe[{m.extra()}]`" if major in NEEDED_DRIVER
                    else "have a newer driver installed"))
    elif 0 < m.built_for() < min(NEEDED_DRIVER):
        problem = f"{m.wheels[0][0]} is for another CUDA: `pip uninstall {m.wheels[0][0]}` and `pip install hpcmoe[{m.extra()}]`"
    else:
        problem = f"no GPU can be used although {m.mine} NVIDIA device{'s are' if m.mine > 1 else ' is'} here: {reason}"
    return Check("GPUs", value, problem)


def checks() -> list[Check]:
    """GPUs, driver, and the CUDA libraries that kernels and matrix products need."""
    m = machine()
    cupy, reason = device.cupy_status()
    found = []
    if cupy is None:
        found.append(diagnose(reason, m))
    else:
        names: dict[str, int] = {}
        for gpu in device.gpus():
            names[gpu.name] = names.get(gpu.name, 0) + 1
        found.append(Check("GPUs", ", ".join(f"{count} x {name}" for name, count in names.items())))
        found.append(Check("CuPy", f"{cupy.__version__}, " + _libraries(cupy), _missing(cupy, m)))
    if len(m.wheels) > 1:
        names = [name for name, _ in m.wheels]
        found.append(Check("CuPy wheels", ", ".join(names), warning=f"several are installed: `pip uninstall {' '.join(names)}`, "
                           f"then `pip install hpcmoe[{m.extra()}]`"))
    if m.driver or m.cuda[0]:
        found.append(Check("NVIDIA driver", f"{m.driver or 'version unknown'}, CUDA {m.cuda[0]}.{m.cuda[1]}"))
    return found


def _libraries(cupy) -> str:
    version = cupy.cuda.runtime.runtimeGetVersion()
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _missing(cupy, m: Machine) -> str:
    """The first library that kernels and products need and that does not load, "" if all do."""
    for name, look in (("NVRTC", lambda: cupy.cuda.nvrtc.getVersion()), ("cuBLAS", lambda: cupy.cuda.cublas)):
        try:
            look()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return f"{name} does not load ({str(error).strip().splitlines()[0]}): " + LIBRARIES.format(extra=m.extra())
    return ""


# ---------------------------------------------------------------- the GPU of each rank
def choose(comm) -> tuple[affinity.Choice | None, list[Check]]:
    """This rank's GPU by hpcmoe.affinity, together with the other ranks of its node; None where it sees none.

    Collective over comm; comm None: one process by itself.
    """
    visible = device.gpus()
    everyone = comm.allgather((node_name(os.environ), affinity.seen(visible, os.environ))) if comm else []
    if not visible:
        return None, []
    try:
        choice = (affinity.place_here(everyone, comm.rank, os.environ) if comm else
                  affinity.choose_gpu(local_rank(os.environ), local_size(os.environ), visible, os.environ))
    except UserError as error:
        return None, [Check("GPU of each rank", "cannot be chosen", str(error))]
    return choice, [Check("GPU of each rank", choice.why, warning="; ".join(choice.warnings))]


def open_gpu(choice: affinity.Choice | None) -> tuple[device.Device | None, list[Check]]:
    """The GPU itself, and whether kernels compile for it; where CuPy cannot use it, None and the problem."""
    if choice is None:
        return None, []
    try:
        gpu = device.Gpu(choice.index)
    except UserError as error:
        return None, [Check("opening the GPU", "fails", str(error))]
    try:
        Kernels("fp16", gpu.module, gpu.sms).compile(WITH_HEADERS)
    except UserError as error:
        return gpu, [Check("kernels", "do not compile", str(error))]
    return gpu, [Check("kernels", "compile")]


def row(choice: affinity.Choice, gpu) -> dict:
    """One line of the table of GPUs; gpu: the device.Gpu."""
    info = device.gpus()[choice.index]
    free, total = gpu.memory() if gpu else (0, info.memory)
    return {"gpu": affinity.words(info, choice.nic), "name": info.name, "capability": "{}.{}".format(*info.capability),
            "memory_gb": round(total / GB, 1), "free_gb": round(free / GB, 1)}


# ---------------------------------------------------------------- transports
def mpi_check(MPI) -> Check:
    """Whether this MPI says that it moves device buffers, and the settings that bear on it."""
    from hpcmoe.parallel.selftest import cuda_aware
    aware, sign = cuda_aware()
    settings = "".join(f"; {name}={os.environ[name]}" for name in SHOWN if name in os.environ)
    loaded = Path("/proc/self/maps").read_text()
    warning = ""
    if aware and "CRAY MPICH" in MPI.Get_library_version() and "libmpi_gtl_cuda" not in loaded:
        warning = "Cray MPICH's GPU library libmpi_gtl_cuda.so is not loaded: preload it, or link mpi4py with it"
    elif not aware and _ucx_with_cuda(loaded):
        warning = ("its UCX knows device memory, so device buffers may work: HPCMOE_CUDA_AWARE=1 tries them (MPICH also needs "
                   "MPIR_CVAR_NOLOCAL=1, Open MPI OMPI_MCA_pml=ucx)")
    return Check("CUDA-aware MPI", f"{'yes' if aware else 'no'} ({sign}){settings}", warning=warning)


def _ucx_with_cuda(maps: str) -> bool:
    """Whether UCX is loaded and has its CUDA module. maps: text of /proc/self/maps."""
    folders = {Path(path).parent for path in re.findall(r"(/\S*/libuct\.so\S*)", maps)}
    return any(any((folder / "ucx").glob("libuct_cuda.so*")) for folder in folders)


def transports(comm, gpu) -> dict[str, dict[str, str]]:
    """name -> {"host": fault, "device": fault}, "" for a pass; on device buffers where all ranks have a GPU.

    Collective. On device buffers an MPI that does not know them is not asked to try: that ends the process.
    """
    from hpcmoe.parallel.exchange import TRANSPORTS
    from hpcmoe.parallel.selftest import BY_ADDRESS, cuda_aware, self_test
    host = self_test(comm, device.Device())
    aware, _ = cuda_aware()
    every = comm.allgather((gpu is not None, aware))
    lacking = [rank for rank, (has, _) in enumerate(every) if not has]
    if lacking:
        fault = "not tried: " + ("no GPU" if len(lacking) == comm.size else f"rank {lacking[0]} has no GPU")
        return {name: {"host": host[name], "device": fault} for name in TRANSPORTS}
    names = [name for name in TRANSPORTS if name not in BY_ADDRESS or all(aware for _, aware in every)]
    if comm.rank == 0:
        print("hpcmoe: testing MPI on device buffers; HPCMOE_CUDA_AWARE=0 leaves that out", file=sys.stderr, flush=True)
    tested = self_test(comm, gpu, names)
    unknown = "not tried: this MPI does not say that it is CUDA-aware"
    return {name: {"host": host[name], "device": tested.get(name, unknown)} for name in TRANSPORTS}
