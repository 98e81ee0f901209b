"""The placement file: which expert is in which slot of each layer, for whom it was made, and what it promises."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcmoe.config import ModelConfig, from_dict, to_dict
from hpcmoe.errors import UserError, at
from hpcmoe.files import replacing

FORMAT = "hpcmoe-placement"
VERSION = 1
KEYS = ("format", "version", "model", "layout", "experts", "predicted")
EXCHANGES = ("flat", "hierarchical")


@dataclass(frozen=True)
class Shape:
    """What a model must have for a placement to fit it."""

    family: str
    vocab: int
    d: int
    layers: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, m: ModelConfig) -> "Shape":
        return cls(m.family, m.vocab, m.d, m.layers, m.router.experts, m.router.top_k)


@dataclass(frozen=True)
class Seats:
    """The ranks that it was made for: one replica's stages and places, the leaders, and the node of each of its ranks
    (Layout.node_pattern)."""

    pp: int
    ep: int
    leaders: str
    node_of_rank: tuple[int, ...]


@dataclass(frozen=True)
class Predicted:
    """Figures of one layer in rows per token: rows between nodes and over the busiest node's link (one way, of one
    dispatch), for a flat exchange and for a hierarchical one (for top_k > 2 an upper bound); rows of the busiest rank."""

    flat_between_nodes: float
    flat_busiest_link: float
    hierarchical_between_nodes: float
    hierarchical_busiest_link: float
    busiest_rank: float


@dataclass(frozen=True)
class Placement:
    """expert_ls: the expert in each slot, int [layer, slot], every expert at least once; predicted: one per layer."""

    model: Shape
    seats: Seats
    expert_ls: np.ndarray
    predicted: tuple[Predicted, ...]


def write_placement(path: str | os.PathLike, placement: Placement) -> None:
    """Writes a placement as JSON, one line per layer. Raises UserError where it cannot be written."""
    lines = [f'"format": "{FORMAT}", "version": {VERSION}', f'"model": {json.dumps(to_dict(placement.model))}',
             f'"layout": {json.dumps(to_dict(placement.seats))}',
             '"experts": [\n  ' + ",\n  ".join(json.dumps(row) for row in placement.expert_ls.tolist()) + "\n ]",
             '"predicted": [\n  ' + ",\n  ".join(json.dumps(to_dict(p)) for p in placement.predicted) + "\n ]"]
    with replacing(path) as temporary:
        Path(temporary).write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")


def read_placement(path: str | os.PathLike, model: ModelConfig) -> Placement:
    """The placement of a file, once it fits this model.

    Raises UserError where the file is missing, malformed, made for another model, or leaves an expert out.
    """
    path = os.fspath(path)
    data = _read(path)
    shape = from_dict(Shape, data["model"], path, "model.")
    if shape != Shape.of(model):
        raise UserError(f"{path}: made for {_words(shape)}: expected {_words(Shape.of(model))}, as the weights file has")
    seats = from_dict(Seats, data["layout"], path, "layout.")
    if len(data["predicted"]) != model.layers:
        raise at(path, "predicted", len(data["predicted"]), f"one table for each of {model.layers} layers")
    predicted = tuple(from_dict(Predicted, p, path, f"predicted[{i}].") for i, p in enumerate(data["predicted"]))
    return Placement(shape, seats, _experts(path, data["experts"], shape), predicted)


def _read(path: str) -> dict:
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: not a placement: expected a file of `hpcmoe place`")
    if data.get("version") != VERSION:
        raise at(path, "version", data.get("version"), str(VERSION))
    for key in data:
        if key not in KEYS:
            raise at(path, key, data[key], "one of the keys " + ", ".join(KEYS))
    for key in KEYS:
        if key not in data:
            raise UserError(f"{path}: {key} is missing")
    for key in ("experts", "predicted"):
        if not isinstance(data[key], list):
            raise at(path, key, data[key], "a list with an entry per layer")
    return data


def _experts(path: str, rows: list, shape: Shape) -> np.ndarray:
    """The experts of all slots [l, s], checked."""
    if len(rows) != shape.layers:
        raise at(path, "experts", len(rows), f"one list for each of {shape.layers} layers")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(e) is int for e in row) or set(row) != set(range(shape.experts)):
            raise at(path, f"experts[{layer}]", row, f"each of the experts 0 to {shape.experts - 1}, at least once")
        if len(row) != len(rows[0]):
            raise at(path, f"experts[{layer}]", row, f"{len(rows[0])} slots, as in experts[0]")
    return np.array(rows, dtype=np.int64)


def _words(shape: Shape) -> str:
    return " ".join(f"{name}={value}" for name, value in to_dict(shape).items())
