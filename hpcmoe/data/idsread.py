"""Reads an HDF5 file of token ids, as a program of its own that `idsfile` starts.

The HDF5 library crashes or runs for ever on some damaged files (a flipped bit in one of about two
thousand); here it can do so without taking the job along. Run by path, so that little but NumPy
and h5py is imported: `python idsread.py FILE SECONDS`.

Standard output: for each dataset its name in a line, then the array in NumPy's .npy form. Exit
status 3 and one line on standard error where the file is not what it should be.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import Iterator

import numpy as np

# Datasets of a file of token ids, and the NumPy kinds that they may have.
KINDS = {"tokens": "iu", "offsets": "iu", "max_tokens": "iu", "temperature": "iuf", "top_k": "iu",
         "top_p": "iuf", "seed": "iu", "ignore_eos": "biu", "custom_id": "OS"}
REFUSED = 3
# HDF5's strongest common filter, deflate, makes data at most so many times smaller. A file that
# claims more is damaged, and must not make us ask for that much memory.
_MOST_PACKED = 1100


class Refused(Exception):
    """The file is not what it should be; the text says in what."""


def read(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each dataset's name and values; texts as UTF-8 in uint8, each ended by a zero byte.

    Raises Refused for a missing, unknown or unfit dataset, and whatever h5py raises.
    """
    import mpi4py
    mpi4py.rc.initialize = False  # an h5py made for MPI would join the job whose child this is
    import h5py
    with h5py.File(path, "r") as file:
        for name in file:
            if name not in KINDS:
                raise Refused(f"unknown dataset {name!r}: expected " + ", ".join(KINDS))
        for name in ("tokens", "offsets"):
            if name not in file:
                raise Refused(f"dataset {name} is missing")
        for name, kinds in KINDS.items():
            if name in file:
                values = _checked(file, name, kinds)[:]
                yield name, _texts(values) if name == "custom_id" else values


def _checked(file, name: str, kinds: str):
    import h5py
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in kinds:
        words = "numbers" if "f" in kinds else "texts" if "O" in kinds else "integers"
        raise Refused(f"{name}: expected a dataset of one dimension that holds {words}")
    if found.size * found.dtype.itemsize > _MOST_PACKED * file.id.get_filesize():
        raise Refused(f"{name} claims {found.size} entries, more than the file can hold")
    return found


def _texts(values: np.ndarray) -> np.ndarray:
    texts = values.tolist()
    if not all(isinstance(text, bytes) for text in texts):
        raise Refused("custom_id: expected a dataset of one dimension that holds texts")
    return np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8)


def main(path: str, seconds: str) -> int:
    """Write what `read` gives to standard output; end after so many seconds."""
    signal.alarm(int(seconds))  # its default action ends the process, whatever HDF5 does
    try:
        for name, values in read(path):
            whole = io.BytesIO()  # NumPy asks a real file for its position, which a pipe has not
            np.lib.format.write_array(whole, values, allow_pickle=False)
            sys.stdout.buffer.write(name.encode() + b"\n" + whole.getvalue())
        sys.stdout.buffer.flush()
    except Refused as error:
        print(error, file=sys.stderr)
        return REFUSED
    except Exception as error:  # on damaged files h5py raises almost any of Python's errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"cannot be read as HDF5: {reason}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
