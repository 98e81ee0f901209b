"""Writing a weights file that survives being cut at any moment.

First the whole file is laid out under `PATH.part`: every group, dataset and attribute, with space
allotted but empty, and HDF5 lets go of it. From then on only plain writes at known offsets happen,
so no kill can damage the structure; a finished tensor gets its checksum and its mark in the
checksum table. Only a complete file is renamed to its own name.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from typing import Iterable

import h5py
import numpy as np
import xxhash

from hpcmoe.config import ModelConfig, to_dict
from hpcmoe.data import schema
from hpcmoe.data.schema import CHECKSUM_ROW, Unit
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import STORED

_SUM_AT = CHECKSUM_ROW.fields["xxh3_64"][1]


@dataclass(frozen=True)
class Header:
    """All of a weights file but the weights.

    dtypes: storage type of each dataset, "fp16", "bf16" or "fp32"; dtype: that of the experts.
    notes: free texts about the origin. fingerprint: says what the bytes are made from, so that a
    cut file is continued only from the same source.
    """

    config: ModelConfig
    dtype: str
    dtypes: dict[str, str] = field(default_factory=dict)
    tokenizer_json: str | None = None
    chat_template: str | None = None
    special: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)
    fingerprint: str = ""

    def dtype_of(self, dataset: str) -> str:
        return self.dtypes.get(dataset, self.dtype)


class WeightsWriter:
    """Fills a weights file unit by unit, in any order; a context manager.

    Continues `path.part` where it has the same header. `resumed` counts the units found there
    with a right checksum; `restarted` says why an existing part file could not be used.
    Raises UserError where the file cannot be written, is locked, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike, header: Header):
        self.path, self.header = os.fspath(path), header
        self.part = self.path + ".part"
        self.units = schema.units(header.config)
        self.resumed, self.restarted, self._done = 0, "", set()
        self._fd = -1
        try:
            self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
            self._lock()
            fresh = not self._reuse()
            if fresh:
                _lay_out(self.part, header, self.units)
            self._offsets, self._table = _offsets(self.part, header.config)
            self._check_space(fresh)
        except OSError as error:
            self.close()
            raise self._cannot(error) from error
        except UserError:
            self.close()
            raise
        if not fresh:
            self._find_done()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ------------------------------------------------------------ start
    def _reuse(self) -> bool:
        """Whether the part file that lies there is one of this very conversion."""
        if not os.fstat(self._fd).st_size:
            return False
        try:
            with h5py.File(self.part, "r", locking=False) as file:
                same = file.attrs["made_from"] == _made_from(self.header).encode()
        except (OSError, KeyError) as error:
            self.restarted = f"{self.part} is not usable ({type(error).__name__})"
            return False
        if not same:
            self.restarted = f"{self.part} is of another model or conversion"
        return same

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.part}: another process is writing this file") from error
        except OSError:
            return  # some network file systems have no locks: then nothing can be checked

    def _check_space(self, fresh: bool) -> None:
        held = os.fstat(self._fd)
        needed = held.st_size - held.st_blocks * 512
        disk = os.fstatvfs(self._fd)
        free = disk.f_bavail * disk.f_frsize
        if needed > free:
            if fresh:
                os.unlink(self.part)
            raise UserError(f"{self.path}: not enough space: {needed / 1e9:.2f} GB more are needed, "
                            f"{free / 1e9:.2f} GB are free in {os.path.dirname(os.path.abspath(self.path))}")

    def _find_done(self) -> None:
        size = CHECKSUM_ROW.itemsize * len(self.units)
        table = np.frombuffer(os.pread(self._fd, size, self._table), CHECKSUM_ROW)
        for row, unit in enumerate(self.units):
            if table["done"][row] and self._checksum(unit) == table["xxh3_64"][row]:
                self._done.add(row)
        self.resumed = len(self._done)

    def _place(self, unit: Unit) -> tuple[int, int]:
        """(offset, length) of a unit in bytes."""
        size = STORED[self.header.dtype_of(unit.dataset)].itemsize
        offset = self._offsets[unit.dataset]
        if unit.expert >= 0:
            offset += unit.expert * schema.slab_elements(self.header.config, self.header.dtype)[1] * size
        return offset, unit.elements * size

    def _checksum(self, unit: Unit) -> int:
        offset, length = self._place(unit)
        sum_ = xxhash.xxh3_64()
        while length:
            piece = os.pread(self._fd, min(length, 1 << 23), offset)
            if not piece:
                break
            sum_.update(piece)
            offset, length = offset + len(piece), length - len(piece)
        return sum_.intdigest()

    # ------------------------------------------------------------ work
    def pending(self) -> list[tuple[int, Unit]]:
        """(row, unit) of all that is still to be written."""
        return [(row, unit) for row, unit in enumerate(self.units) if row not in self._done]

    def nbytes(self, unit: Unit) -> int:
        return self._place(unit)[1]

    def write(self, row: int, chunks: Iterable[np.ndarray]) -> None:
        """Writes unit `row` from consecutive 1-d pieces in its stored dtype, and marks it done."""
        unit = self.units[row]
        offset, left = self._place(unit)
        sum_ = xxhash.xxh3_64()
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                sum_.update(view)
                left -= len(view)
                if left < 0:
                    break
                while view:
                    wrote = os.pwrite(self._fd, view, offset)
                    view, offset = view[wrote:], offset + wrote
            if left:
                raise ValueError(f"{unit.name}: {left} bytes differ from its size")
            mark = sum_.intdigest().to_bytes(8, "little") + b"\x01"
            os.pwrite(self._fd, mark, self._table + row * CHECKSUM_ROW.itemsize + _SUM_AT)
        except OSError as error:
            raise self._cannot(error) from error
        self._done.add(row)

    def finish(self) -> None:
        """Everything is there: to the disk, marked complete, and under its own name."""
        if self.pending():
            raise ValueError(f"{self.pending()[0][1].name} is not written")
        try:
            os.fsync(self._fd)
            os.pwrite(self._fd, b"\x01", self._offsets["complete"])
            os.fsync(self._fd)
            os.replace(self.part, self.path)
            folder = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._cannot(error) from error
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _cannot(self, error: OSError) -> UserError:
        kept = f"; {self.part} is kept: the same command goes on from there" if self._done else ""
        return UserError(f"{self.path}: cannot write: {error.strerror or error}{kept}")


# ---------------------------------------------------------------- laying out
def _made_from(header: Header) -> str:
    """What must agree for a cut file to be continued, as one hash."""
    text = json.dumps([schema.VERSION, to_dict(header.config), header.dtype, header.dtypes,
                       header.tokenizer_json, header.chat_template, header.special, header.fingerprint])
    return xxhash.xxh3_128_hexdigest(text.encode())


def _lay_out(part: str, header: Header, units: list[Unit]) -> None:
    shapes = schema.dataset_shapes(header.config, header.dtype)
    # One block that takes the bookkeeping of all objects, so that it lies together at the front.
    block = (1 << 17) + 1024 * len(shapes)
    with h5py.File(part, "w", locking=False, alignment_threshold=schema.ALIGN_FROM,
                   alignment_interval=schema.ALIGN, meta_block_size=block,
                   userblock_size=schema.STAMP_SIZE) as file:
        file.attrs["version"] = schema.VERSION
        texts = {"format": schema.FORMAT, "dtype": header.dtype, "config": json.dumps(to_dict(header.config)),
                 "special": json.dumps(header.special), "notes": json.dumps(header.notes),
                 "made_from": _made_from(header)}
        for name, text in texts.items():  # bytes: a fixed length, within the object itself
            file.attrs[name] = np.bytes_(text)
        for name, shape in shapes.items():
            _empty(file, name, shape, STORED[header.dtype_of(name)])
        table = np.zeros(len(units), CHECKSUM_ROW)
        table["name"] = [unit.name.encode() for unit in units]
        _empty(file, "checksums", table.shape, CHECKSUM_ROW)[...] = table
        _empty(file, "complete", (), np.dtype("u1"))[...] = 0
        texts = {"tokenizer.json": header.tokenizer_json, "chat_template": header.chat_template}
        for name, text in texts.items():
            if text:
                _text(file, name, text.encode())
    extents = stamp(part)
    for (start, size), (after, _) in zip(extents, extents[1:]):
        if after - start - size > 2 * schema.ALIGN:
            raise ValueError(f"{part}: bookkeeping between the datasets, at byte {start + size}")


def stamp(path: str) -> list[tuple[int, int]]:
    """Writes the stamp of a laid-out file: the checksum of all that lies before its first dataset.

    Returns (offset, bytes) of every dataset in the order of the file.
    """
    extents: list[tuple[int, int]] = []

    def note(_, item) -> None:
        if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
            extents.append((item.id.get_offset(), item.nbytes))

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(note)
    extents.sort()
    with open(path, "r+b") as file:
        file.seek(schema.STAMP_SIZE)
        structure = file.read(extents[0][0] - schema.STAMP_SIZE)
        file.seek(0)
        file.write(schema.stamp(extents[0][0], xxhash.xxh3_64_intdigest(structure)))
    return extents


def _empty(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """A contiguous dataset whose place in the file is fixed now and whose bytes come later."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)  # the same model gives the same bytes
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plan, links))


def _text(file: h5py.File, name: str, raw: bytes) -> None:
    """A scalar dataset of fixed length that holds UTF-8 text."""
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(len(raw))
    kind.set_cset(h5py.h5t.CSET_UTF8)
    kind.set_strpad(h5py.h5t.STR_NULLPAD)
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_obj_track_times(False)
    data = h5py.h5d.create(file.id, name.encode(), kind, space, plan)
    data.write(space, space, np.array(raw, f"S{len(raw)}"), mtype=kind)


def _offsets(part: str, config: ModelConfig) -> tuple[dict[str, int], int]:
    with h5py.File(part, "r", locking=False) as file:
        names = [*schema.dataset_shapes(config, "fp32"), "complete"]
        return ({name: file[name].id.get_offset() for name in names},
                file["checksums"].id.get_offset())
