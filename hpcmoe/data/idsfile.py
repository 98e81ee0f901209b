"""Requests as token ids in HDF5: all prompts in one dataset, one after the other.

`tokens` holds the ids; prompt j is tokens[offsets[j]:offsets[j + 1]]. Optional datasets give one
value per request. docs/requests.md describes them for users.
"""

from __future__ import annotations

from typing import Any, Iterator

import numpy as np

from hpcmoe.errors import UserError

# Optional datasets of one value per request, and the NumPy kinds they may have.
_KINDS = {"max_tokens": "iu", "temperature": "iuf", "top_k": "iu", "top_p": "iuf", "seed": "iu",
          "ignore_eos": "biu", "custom_id": "OSU"}
# HDF5's strongest common filter, deflate, makes data at most so many times smaller. A file that
# claims more is damaged, and must not make us ask for that much memory.
_MOST_PACKED = 1100


def read_ids(path: str, longest: int) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
    """Per request: its length in tokens, its token ids int64 [n], its optional values.

    The ids of a prompt longer than `longest` are not read, and come as an empty array. Raises
    UserError for a file that is not HDF5, lacks a dataset, or whose offsets do not fit its tokens.
    """
    import h5py
    try:
        with h5py.File(path, "r") as file:
            yield from _rows(path, file, longest)
    except UserError:
        raise
    except Exception as error:  # on damaged files h5py raises almost any of Python's errors
        raise UserError(f"{path}: cannot be read as HDF5: {_first_line(error)}") from error


def _rows(path: str, file, longest: int):
    for name in file:
        if name not in ("tokens", "offsets") and name not in _KINDS:
            raise UserError(f"{path}: unknown dataset {name!r}: expected tokens, offsets, "
                            + ", ".join(_KINDS))
    tokens, offsets = _dataset(path, file, "tokens", "iu"), _dataset(path, file, "offsets", "iu")
    start = offsets[:].astype(np.int64)
    if len(start) < 2:
        raise UserError(f"{path}: offsets has {len(start)} entries: expected one per request and one more")
    if start[0] != 0 or start[-1] != len(tokens) or (np.diff(start) < 0).any():
        raise UserError(f"{path}: offsets: expected to rise from 0 to {len(tokens)}, "
                        f"the number of tokens")
    columns = {}
    for name, kinds in _KINDS.items():
        if name in file:
            column = _dataset(path, file, name, kinds)
            if len(column) != len(start) - 1:
                raise UserError(f"{path}: {name} has {len(column)} entries: expected {len(start) - 1}, "
                                f"one per request")
            columns[name] = _column(path, name, column)
    for j, (begin, end) in enumerate(zip(start[:-1].tolist(), start[1:].tolist())):
        ids = tokens[begin:end].astype(np.int64) if end - begin <= longest else np.zeros(0, np.int64)
        yield end - begin, ids, {name: values[j] for name, values in columns.items()}


def _dataset(path: str, file, name: str, kinds: str):
    import h5py
    if name not in file:
        raise UserError(f"{path}: dataset {name} is missing")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in kinds:
        words = "numbers" if "f" in kinds else "texts" if "O" in kinds else "integers"
        raise UserError(f"{path}: {name}: expected a dataset of one dimension that holds {words}")
    if found.size * found.dtype.itemsize > _MOST_PACKED * file.id.get_filesize():
        raise UserError(f"{path}: {name} claims {found.size} entries, more than the file can hold")
    return found


def _column(path: str, name: str, dataset) -> list:
    """One plain Python value per request."""
    if name != "custom_id":
        values = dataset[:]
        if name == "ignore_eos":
            if not np.isin(values, (0, 1)).all():
                raise UserError(f"{path}: ignore_eos: expected 0 or 1")
            values = values.astype(bool)
        return values.tolist()
    texts = dataset[:].tolist()
    return [t.decode("utf-8") if isinstance(t, bytes) else t for t in texts]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
