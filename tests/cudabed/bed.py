"""The test bed without a GPU: the driver stand-in, the CuPy look-alike and CUDA-aware MPI libraries, as environments for ranks.

    reason = bed.missing() or bed.missing_mpi("mpich")
    done = run_ranks(4, program, env=bed.lookalike_env("mpich", FAKECUDA_TOTAL_MIB="1024"))

lookalike_env() without an MPI leaves the interpreter's own, which cannot read device memory.
Open MPI opens device memory of other processes (smcuda) where the device has a context before MPI is
initialised, i.e. cupy.cuda.runtime.free(0) before mpi4py is imported; else it copies through host memory (sm).
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from . import cudacpu, driver, mpich
from .kept import kept

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MPIS = ("mpich", "openmpi")


def missing() -> str:
    """What the look-alike lacks here, "" where nothing."""
    return driver.missing() or cudacpu.missing()


def missing_mpi(name: str) -> str:
    """Why the CUDA-aware MPI of that name ("mpich", "openmpi") is not here, "" where it is."""
    found = {"mpich": cuda_mpich, "openmpi": cuda_openmpi}[name]()
    return found if isinstance(found, str) else ""


@functools.cache
def cuda_mpich() -> Path | str:
    """The folder of a CUDA-aware MPICH, with env.sh; or the reason why there is none, a str."""
    return mpich.folder()


@functools.cache
def cuda_openmpi() -> Path | str:
    """The folder of a CUDA-aware Open MPI, with env.sh; or the reason why there is none, a str."""
    named = os.environ.get("HPCMOE_TEST_CUDA_OPENMPI")
    if named:
        there = Path(named, "env.sh").exists()
        return Path(named) if there else f"HPCMOE_TEST_CUDA_OPENMPI={named}: no env.sh in there"
    archives = sorted(ROOT.parent.glob("shared/device/dist/openmpi-cuda-*.tar.xz"))
    if not archives:
        return "no CUDA-aware Open MPI: tests/cudabed/build_openmpi.sh FOLDER TARBALL, then HPCMOE_TEST_CUDA_OPENMPI=FOLDER"
    return _unpacked(archives[-1]) / "openmpi-cuda"


def _unpacked(archive: Path) -> Path:
    """A folder with the contents of the archive, kept under a hash of it."""
    def unpack(work: Path) -> Path:
        (work / "x").mkdir()
        subprocess.run(["tar", "-xf", archive, "-C", work / "x"], check=True)
        return work / "x"

    return kept("cuda-openmpi", [archive.read_bytes()], unpack)


def driver_env(mpi: str | None = None, **settings: str) -> dict[str, str]:
    """Variables for ranks that see the driver stand-in: of the CUDA-aware MPI `mpi`, or of the interpreter's own.

    settings: more variables, e.g. FAKECUDA_TOTAL_MIB. HPCMOE_TEST_MPIEXEC is the launcher that mpi.run_ranks starts.
    """
    env = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    if mpi is not None:
        env |= _mpi_env(mpi)
    stand_in = str(driver.folder())
    env["LD_LIBRARY_PATH"] = ":".join(part for part in (stand_in, env["LD_LIBRARY_PATH"]) if part)
    env["FAKECUDA_LIBRARY"] = f"{stand_in}/libcuda.so.1"
    return env | settings


def lookalike_env(mpi: str | None = None, **settings: str) -> dict[str, str]:
    """The same for ranks whose `import cupy` gives the look-alike."""
    path = [str(HERE / "lookalike"), os.environ.get("PYTHONPATH", "")]
    return driver_env(mpi, PYTHONPATH=":".join(part for part in path if part)) | settings


@functools.cache
def _mpi_env(mpi: str) -> dict[str, str]:
    folder = {"mpich": cuda_mpich, "openmpi": cuda_openmpi}[mpi]()
    if isinstance(folder, str):
        raise RuntimeError(folder)
    shown = subprocess.run(["bash", "-c", f'. "{folder}/env.sh" && env -0'], capture_output=True, text=True, check=True).stdout
    env = dict(entry.split("=", 1) for entry in shown.split("\0") if "=" in entry)
    env = {name: value for name, value in env.items() if os.environ.get(name) != value and name not in ("_", "SHLVL")}
    launcher = f"{folder}/bin/mpiexec"
    if mpi == "openmpi":
        launcher += " --oversubscribe --bind-to none"
        env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "smcuda,sm,self"}
    else:
        env["HPCMOE_CUDA_AWARE"] = "1"  # MPICH itself does not know that its UCX does
    return env | {"HPCMOE_TEST_MPIEXEC": launcher}
