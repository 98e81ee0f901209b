"""The kernels through NVIDIA's compilers, which need no GPU: nvcc, and NVRTC, which CuPy compiles with.

Both are looked for in a toolkit (PATH, CUDA_HOME) and among the wheels of the extras cuda-check and cuda-nvcc.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tests.cudabed.cudacpu import cuda_include

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WHEELS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


class Use(NamedTuple):
    """What one kernel takes on one architecture: registers per thread, bytes of static shared memory, bytes spilled."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    spilled: int


class CompileError(Exception):
    """A compiler's errors, or the warnings that count as such."""


def nvcc() -> str | None:
    return shutil.which("nvcc") or next((str(p) for p in (HOME / "bin/nvcc", WHEELS / "bin/nvcc") if p.exists()), None)


def nvrtc_path() -> str | None:
    folders = [WHEELS / "lib", HOME / "lib64", HOME / "lib"]
    return next((str(p) for folder in folders for p in sorted(folder.glob("libnvrtc.so.1?"))), None)


def nvcc_missing() -> str:
    """What nvcc lacks here, "" where nothing."""
    if not nvcc():
        return "no nvcc (pip install hpcmoe[cuda-check,cuda-nvcc])"
    return "" if shutil.which("g++") else "no g++, which nvcc preprocesses with"


def nvrtc_missing() -> str:
    """What NVRTC lacks here, "" where nothing."""
    if not nvrtc_path():
        return "no NVRTC (pip install hpcmoe[cuda-check])"
    return "" if cuda_include() else "no CUDA headers (pip install hpcmoe[cuda-check])"


def known_architectures() -> list[str]:
    """Those of ARCHITECTURES that this nvcc compiles for."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [a for a in ARCHITECTURES if a in listed]


def by_nvcc(code: str, options: tuple[str, ...], architectures: list[str], folder: Path) -> list[Use]:
    """Compiles for all the architectures, in an empty folder. CompileError for an error or a warning."""
    folder.mkdir(parents=True)
    (folder / "k.cu").write_text(code)
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    done = subprocess.run([nvcc(), *options, *targets, "-fatbin", "-Xptxas", "-v", "-Werror", "all-warnings",
                           "-o", "k.fatbin", "k.cu"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stdout + done.stderr)
    return uses(done.stderr)


def uses(log: str) -> list[Use]:
    """What ptxas -v says of each kernel."""
    found = []
    for entry in log.split("Compiling entry function ")[1:]:
        kernel, architecture = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        number = lambda pattern: int((re.search(pattern, entry) or [0, 0])[1])  # noqa: E731, B023
        found.append(Use(kernel, architecture, number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"),
                         number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")))
    return found


def table(by_type: dict[str, list[Use]]) -> list[str]:
    """Lines of text: a kernel each; "fp16/bf16" where the two differ."""
    cells: dict[tuple[str, str], dict[str, Use]] = {}
    for dtype, found in by_type.items():
        for use in found:
            cells.setdefault((use.kernel, use.architecture), {})[dtype] = use
    architectures = [a for a in ARCHITECTURES if any(key[1] == a for key in cells)]
    lines = ["registers, bytes of shared memory, bytes spilled (fp16/bf16 where they differ)",
             f"{'kernel':24}" + "".join(f"{a:>24}" for a in architectures)]
    for kernel in dict.fromkeys(key[0] for key in cells):
        line = f"{kernel:24}"
        for a in architectures:
            both = cells.get((kernel, a), {}).values()
            parts = ["/".join(dict.fromkeys(str(getattr(u, field)) for u in both)) for field in Use._fields[2:]]
            line += f"{' '.join(parts):>24}"
        lines.append(line)
    return lines


def by_nvrtc(code: str, options: tuple[str, ...], architecture: str) -> None:
    """Compiles to machine code. CompileError for an error or a warning."""
    for builtins in Path(nvrtc_path()).parent.glob("libnvrtc-builtins.so.*.*"):
        ctypes.CDLL(str(builtins))  # NVRTC asks for it by its bare name
    library = ctypes.CDLL(nvrtc_path())
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"k.cu", 0, None, None):
        raise CompileError("nvrtcCreateProgram failed")
    include = cuda_include()
    arguments = [o.encode() for o in (*options, f"-arch={architecture}", f"-I{include}", f"-I{include}/cccl")]
    status = library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if status or b"warning" in log.value:
        raise CompileError(f"status {status}: {log.value.decode()}")
