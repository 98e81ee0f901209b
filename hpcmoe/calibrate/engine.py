"""What the engine itself takes of each op: from the trace of a small job that runs in this process, on one rank."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from hpcmoe import launch
from hpcmoe.calibrate.ops import MODELS
from hpcmoe.data.create import create
from hpcmoe.jobfile import read_job

SEQUENCES, PROMPT, OUTPUTS = 8, 4, 24


class EngineTimes(NamedTuple):
    """us of any op, of COUNTS besides, of DISPATCH and of COMBINE besides (rows put in order apart)."""

    op_us: float
    counts_us: float
    move_us: float


def measure_engine(backend: str, dtype: str) -> EngineTimes:
    """Medians of a job's spans. Starts MPI in this process. Raises UserError where there is none."""
    comm = launch.start_mpi().COMM_SELF
    from hpcmoe.job import Session
    from hpcmoe.prepare import prepare
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.h5")
        create(path, MODELS[0], "fp32", 1)
        sizes = {"sequences": SEQUENCES, "prompt_tokens": PROMPT, "output_tokens": OUTPUTS}
        config = read_job(None, ["task=throughput", f"weights.file={path}", f"output.dir={folder}", "output.trace=kept", "output.quiet=true",
                                 "run.device=cpu", f"weights.backend={backend}", f"weights.dtype={dtype}",
                                 *(f"throughput.{name}={n}" for name, n in sizes.items())])
        prepared = prepare(config, 1)
        session = Session(comm, prepared, prepared, lambda step: None, lambda text: None)
        session.load()
        session.execute(0.0)
    found: dict[str, list[float]] = defaultdict(list)
    for span in session.records[0].spans:
        if not span.wait:
            found[span.kind].append(1e6 * (span.end_s - span.start_s))
    op, counts, dispatch, combine = (float(np.median(found[kind])) for kind in ("RECV", "COUNTS", "DISPATCH", "COMBINE"))
    waited = float(np.median([1e6 * (s.end_s - s.start_s) for s in session.records[0].spans if s.wait and s.kind == "COUNTS"]))
    return EngineTimes(op, counts + waited - op, max(0.0, (dispatch + combine) / 2 - op))
