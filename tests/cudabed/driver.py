"""Builds the driver stand-in (fakecuda.c): a folder with libcuda.so.1 and libnvidia-ml.so.1, kept under a hash of the source."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from .cudacpu import cuda_include
from .kept import kept

HERE = Path(__file__).resolve().parent
SOURCES = ("fakecuda.c", "fakecuda_simple.h")
NVML = """
const char *nvmlErrorString(int e) { return "no NVML"; }
int nvmlInit_v2(void) { return 12; /* NVML_ERROR_LIBRARY_NOT_FOUND */ }
int nvmlShutdown(void) { return 0; }
"""


def missing() -> str:
    """What the build lacks here, "" where nothing."""
    if not shutil.which(_compiler()):
        return "no C compiler"
    return "" if cuda_include() else "no CUDA headers (pip install nvidia-cuda-runtime)"


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


@functools.cache
def folder() -> Path:
    """The folder that belongs at the front of LD_LIBRARY_PATH; built if it is not there yet."""
    texts = [(HERE / name).read_text() for name in SOURCES] + [Path(__file__).read_text(), cuda_include()]
    return kept("fakecuda", [text.encode() for text in texts], _make)


def _make(work: Path) -> Path:
    _build(work, work / "out")
    return work / "out"


def _build(work: Path, out: Path) -> None:
    out.mkdir()
    compile_ = (_compiler(), "-O1", "-fPIC", "-w", "-I", cuda_include())
    _run(*compile_, "-c", HERE / "fakecuda.c", "-o", work / "fakecuda.o")
    have = set(re.findall(r" T (\w+)", _run("nm", work / "fakecuda.o")))
    # Every other function of the driver exists too and says CUDA_ERROR_NOT_SUPPORTED: libraries link to them by name.
    (work / "all.c").write_text("#include <cuda.h>\n")
    named = set(re.findall(r"\bCUresult\s+(cu[A-Z]\w*)", _run(*compile_, "-E", "-P", work / "all.c")))
    named |= {re.sub(r"_v\d+$", "", name) for name in named}
    (work / "rest.c").write_text("".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(named - have)))
    _run(_compiler(), "-O1", "-fPIC", "-shared", "-w", "-Wl,-soname,libcuda.so.1", "-I", cuda_include(), work / "fakecuda.o",
         work / "rest.c", "-o", out / "libcuda.so.1", "-ldl", "-lpthread")
    (out / "libcuda.so").symlink_to("libcuda.so.1")
    (work / "nvml.c").write_text(NVML)
    _run(_compiler(), "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", work / "nvml.c", "-o", out / "libnvidia-ml.so.1")
