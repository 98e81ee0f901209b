"""CUDA source where some of the toolkit's headers are missing."""

from types import SimpleNamespace

import pytest

from hpcmoe import compiled
from hpcmoe.errors import UserError


class CompileException(Exception):
    pass


def cupy_that_needs(folder):
    """CuPy as it is beside a PyTorch wheel: the source compiles where `folder` is among the folders of headers."""
    class RawModule:
        def __init__(self, code, options, backend):
            self.options = options

        def compile(self):
            if f"-I{folder}" not in self.options:
                raise CompileException('mma.h(55): catastrophic error: cannot open source file "crt/mma.h"')

    return SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(compiler=SimpleNamespace(CompileException=CompileException)))


def toolkit(tmp_path, name="toolkit"):
    (tmp_path / name / "include").mkdir(parents=True)
    (tmp_path / name / "bin").mkdir()
    (tmp_path / name / "include" / "mma.h").write_text("")
    nvcc = tmp_path / name / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return tmp_path / name


@pytest.mark.parametrize("how", ["CUDA_PATH", "CUDA_HOME", "nvcc"])
def test_the_sites_headers_are_taken_where_the_wheels_lack_one(tmp_path, monkeypatch, how):
    root = toolkit(tmp_path)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    if how == "nvcc":
        monkeypatch.setenv("PATH", str(root / "bin"))
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv(how, str(root))
    module = compiled.Compiled(cupy_that_needs(root / "include"), "", ("-std=c++17",))
    module.compile()
    assert module.module.options == ("-std=c++17", f"-I{root / 'include'}")


def test_no_toolkit_is_one_clear_error(tmp_path, monkeypatch):
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r'cannot open source file "crt/mma.h"; kernels need the CUDA headers: pip install'):
        compiled.Compiled(cupy_that_needs(tmp_path), "", ()).compile()
