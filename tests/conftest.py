"""Marks: `mpi` for tests that start ranks (those also run under Open MPI), `slurm`, `parity`, `gpu`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `import mpi`

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
settings.register_profile("shared machine", deadline=None)  # an example that takes long says nothing where ranks share cores
settings.load_profile("shared machine")


def pytest_collection_modifyitems(items):
    """Skip what this environment cannot run, each with its reason."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    parity = pytest.mark.skip(reason=f"needs {' and '.join(missing)}: bash tests/run.sh --parity")
    gpu = pytest.mark.skip(reason="needs CuPy and a GPU")
    for item in items:
        if missing and item.get_closest_marker("parity"):
            item.add_marker(parity)
        if item.get_closest_marker("gpu") and importlib.util.find_spec("cupy") is None:
            item.add_marker(gpu)


LIMIT_S = 450


@pytest.fixture(autouse=True)
def limit():
    """No test waits for ever: after LIMIT_S seconds SIGALRM makes it fail where it stands."""
    def ring(number, frame):
        raise TimeoutError(f"the test took longer than {LIMIT_S} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
