"""The expert load of a run on disk: rows per expert, layer and step."""

from __future__ import annotations

import io
import os
from pathlib import Path

import h5py
import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.errors import UserError, at
from hpcmoe.files import replacing

NAME = "expert_load.h5"
AXES = "replica, step, layer, expert"


def write_load(folder, records, model: ModelConfig, replicas: int) -> Path:
    """Writes expert_load.h5: dataset `rows`, int32 [replica, step, layer, expert], rows of all copies of an expert together.

    records: report.record.RankRecord; replicas that took fewer steps than others have zeros in the end.
    Raises UserError where it cannot be written.
    """
    steps = max(len(r.load) for r in records)
    rows = np.zeros((replicas, steps, model.layers, model.router.experts), dtype=np.int32)
    for r in records:
        if r.layers and r.slots and not r.shard:  # tensor shards of a place get the same rows
            for steps, expert_ls in r.loads():
                block = rows[r.dp, steps.start:steps.stop, r.layers[0]:r.layers[-1] + 1]
                np.add.at(block, np.s_[:, np.arange(len(r.layers))[:, None], expert_ls], r.load[steps.start:steps.stop])
    memory = io.BytesIO()  # HDF5 does not report a full disk as an OSError: written by us
    with h5py.File(memory, "w") as file:
        file["rows"] = rows
        file["rows"].attrs["axes"] = AXES
    path = Path(folder) / NAME
    with replacing(path) as temporary:
        Path(temporary).write_bytes(memory.getbuffer())
    return path


def read_load(path: str | os.PathLike) -> np.ndarray:
    """Rows of a run [step, layer, expert]: of every step in which a replica had rows, by step, then by replica.

    Raises UserError where the file is missing, is not one of write_load, is damaged, or has fewer than two such steps.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: `hpcmoe run` writes {NAME} beside its outputs")
    try:
        with h5py.File(path, "r", locking=False) as file:
            rows = file["rows"][()] if "rows" in file and file["rows"].attrs.get("axes") == AXES else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if rows is None or rows.ndim != 4 or rows.dtype.kind != "i" or (rows < 0).any():
        raise UserError(f"{path}: expected {NAME} of `hpcmoe run`: counts of rows by {AXES}")
    rows_tle = rows.transpose(1, 0, 2, 3).reshape(-1, *rows.shape[2:]).astype(np.int64)
    rows_tle = rows_tle[rows_tle.any(axis=(1, 2))]
    if len(rows_tle) < 2 or not rows_tle[:len(rows_tle) // 2].any(axis=2).all():
        raise at(path, "steps with rows", len(rows_tle), "at least two, so that later ones can be held against earlier ones")
    return rows_tle
