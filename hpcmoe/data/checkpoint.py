"""A Hugging Face checkpoint folder: configuration, tokenizer, and tensors read in small pieces.

The safetensors format is read directly: 8 bytes with the length of a JSON header, that header
({name: {dtype, shape, data_offsets}}), then the bytes of the tensors, row after row.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np

from hpcmoe.errors import UserError, at
from hpcmoe.model.dtypes import STORED

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
PIECE = 1 << 20          # bytes read at a time
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: file, offset of its first byte, shape, dtype as the format names it."""

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A folder with config.json and model.safetensors, or model.safetensors.index.json and shards.

    config, generation: the JSON files (generation: {} where there is none); tensors: name ->
    Tensor; tokenizer_json, chat_template: texts or None; special: names and texts of the special
    tokens; bos_id: the token that the tokenizer puts before a text, -1 for none.

    Raises UserError naming the file for anything missing, malformed or truncated.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.folder}: no such folder" if not os.path.exists(self.folder) else
                            f"{self.folder}: expected a folder with config.json and *.safetensors")
        self.config = self._json("config.json")
        if self.config is None:
            raise UserError(f"{self.path('config.json')}: no such file: expected a Hugging Face checkpoint")
        self.generation = self._json("generation_config.json") or {}
        self._read_tokenizer()
        self._files: dict[str, Any] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _json(self, name: str) -> dict | None:
        """A JSON object in the folder, None where there is no such file."""
        try:
            with open(self.path(name), encoding="utf-8") as file:
                data = json.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path(name)}: cannot be read as JSON: {error}") from error
        if not isinstance(data, dict):
            raise UserError(f"{self.path(name)}: expected a JSON object")
        return data

    # ------------------------------------------------------------ tokenizer
    def _read_tokenizer(self) -> None:
        self.tokenizer_json = self._text("tokenizer.json")
        settings = self._json("tokenizer_config.json") or {}
        self.special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                self.special[name] = token
        self.chat_template = self._text("chat_template.jinja") or _template(settings.get("chat_template"))
        self.bos_id = -1
        if self.tokenizer_json:
            try:
                self.bos_id = _first_token(json.loads(self.tokenizer_json).get("post_processor"))
            except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{self.path('tokenizer.json')}: malformed: {error!r}") from error
        if self.bos_id < 0 and settings.get("add_bos_token") is True:
            bos = self.config.get("bos_token_id")
            self.bos_id = bos if type(bos) is int else -1

    def _text(self, name: str) -> str | None:
        try:
            with open(self.path(name), encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path(name)}: cannot be read: {error}") from error

    # ------------------------------------------------------------ tensors
    def open_tensors(self) -> dict[str, Tensor]:
        """Reads the headers of all shards; name -> Tensor."""
        index = self._json("model.safetensors.index.json")
        if index is None:
            if not os.path.exists(self.path("model.safetensors")):
                raise UserError(f"{self.folder}: neither model.safetensors nor model.safetensors.index.json; "
                                "other formats (pytorch_model.bin, GGUF) are not read")
            return self._shard("model.safetensors")
        where = self.path("model.safetensors.index.json")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise at(where, "weight_map", None, "a table of tensor names and files")
        shards: dict[str, dict[str, Tensor]] = {}
        tensors = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file:
                raise at(where, f"weight_map.{name}", file, "a file name in the same folder")
            if file not in shards:
                shards[file] = self._shard(file)
            if name not in shards[file]:
                raise UserError(f"{self.path(file)}: tensor {name} is missing, which {where} says is there")
            tensors[name] = shards[file][name]
        return tensors

    def _shard(self, name: str) -> dict[str, Tensor]:
        path = self.path(name)
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, LONGEST_HEADER):
                    raise UserError(f"{path}: not a safetensors file, or a truncated one")
                header = json.loads(file.read(length))
            return {tensor: _tensor(path, tensor, entry, 8 + length, size)
                    for tensor, entry in header.items() if tensor != "__metadata__"}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file: a part of the model is missing") from error
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from error

    def read(self, tensor: Tensor, start: int, count: int) -> Iterator[np.ndarray]:
        """Elements [start, start + count) of a tensor in stored form, in pieces of at most PIECE bytes."""
        kind = STORED[DTYPES[tensor.dtype]]
        if tensor.file not in self._files:
            self._files[tensor.file] = open(tensor.file, "rb", buffering=0)
        file = self._files[tensor.file]
        offset, left = tensor.offset + start * kind.itemsize, count * kind.itemsize
        while left:
            raw = os.pread(file.fileno(), min(PIECE, left), offset)
            raw = raw[:len(raw) - len(raw) % kind.itemsize]
            if not raw:
                raise UserError(f"{tensor.file}: truncated while reading {tensor.name}")
            offset, left = offset + len(raw), left - len(raw)
            yield np.frombuffer(raw, kind)

    def fingerprint(self, tensors: dict[str, Tensor]) -> str:
        """Says which bytes the tensors are, without reading them: names, sizes and times of the files."""
        files = sorted({tensor.file for tensor in tensors.values()})
        facts = [(os.path.basename(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
        return repr(facts)


def _tensor(path: str, name: str, entry: dict, base: int, size: int) -> Tensor:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    offsets = entry.get("data_offsets")
    sound = (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
             and isinstance(offsets, list) and len(offsets) == 2
             and all(type(n) is int and n >= 0 for n in offsets))
    if not sound:
        raise UserError(f"{path}: {name}: malformed entry in the header")
    if dtype in DTYPES and offsets[1] - offsets[0] != math.prod(shape) * STORED[DTYPES[dtype]].itemsize:
        raise UserError(f"{path}: {name}: {offsets[1] - offsets[0]} bytes: expected the size of {shape} in {dtype}")
    if base + offsets[1] > size:
        raise UserError(f"{path}: truncated: {name} ends at byte {base + offsets[1]}, the file at {size}")
    return Tensor(name, path, base + offsets[0], tuple(shape), str(dtype))


def _template(value) -> str | None:
    """A chat template: a text, or a list of named ones of which "default" is taken."""
    if isinstance(value, list):
        value = next((entry.get("template") for entry in value
                      if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return value if isinstance(value, str) and value else None


def _first_token(processor: dict | None) -> int:
    """The token id that a tokenizer.json's post-processor puts before a text, -1 for none."""
    if not processor:
        return -1
    if processor.get("type") == "Sequence":
        return max((_first_token(p) for p in processor["processors"]), default=-1)
    if processor.get("type") != "TemplateProcessing" or "SpecialToken" not in processor["single"][0]:
        return -1
    return processor["special_tokens"][processor["single"][0]["SpecialToken"]["id"]]["ids"][0]
