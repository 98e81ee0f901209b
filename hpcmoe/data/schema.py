"""The layout of a weights file, as plain data: docs/weights.md in code. No HDF5 here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.model.dtypes import STORED
from hpcmoe.model.tensors import dense_shapes, expert_shapes, top_shapes

FORMAT = "hpcmoe"
VERSION = 1
ALIGN = 4096          # bytes: experts start on a page, so that no two ranks share one
ALIGN_FROM = 512      # bytes: smaller datasets are packed
STAMP_SIZE = 4096     # bytes before the HDF5 data proper (its "user block"): the stamp, then zeros
TEXTS = ("tokenizer.json", "chat_template")  # datasets that hold UTF-8 text

# One row per tensor or expert. A row is filled in place once its bytes are written.
CHECKSUM_ROW = np.dtype({"names": ["name", "xxh3_64", "done"], "formats": ["S48", "<u8", "u1"],
                         "offsets": [0, 48, 56], "itemsize": 64})



def stamp(end: int, checksum: int) -> bytes:
    """The first lines of a file: what it is, and the checksum of its structure.

    All of HDF5's own bookkeeping lies in bytes [STAMP_SIZE, end), before any weights, and never
    changes once laid out. A reader proves it sound before HDF5 sees it: the library does not
    survive every damaged file.
    """
    return f"{FORMAT} weights {VERSION}\nstructure {STAMP_SIZE} {end} {checksum:016x}\n".encode()


@dataclass(frozen=True)
class Unit:
    """What is written, read and checked as one: a dense tensor, or the slab of one expert.

    name: unique, also in the checksum table; dataset: where it lies; layer: -1 outside the layers;
    expert: row of the dataset, -1 for a dense tensor; parts: names and shapes, back to back.
    """

    name: str
    dataset: str
    layer: int
    expert: int
    parts: dict[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.parts.values())


def top_unit(config: ModelConfig, name: str) -> Unit:
    return Unit(name, name, -1, -1, {name: top_shapes(config)[name]})


def dense_units(config: ModelConfig, layer: int) -> list[Unit]:
    return [Unit(f"layers/{layer}/{name}", f"layers/{layer}/{name}", layer, -1, {name: shape})
            for name, shape in dense_shapes(config).items()]


def expert_unit(config: ModelConfig, layer: int, expert: int) -> Unit:
    return Unit(f"layers/{layer}/experts/{expert}", f"layers/{layer}/experts", layer, expert,
                expert_shapes(config))


def units(config: ModelConfig) -> list[Unit]:
    """All of a model, in the order of the checksum table: the top, then layer by layer."""
    found = [top_unit(config, name) for name in top_shapes(config)]
    for layer in range(config.layers):
        found += dense_units(config, layer)
        found += [expert_unit(config, layer, e) for e in range(config.router.experts)]
    return found


def slab_elements(config: ModelConfig, dtype: str) -> tuple[int, int]:
    """(elements of one expert, elements from one expert to the next: whole pages)."""
    used = expert_unit(config, 0, 0).elements
    per_page = ALIGN // STORED[dtype].itemsize
    return used, -(-used // per_page) * per_page


def dataset_shapes(config: ModelConfig, expert_dtype: str) -> dict[str, tuple[int, ...]]:
    """Every dataset that holds weights, and its shape in the file."""
    shapes = dict(top_shapes(config))
    dense = dense_shapes(config)
    slabs = (config.router.experts, slab_elements(config, expert_dtype)[1])
    for layer in range(config.layers):
        shapes |= {f"layers/{layer}/{name}": shape for name, shape in dense.items()}
        shapes[f"layers/{layer}/experts"] = slabs
    return shapes


def row_of(config: ModelConfig, unit: Unit) -> int:
    """The unit's row in the checksum table."""
    top = list(top_shapes(config))
    if unit.layer < 0:
        return top.index(unit.name)
    dense = list(dense_shapes(config))
    start = len(top) + unit.layer * (len(dense) + config.router.experts)
    if unit.expert < 0:
        return start + dense.index(unit.name.rsplit("/", 1)[1])
    return start + len(dense) + unit.expert
