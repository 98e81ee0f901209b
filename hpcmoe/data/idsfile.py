"""Requests as token ids in HDF5: all prompts in one dataset, one after the other.

`tokens` holds the ids; prompt j is tokens[offsets[j]:offsets[j + 1]]. Optional datasets give one
value per request. docs/requests.md describes them for users.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from typing import Any, Iterator

import numpy as np

from hpcmoe.data import idsread
from hpcmoe.errors import UserError

# Time for reading a file: a base, and its size at a rate that any disk reaches.
_BASE_S, _BYTES_PER_S = 60, 10e6


def read_ids(path: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Per request its token ids, [n] of any integer type, and its optional values.

    Raises UserError for a file that is not HDF5, lacks a dataset, or whose offsets do not fit its
    tokens, and OSError for one that cannot be opened.
    """
    arrays = _read(path)
    tokens, start = arrays.pop("tokens"), arrays.pop("offsets").astype(np.int64)
    if len(start) < 2:
        raise UserError(f"{path}: offsets has {len(start)} entries: expected one per request and one more")
    if start[0] != 0 or start[-1] != len(tokens) or (start[1:] < start[:-1]).any():
        raise UserError(f"{path}: offsets: expected to rise from 0 to {len(tokens)}, "
                        f"the number of tokens")
    columns = {}
    for name, values in arrays.items():
        columns[name] = _column(path, name, values)
        if len(columns[name]) != len(start) - 1:
            raise UserError(f"{path}: {name} has {len(columns[name])} entries: expected "
                            f"{len(start) - 1}, one per request")
    for j, (begin, end) in enumerate(zip(start[:-1].tolist(), start[1:].tolist())):
        yield tokens[begin:end], {name: values[j] for name, values in columns.items()}


def _column(path: str, name: str, values: np.ndarray) -> list:
    """One plain Python value per request."""
    if name == "custom_id":
        try:
            return values.tobytes().decode("utf-8").split("\0")[:-1]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: custom_id: expected UTF-8: {error.reason}") from error
    if name == "ignore_eos":
        if not np.isin(values, (0, 1)).all():
            raise UserError(f"{path}: ignore_eos: expected 0 or 1")
        values = values.astype(bool)
    return values.tolist()


def _read(path: str) -> dict[str, np.ndarray]:
    """The file's arrays by name, read in another process: see `idsread`."""
    with open(path, "rb") as file:  # an OSError that says what is wrong
        seconds = int(_BASE_S + os.fstat(file.fileno()).st_size / _BYTES_PER_S)
    # -c and not the file's name: that would put the file's folder before Python's own modules
    start = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", start, idsread.__file__, path, str(seconds)],
                          stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode == idsread.REFUSED:
        raise UserError(f"{path}: {done.stderr.decode('utf-8', 'replace').strip()}")
    if done.returncode != 0:
        how = f"did not end in {seconds} s" if done.returncode == -signal.SIGALRM else "crashed"
        raise UserError(f"{path}: cannot be read as HDF5: the HDF5 library {how}; the file is damaged")
    arrays, stream = {}, io.BytesIO(done.stdout)
    while name := stream.readline().decode().strip():
        arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays
