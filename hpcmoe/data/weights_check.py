"""Looking into a weights file: `inspect` describes it, `verify` proves it sound."""

from __future__ import annotations

import json
import math
import os
from typing import Callable, Iterator

import numpy as np

from hpcmoe.config import to_dict
from hpcmoe.data import schema
from hpcmoe.data.schema import Unit
from hpcmoe.data.weights import WeightsFile
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.tensors import expert_shapes, parameters, top_shapes

CHUNK = 1 << 20  # elements widened at a time


def size_text(nbytes: float) -> str:
    """"1.41 GB", "3.2 MB", "812 B": decimal units, as disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"


def describe(path: str) -> list[str]:
    """The lines of `hpcmoe weights inspect`."""
    with WeightsFile(path) as file:
        config, e = file.config, file.config.router.experts
        lines = [f"{path}: {config.family}, {parameters(config) / 1e6:.1f} M parameters, {file.dtype}, "
                 f"{size_text(os.path.getsize(path))}, schema version {schema.VERSION}"]
        lines += [f"  {name}: {value}" for name, value in file.notes.items()]
        lines += ["", "configuration"] + list(_config_lines(to_dict(config), "  "))
        lines += ["", f"tensors{'':25}shape{'':15}type {'bytes':>12} {'count':>7}"]
        rows = [(name, schema.top_unit(config, name), 1) for name in top_shapes(config)]
        rows += [("layers/*/" + unit.dataset.rsplit("/", 1)[1], unit, config.layers)
                 for unit in schema.dense_units(config, 0)]
        for name, unit, count in rows:
            shape = list(unit.parts.values())[0]
            lines.append(_row(name, shape, file.stored(unit), file.unit_nbytes(unit), count))
        slab = schema.expert_unit(config, 0, 0)
        for name, shape in expert_shapes(config).items():
            each = math.prod(shape) * file.unit_nbytes(slab) // slab.elements
            lines.append(_row(f"layers/*/experts/*/{name}", shape, file.stored(slab), each, config.layers * e))
        dense = sum(file.dense_nbytes(layer) for layer in range(config.layers))
        top = sum(file.top_nbytes(name) for name in top_shapes(config))
        one = file.expert_nbytes(0, 0)
        lines += ["", f"one expert (gate, up, down back to back): {size_text(one)}",
                  f"all experts: {size_text(one * e * config.layers)}; dense tensors of all layers: "
                  f"{size_text(dense)}; outside the layers: {size_text(top)}",
                  f"a rank reads, at one expert per layer (pp=1 ep={e}): {size_text(one * config.layers)} of "
                  f"experts, and {size_text(dense + top)} of dense tensors where it is a leader",
                  f"a rank reads, at one expert of one layer (pp={config.layers} ep={e}): {size_text(one)} of "
                  f"experts, and {size_text(file.dense_nbytes(0))} of dense tensors where it is a leader",
                  "tokenizer: " + ("yes" if file.tokenizer_json else "no")
                  + "; chat template: " + ("yes" if file.chat_template else "no")]
    return lines


def as_json(path: str) -> str:
    """What `inspect --json` prints."""
    with WeightsFile(path) as file:
        config = file.config
        return json.dumps({
            "file": path, "file_bytes": os.path.getsize(path), "version": schema.VERSION,
            "dtype": file.dtype, "parameters": parameters(config), "config": to_dict(config),
            "notes": file.notes, "expert_bytes": file.expert_nbytes(0, 0),
            "dense_bytes_per_layer": [file.dense_nbytes(layer) for layer in range(config.layers)],
            "top_bytes": {name: file.top_nbytes(name) for name in top_shapes(config)},
            "tokenizer": file.tokenizer_json is not None, "chat_template": file.chat_template is not None,
        }, indent=1)


def _config_lines(data: dict, indent: str) -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
            yield f"{indent}{name}: {inner}"
        else:
            yield f"{indent}{name}: {_short(value)}"


def _short(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{len(value)} numbers]"
    return str(list(value) if isinstance(value, tuple) else value)


def _row(name: str, shape, kind: str, nbytes: int, count: int) -> str:
    return f"  {name:<30}{'[' + ', '.join(map(str, shape)) + ']':<20}{kind:<5}{nbytes:>12} {count:>7}"


# ---------------------------------------------------------------- verify
def verify(path: str, progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> list[str]:
    """Everything that is wrong with a file that opens: wrong shapes, checksums, NaN, infinities.

    Each problem is one line that names the tensor; an empty list is a sound file. Raises UserError
    where the file cannot be opened at all.
    """
    problems: list[str] = []
    with WeightsFile(path) as file:
        done, total = 0, os.path.getsize(path)
        bad_datasets: set[str] = set()
        for unit in schema.units(file.config):
            if unit.dataset in bad_datasets:
                continue
            try:
                problems += _problems(file, unit)
                done += file.unit_nbytes(unit)
            except UserError as error:
                bad_datasets.add(unit.dataset)
                problems.append(str(error))
            progress(done, total, unit.name)
        progress(total, total, "")
    return problems


def _problems(file: WeightsFile, unit: Unit) -> list[str]:
    expected, found = file.checksum(unit)
    if expected != found:
        return [f"{file.path}: {unit.name}: checksum {found:016x}: expected {expected:016x}"]
    problems = []
    for name, array in file.unit(unit).items():
        nan = infinite = 0
        flat = array.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            values = to_fp32(flat[start:start + CHUNK])
            if not np.isfinite(values).all():
                nan += int(np.isnan(values).sum())
                infinite += int(np.isinf(values).sum())
        part = unit.name if unit.expert < 0 else f"{unit.name}/{name}"
        if nan:
            problems.append(f"{file.path}: {part}: {nan} of {len(flat)} values are NaN")
        if infinite:
            problems.append(f"{file.path}: {part}: {infinite} of {len(flat)} values are infinite")
    return problems
