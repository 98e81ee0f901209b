"""The expert load of a run on disk: rows per expert, layer and step."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.files import replacing

NAME = "expert_load.h5"


def write_load(folder, records, model: ModelConfig, replicas: int) -> Path:
    """Writes expert_load.h5: dataset `rows`, int32 [replica, step, layer, expert].

    records: objects with dp, layers, experts and load [step, local layer, local expert]; replicas
    that took fewer steps than others have zeros in the end. Raises UserError where it cannot be written.
    """
    steps = max(len(r.load) for r in records)
    rows = np.zeros((replicas, steps, model.layers, model.router.experts), dtype=np.int32)
    for r in records:
        if r.layers and r.experts:
            block = np.s_[r.dp, :len(r.load), r.layers[0]:r.layers[-1] + 1, r.experts[0]:r.experts[-1] + 1]
            rows[block] = r.load
    memory = io.BytesIO()  # HDF5 does not report a full disk as an OSError: written by us
    with h5py.File(memory, "w") as file:
        file["rows"] = rows
        file["rows"].attrs["axes"] = "replica, step, layer, expert"
    path = Path(folder) / NAME
    with replacing(path) as temporary:
        Path(temporary).write_bytes(memory.getbuffer())
    return path
