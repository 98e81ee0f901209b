"""The routing statistics of a run on disk: how often tokens chose each expert, and each pair of experts."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.errors import UserError, at
from hpcmoe.files import replacing

NAME = "routing.h5"
FORMAT = "hpcmoe-routing"


class Routing(NamedTuple):
    """tokens_l: tokens that a layer's router saw; rows_le: how many of them chose each expert;
    pairs_lee: how many chose both of two experts, 0 on the diagonal; top_k: experts of a token."""

    tokens_l: np.ndarray
    rows_le: np.ndarray
    pairs_lee: np.ndarray
    top_k: int


def write_routing(folder, model: ModelConfig, counts_lee: np.ndarray) -> Path:
    """Writes routing.h5: dataset `pairs`, int64 [layer, expert, expert], in the model's own expert numbers.

    counts_lee: route.together per layer: rows of an expert on the diagonal. Raises UserError where the
    file cannot be written.
    """
    memory = io.BytesIO()  # HDF5 does not report a full disk as an OSError: written by us
    with h5py.File(memory, "w") as file:
        file.attrs["format"], file.attrs["top_k"] = np.bytes_(FORMAT), model.router.top_k
        file.create_dataset("pairs", data=counts_lee, compression="gzip")
        file["pairs"].attrs["axes"] = np.bytes_("layer, expert, expert")
    path = Path(folder) / NAME
    with replacing(path) as temporary:
        Path(temporary).write_bytes(memory.getbuffer())
    return path


def read_routing(path: str | os.PathLike, model: ModelConfig) -> Routing:
    """The statistics of a run of this model.

    Raises UserError where the file is missing, is not one of routing statistics, is damaged, belongs to a
    model of another shape, or holds no token.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: `hpcmoe run --set run.routing_statistics=true` writes one")
    try:
        with h5py.File(path, "r", locking=False) as file:
            form, top_k = file.attrs.get("format"), file.attrs.get("top_k")
            counts = file["pairs"][()] if form == FORMAT.encode() and "pairs" in file else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if counts is None:
        raise at(path, "attribute format", form, f"{FORMAT!r}: written by `hpcmoe run` with run.routing_statistics = true")
    experts, shape = model.router.experts, (model.layers, model.router.experts, model.router.experts)
    if counts.shape != shape or top_k != model.router.top_k:
        raise UserError(f"{path}: statistics of {list(counts.shape)} layers x experts x experts, top_k = {top_k}: expected "
                        f"{list(shape)}, top_k = {model.router.top_k}, as the weights file has: another model's?")
    return _checked(path, counts.astype(np.int64), int(top_k), experts)


def _checked(path: str, counts: np.ndarray, top_k: int, experts: int) -> Routing:
    """The counts taken apart, once they are such as tokens with top_k distinct experts each can make."""
    rows_le = np.einsum("lee->le", counts).copy()
    pairs_lee = counts * (1 - np.eye(experts, dtype=np.int64))
    sound = (counts >= 0).all() and (counts == counts.transpose(0, 2, 1)).all()
    if not sound or (pairs_lee.sum(axis=2) != (top_k - 1) * rows_le).any() or (rows_le.sum(axis=1) % top_k).any():
        raise UserError(f"{path}: pairs: damaged: expected counts of tokens that chose {top_k} experts each")
    tokens_l = rows_le.sum(axis=1) // top_k
    if not tokens_l.all():
        raise UserError(f"{path}: layer {int(np.argmin(tokens_l))} saw no token: expected the statistics of a run with requests")
    return Routing(tokens_l, rows_le, pairs_lee, top_k)
