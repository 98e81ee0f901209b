"""Kernels on the CPU: compiles CUDA source with g++ and cudacpu.hpp, one fiber per CUDA thread."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')


def cuda_include() -> str | None:
    """The folder with the CUDA headers: a toolkit's, or those of the nvidia-cuda-runtime wheel."""
    found = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/include"]
    found += [str(Path(sysconfig.get_paths()["purelib"]) / "nvidia" / v / "include") for v in ("cu13", "cuda_runtime")]
    return next((folder for folder in found if os.path.exists(os.path.join(folder, "cuda_bf16.h"))), None)


def missing() -> str:
    """What kernels on the CPU lack here, "" where nothing."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler"
    return "" if cuda_include() else "no CUDA headers (pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)"


class Module:
    """Kernels declared `extern "C" __global__` in `code`, called as those of cupy.RawModule are.

    Arguments are host arrays (or anything with `.data.ptr` that `address` turns into a host address).
    """

    def __init__(self, code: str, options: tuple[str, ...] = (), address=None):
        self.address = address
        self.library = ctypes.CDLL(_build(code, tuple(o for o in options if o.startswith("-D"))))

    def get_function(self, name: str):
        return Function(self, name)


@functools.cache
def _build(code: str, defines: tuple[str, ...]) -> str:
    """The shared library of the code; kept in a folder for temporary files under a hash of all that went in."""
    wrap = code + "\n" + "".join(
        f'extern "C" void {n}__launch(const unsigned *g, const unsigned *b, size_t s, void **a)'
        f'{{ cudacpu::launch(&{n}, dim3(g[0],g[1],g[2]), dim3(b[0],b[1],b[2]), s, a); }}\n'
        f'extern "C" int {n}__sizes(size_t *o)'
        f'{{ auto v = cudacpu::sizes(&{n}); for (size_t i = 0; i < v.size(); i++) o[i] = v[i]; return v.size(); }}\n'
        for n in KERNEL.findall(code))
    library = _cache() / f"{_key(wrap, *_flags(), *defines)}.so"
    if not library.exists():
        _compile(["-shared", "-x", "c++", "-include", _header(), *defines], wrap, library)
    return str(library)


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hpcmoe-cudacpu-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(*parts: str) -> str:
    headers = [path.read_text() for path in sorted(HERE.glob("*.hpp"))]
    return hashlib.sha256("\0".join([_compiler(), *parts, *headers]).encode()).hexdigest()[:20]


@functools.cache
def _compiler() -> str:
    """Which compiler it is: a precompiled header is for the very one that made it."""
    return subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True, check=True).stdout


def _flags() -> list[str]:
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fsanitize=alignment", "-fno-sanitize-recover=alignment",
             "-fno-strict-aliasing", "-Wno-attributes", "-I", cuda_include(), "-I", cuda_include() + "/cccl"]
    if os.environ.get("CUDACPU_ASAN") == "1":
        # Of shared memory, the dynamic is guarded by the address sanitizer, arrays of fixed size by the bounds one.
        flags += ["-fsanitize=address,bounds", "-fno-sanitize-recover=bounds", "--param", "asan-stack=0"]
    return flags


def _header() -> str:
    """cudacpu.hpp with a precompiled one beside it: CUDA's headers are most of what there is to compile."""
    folder = _cache() / _key("header", *_flags())
    folder.mkdir(exist_ok=True)
    if not (folder / "cudacpu.hpp.gch").exists():
        _compile(["-x", "c++-header"], f'#include "{HERE / "cudacpu.hpp"}"\n', folder / "cudacpu.hpp.gch")
    (folder / "cudacpu.hpp").write_text("#error the precompiled header was not used\n")
    return str(folder / "cudacpu.hpp")


def _compile(options: list[str], code: str, target: Path) -> None:
    """g++ on a text; the target is whole or not there. RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        source, made = Path(folder) / "m.cpp", Path(folder) / "made"
        source.write_text(code)
        # A preloaded sanitizer is for the kernels: the compiler would be three times as slow with it.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run([os.environ.get("CXX", "g++"), *_flags(), *options, str(source), "-o", str(made)],
                              env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        os.replace(made, target)


class Function:
    """One kernel. max_dynamic_shared_size_bytes: accepted as CuPy accepts it."""

    max_dynamic_shared_size_bytes = 0

    def __init__(self, module: Module, name: str):
        self.module, self.name = module, name
        self.launch = getattr(module.library, name + "__launch")
        out = (ctypes.c_size_t * 64)()
        self.sizes = list(out[:getattr(module.library, name + "__sizes")(out)])

    def __call__(self, grid, block, args, shared_mem=0):
        if len(args) != len(self.sizes):
            raise TypeError(f"{self.name} takes {len(self.sizes)} arguments, got {len(args)}")
        keep = [self._value(i, argument, size) for i, (argument, size) in enumerate(zip(args, self.sizes))]
        pointers = (ctypes.c_void_p * max(1, len(keep)))(*[v.ctypes.data for v in keep])
        g, b = [(ctypes.c_uint * 3)(*(tuple(t) + (1, 1, 1))[:3]) for t in (grid, block)]
        if 0 in tuple(g):
            raise ValueError(f"{self.name}: an empty grid {tuple(g)}: CUDA refuses it")
        self.launch(g, b, ctypes.c_size_t(shared_mem), pointers)

    def _value(self, i: int, argument, size: int) -> np.ndarray:
        if isinstance(argument, np.ndarray):
            value = np.array([argument.ctypes.data], np.uintp)
        elif isinstance(argument, np.generic):
            value = np.array([argument])
        elif self.module.address is not None and hasattr(argument, "data"):
            value = np.array([self.module.address(argument)], np.uintp)
        else:
            raise TypeError(f"{self.name}: argument {i} is a {type(argument)}")
        if value.nbytes != size:
            raise TypeError(f"{self.name}: argument {i} has {value.nbytes} bytes, the kernel takes {size}")
        return value
