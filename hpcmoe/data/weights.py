"""Reading a weights file: what a rank asks for and nothing else (schema: docs/weights.md).

HDF5 is asked only where things lie. The bytes themselves are mapped into memory, so that ranks on
a node share them, and an expert is one contiguous range of the file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os

import h5py
import numpy as np
import xxhash

from hpcmoe.config import ModelConfig, from_dict
from hpcmoe.data import schema
from hpcmoe.data.schema import Unit
from hpcmoe.errors import UserError, at
from hpcmoe.model.dtypes import STORED
from hpcmoe.model.tensors import check_model, dense_shapes, top_shapes

_POPULATE_READ = 22  # madvise: map these pages now, in one call (Linux 5.14)


class WeightsFile:
    """A weights file, open for reading; a context manager.

    config: ModelConfig; dtype: of the experts, "fp16" | "bf16" | "fp32"; tokenizer_json,
    chat_template: texts or None; special: tokenizer settings; notes: where the weights come from;
    bytes_read: bytes of tensors handed out so far, by this object.

    Arrays are read-only views of the file, float32, float16, or uint16 that holds bf16 bits
    (hpcmoe.model.dtypes.to_fp32 widens them). With `verify`, each checksum is compared when a
    tensor is handed out.

    Raises UserError: no such file, not HDF5, truncated, another format or version, unfinished,
    malformed configuration; a tensor that is missing, has another shape than the configuration
    asks for, or another checksum.
    """

    def __init__(self, path: str | os.PathLike, verify: bool = False):
        self.path, self.verify, self.bytes_read = os.fspath(path), verify, 0
        self._map = None
        self._sums = None
        self._file = _open(self.path)
        try:
            with self._damaged():
                self._size = os.path.getsize(self.path)
                self._read_header()
                self._check_names()
        except UserError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Lets go of the file; arrays that were handed out stay valid."""
        self._file.close()
        self._map = None

    # ------------------------------------------------------------ what is handed out
    def top(self, name: str) -> np.ndarray:
        """A tensor outside the layers: embed [v, d], norm [d], head [v, d], norm_bias, head_bias."""
        return self._hand_out(schema.top_unit(self.config, name))[name]

    def dense(self, layer: int) -> dict[str, np.ndarray]:
        """One layer's tensors apart from its routed experts: names of `tensors.dense_shapes`."""
        found = {}
        for unit in schema.dense_units(self.config, layer):
            found |= self._hand_out(unit)
        return found

    def expert(self, layer: int, e: int) -> dict[str, np.ndarray]:
        """gate [f, d], up [f, d], down [d, f] (and biases) of one expert: one range of the file."""
        return self._hand_out(schema.expert_unit(self.config, layer, e))

    def top_nbytes(self, name: str) -> int:
        return self._nbytes([schema.top_unit(self.config, name)])

    def dense_nbytes(self, layer: int) -> int:
        return self._nbytes(schema.dense_units(self.config, layer))

    def expert_nbytes(self, layer: int, e: int) -> int:
        return self._nbytes([schema.expert_unit(self.config, layer, e)])

    def unit(self, unit: Unit) -> dict[str, np.ndarray]:
        """Any unit of `schema.units`, for tools that walk through the whole file."""
        return self._hand_out(unit)

    def unit_nbytes(self, unit: Unit) -> int:
        return self._nbytes([unit])

    def stored(self, unit: Unit) -> str:
        """The storage type of a unit: "fp16", "bf16" or "fp32"."""
        kind = self._dataset(unit).dtype
        return next(name for name, stored in STORED.items() if stored == kind)

    def checksum(self, unit: Unit) -> tuple[int, int]:
        """(expected, found) xxh3_64 of a unit's bytes."""
        offset, kind = self._place(unit)
        return self._expected(unit), xxhash.xxh3_64_intdigest(self._bytes(unit, offset, kind))

    # ------------------------------------------------------------ opening
    def _read_header(self) -> None:
        where = self.path
        if self._attribute("format") != schema.FORMAT:
            raise UserError(f"{where}: an HDF5 file, but not one of model weights: attribute format = "
                            f"{self._attribute('format')!r}: expected {schema.FORMAT!r} (made by `hpcmoe weights`)")
        version = self._file.attrs.get("version")
        if not isinstance(version, (int, np.integer)) or version != schema.VERSION:
            raise UserError(f"{where}: schema version {version}: this program reads version "
                            f"{schema.VERSION}; convert the model again")
        self.dtype = self._attribute("dtype")
        if self.dtype not in STORED:
            raise at(where, "dtype", self.dtype, "one of " + ", ".join(STORED))
        if int(self._small("complete")[()]) != 1:
            raise UserError(f"{where}: unfinished: its writing was cut; run the same command again to go on")
        self.config: ModelConfig = from_dict(ModelConfig, self._json("config"), where, "config.")
        check_model(self.config, f"{where}: config")
        self.special, self.notes = self._json("special"), self._json("notes")
        self.tokenizer_json, self.chat_template = (self._text(name) for name in schema.TEXTS)

    def _attribute(self, name: str) -> str:
        """A text attribute, "" where there is none. Only fixed lengths: those a damaged file cannot inflate."""
        if name not in self._file.attrs:
            return ""
        kind = self._file.attrs.get_id(name).dtype
        if kind.kind != "S":
            raise UserError(f"{self.path}: attribute {name}: expected a text of fixed length")
        return self._file.attrs[name].decode()

    def _json(self, name: str) -> dict:
        try:
            data = json.loads(self._attribute(name) or "{}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: attribute {name} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise UserError(f"{self.path}: attribute {name}: expected a JSON object")
        return data

    def _text(self, name: str) -> str | None:
        if name not in self._file:
            return None
        return self._small(name)[()].decode()

    def _small(self, name: str) -> h5py.Dataset:
        """A dataset that is read as a whole: its stated size must be one that the file can hold."""
        dataset = self._file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.nbytes > self._size or dataset.dtype.hasobject:
            raise UserError(f"{self.path}: {name}: damaged: expected a dataset within the file's {self._size} bytes")
        return dataset

    def _check_names(self) -> None:
        """Every dataset that the configuration asks for is there (names only: that is quick)."""
        top, dense = list(top_shapes(self.config)), [*dense_shapes(self.config), "experts"]
        self._need(self._file, "", [*top, "checksums"] + (["layers"] if self.config.layers else []))
        for layer in range(self.config.layers):
            self._need(self._file["layers"], "layers/", [str(layer)])
            self._need(self._file[f"layers/{layer}"], f"layers/{layer}/", dense)

    def _need(self, group: h5py.Group, prefix: str, names: list[str]) -> None:
        there = set(group) if isinstance(group, h5py.Group) else set()
        for name in names:
            if name not in there:
                raise UserError(f"{self.path}: tensor {prefix}{name} is missing")

    @contextlib.contextmanager
    def _damaged(self):
        """What the HDF5 library raises over a damaged file, as one UserError."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: damaged HDF5 file: {error}") from error

    # ------------------------------------------------------------ bytes
    def _dataset(self, unit: Unit) -> h5py.Dataset:
        """The unit's dataset, once its shape and type are what the configuration asks for."""
        dataset = self._file[unit.dataset]
        shape = unit.parts.get(unit.dataset.rsplit("/", 1)[-1])
        if unit.expert >= 0:
            shape = (self.config.router.experts, schema.slab_elements(self.config, self.dtype)[1])
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype not in STORED.values():
            raise UserError(f"{self.path}: {unit.dataset}: expected a dataset of fp32, fp16 or bf16 values")
        if dataset.shape != shape:
            raise UserError(f"{self.path}: {unit.dataset}: shape {list(dataset.shape)}: expected {list(shape)} "
                            "by the file's configuration")
        return dataset

    def _place(self, unit: Unit) -> tuple[int, np.dtype]:
        """(offset in the file, stored dtype) of a unit."""
        with self._damaged():
            dataset = self._dataset(unit)
            offset, size = dataset.id.get_offset(), dataset.dtype.itemsize
        if offset is None:
            raise UserError(f"{self.path}: {unit.dataset}: expected a contiguous dataset with its space allotted")
        if unit.expert >= 0:
            offset += unit.expert * dataset.shape[1] * size
        if offset + unit.elements * size > self._size:
            raise UserError(f"{self.path}: truncated: {unit.name} ends at byte {offset + unit.elements * size}, "
                            f"the file at {self._size}")
        return offset, dataset.dtype

    def _bytes(self, unit: Unit, offset: int, kind: np.dtype) -> memoryview:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = unit.elements * kind.itemsize
        page = mmap.PAGESIZE
        if length >= 16 * page:
            start = offset - offset % page
            try:
                self._map.madvise(_POPULATE_READ, start, offset + length - start)
            except OSError:
                self._map.madvise(mmap.MADV_WILLNEED, start, offset + length - start)
        return memoryview(self._map)[offset:offset + length]

    def _expected(self, unit: Unit) -> int:
        if self._sums is None:
            with self._damaged():
                self._sums = self._small("checksums")[()]
        row = schema.row_of(self.config, unit)
        if self._sums.dtype != schema.CHECKSUM_ROW or row >= len(self._sums) \
                or self._sums["name"][row].decode("latin1") != unit.name:
            raise UserError(f"{self.path}: checksums: no row for {unit.name} where it should be")
        return int(self._sums["xxh3_64"][row])

    def _hand_out(self, unit: Unit) -> dict[str, np.ndarray]:
        offset, kind = self._place(unit)
        raw = self._bytes(unit, offset, kind)
        if self.verify:
            expected, found = self._expected(unit), xxhash.xxh3_64_intdigest(raw)
            if expected != found:
                raise UserError(f"{self.path}: {unit.name}: checksum {found:016x}: expected {expected:016x}; "
                                "the file is damaged")
        flat = np.frombuffer(raw, kind)
        if offset % 64:  # small tensors are packed: libraries want aligned rows
            flat = flat.copy()
            flat.flags.writeable = False
        self.bytes_read += flat.nbytes
        found, start = {}, 0
        for name, shape in unit.parts.items():
            count = int(np.prod(shape))
            found[name] = flat[start:start + count].reshape(shape)
            start += count
        return found

    def _nbytes(self, units: list[Unit]) -> int:
        with self._damaged():
            return sum(unit.elements * self._dataset(unit).dtype.itemsize for unit in units)


def _open(path: str) -> h5py.File:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder: expected a weights file; `hpcmoe weights convert` makes one")
    try:
        _check_structure(path)
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        text = str(error)
        if "truncated file" in text:
            raise UserError(f"{path}: truncated: {os.path.getsize(path)} bytes are fewer than it was "
                            "written with; copy or convert it again") from error
        raise UserError(f"{path}: cannot be read: {error.strerror or text}") from error


def _check_structure(path: str) -> None:
    """UserError unless the file has our stamp and the structure that the stamp promises."""
    with open(path, "rb") as file:
        first = file.read(schema.STAMP_SIZE)
        if not first.startswith(f"{schema.FORMAT} weights ".encode()):
            if not h5py.is_hdf5(path):
                raise UserError(f"{path}: not an HDF5 file")
            raise UserError(f"{path}: an HDF5 file, but not one of model weights; "
                            "`hpcmoe weights convert` makes one")
        try:
            (*_, version), (_, begin, end, checksum) = (line.split() for line in first.split(b"\n")[:2])
            end, expected = int(end), int(checksum, 16)
            sound = int(begin) == schema.STAMP_SIZE and first == schema.stamp(end, expected).ljust(len(first), b"\0")
        except ValueError:
            sound, version = False, b""
        if version.isdigit() and int(version) != schema.VERSION:
            raise UserError(f"{path}: schema version {int(version)}: this program reads version "
                            f"{schema.VERSION}; convert the model again")
        if not sound:
            raise UserError(f"{path}: damaged: its first {schema.STAMP_SIZE} bytes are not those of a weights file")
        size = os.path.getsize(path)
        if size < end:
            raise UserError(f"{path}: truncated: {size} bytes: expected at least {end}")
        found = xxhash.xxh3_64_intdigest(file.read(end - schema.STAMP_SIZE))
        if found != expected:
            raise UserError(f"{path}: damaged: checksum of its structure {found:016x}: expected {expected:016x}")
