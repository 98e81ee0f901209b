"""What the engine itself takes of each op: from the traces of a small job that runs in this process, on one rank or on those of a communicator."""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

import numpy as np

from hpcmoe.calibrate import ops
from hpcmoe.cluster.kernels import Calibration
from hpcmoe.data.create import create
from hpcmoe.jobfile import read_job
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.workload import Rows

SEQUENCES, PROMPT, OUTPUTS = 8, 4, 24  # of a rank


class EngineTimes(NamedTuple):
    """us of any op, of COUNTS besides, of DISPATCH and of COMBINE besides (rows put in order apart)."""

    op_us: float
    counts_us: float
    move_us: float


def measure_engine(comm, c: Calibration, backend: str, dtype: str) -> EngineTimes:
    """Medians of a job's spans, waits apart. Collective over comm, whose ranks are of one node."""
    from hpcmoe.job import Session
    from hpcmoe.prepare import prepare
    with tempfile.TemporaryDirectory() as folder:
        folder = comm.bcast(folder)
        path, mine = os.path.join(folder, "model.h5"), None
        sizes = {"sequences": SEQUENCES * comm.size, "prompt_tokens": PROMPT, "output_tokens": OUTPUTS}
        config = read_job(None, ["task=throughput", f"weights.file={path}", f"output.dir={folder}", "output.trace=kept", "output.quiet=true",
                                 "run.device=cpu", "run.transport=ialltoallv", f"weights.backend={backend}", f"weights.dtype={dtype}",
                                 f"layout.ep={comm.size}", *(f"throughput.{name}={n}" for name, n in sizes.items())])
        if comm.rank == 0:
            create(path, ops.MODELS[0], "fp32", 1)
            mine = prepare(config, comm.size)
        shared = comm.bcast(mine.public() if mine else None)
        session = Session(comm, shared, mine, lambda step: None, lambda text: None)
        session.load()
        session.execute(0.0)
        comm.Barrier()
    spans = session.records[0].spans if comm.rank == 0 else []
    busy = {kind: [1e6 * (s.end_s - s.start_s) for s in spans if s.kind == kind and not s.wait] for kind in ("RECV", "COUNTS", "DISPATCH", "COMBINE")}
    op, counts, dispatch, combine = comm.bcast([float(np.median(us)) if us else 0.0 for us in busy.values()])
    rows = Rows(np.zeros(0), np.zeros(0), 0.0, SEQUENCES, SEQUENCES, 0, SEQUENCES)
    ordered_us = 1e6 * Durations(c, ops.MODELS[0], ops.MODELS[0], False, False, False).dispatch(rows).host_s
    return EngineTimes(op, counts - op, max(0.0, (dispatch - ordered_us + combine) / 2 - op))
