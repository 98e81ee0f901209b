"""A Hugging Face checkpoint -> a weights file, in small pieces however large the model."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np

from hpcmoe.data.checkpoint import DTYPES, Checkpoint, Tensor
from hpcmoe.data.weights_write import Header, WeightsWriter
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import STORED, from_fp32, to_fp32
from hpcmoe.model.families import model_config
from hpcmoe.model.sources import Piece, sources


@dataclass(frozen=True)
class Converted:
    """What a conversion did. nbytes: of all tensors; resumed: tensors and experts that an earlier,
    cut conversion had finished, of `units`; notes: lines that the user should see."""

    nbytes: int
    units: int
    resumed: int
    dtype: str
    notes: tuple[str, ...]


def convert(folder: str, out: str, dtype: str | None = None,
            progress: Callable[[int, int, str], None] = lambda done, total, name: None,
            say: Callable[[str], None] = lambda line: None) -> Converted:
    """Converts checkpoint `folder` into weights file `out`.

    dtype: "fp32", "fp16" or "bf16" for all tensors; None keeps each as the checkpoint has it.
    progress(bytes done, bytes in all, name) after every tensor or expert; say(line) for what is
    worth knowing before the work begins. Memory: a few pieces of 1 MiB, whatever the tensors' size.

    Raises UserError, before anything is written, for a family, option, type or tensor that is not
    supported; and where the output cannot be written (the finished part is then kept, and the same
    call goes on from there).
    """
    with Checkpoint(folder) as checkpoint:
        config = model_config(checkpoint.config, checkpoint.path("config.json"), checkpoint.generation,
                              checkpoint.bos_id)
        tensors = checkpoint.open_tensors()
        parts = sources(config, {name: tensor.shape for name, tensor in tensors.items()}, folder)
        main, others = _dtypes(parts, tensors, dtype)
        header = Header(config, main, others, checkpoint.tokenizer_json, checkpoint.chat_template,
                        checkpoint.special, notes={"source": os.path.basename(os.path.abspath(folder)),
                                                   "made_by": "hpcmoe weights convert"},
                        fingerprint=checkpoint.fingerprint(tensors))
        notes = []
        if checkpoint.tokenizer_json is None:
            notes.append("no tokenizer.json: prompts must be given as token ids")
        if others and dtype is None:
            notes.append("kept apart from " + main + ": " + _summary(others))
        with WeightsWriter(out, header) as writer:
            if writer.restarted:
                say(writer.restarted + ": starting anew")
            if writer.resumed:
                say(f"going on with {writer.part}: {writer.resumed} of {len(writer.units)} tensors and "
                    "experts are there, checksums right")
            total = sum(writer.nbytes(unit) for unit in writer.units)
            done = total - sum(writer.nbytes(unit) for _, unit in writer.pending())
            resumed = writer.resumed
            progress(done, total, "")
            for row, unit in writer.pending():
                target = header.dtype_of(unit.dataset)
                writer.write(row, _values(checkpoint, tensors, parts[unit.name], target))
                done += writer.nbytes(unit)
                progress(done, total, unit.name)
            writer.finish()
        return Converted(total, len(parts), resumed, main, tuple(notes))


def _values(checkpoint: Checkpoint, tensors: dict[str, Tensor], parts: list[Piece],
            target: str) -> Iterator[np.ndarray]:
    """The bytes of one tensor or slab, piece after piece, in the target type."""
    for part in parts:
        tensor = tensors[part.tensor]
        for piece in checkpoint.read(tensor, part.start, part.count):
            if piece.dtype == STORED[target]:
                yield piece
                continue
            wide = to_fp32(piece)
            narrow = from_fp32(wide, target)
            if target == "fp16":
                lost = np.isinf(narrow) & np.isfinite(wide)
                if lost.any():
                    raise UserError(f"{tensor.file}: {tensor.name}: value {wide[lost.argmax()]:g} is beyond "
                                    "fp16's range (65504): use --dtype bf16 or fp32")
            yield narrow


def _dtypes(parts: dict[str, list[Piece]], tensors: dict[str, Tensor],
            wanted: str | None) -> tuple[str, dict[str, str]]:
    """The experts' type, and that of each dataset with another one."""
    for pieces in parts.values():
        for piece in pieces:
            tensor = tensors[piece.tensor]
            if tensor.dtype not in DTYPES:
                raise UserError(f"{tensor.file}: {tensor.name}: type {tensor.dtype} is not supported: "
                                "expected " + ", ".join(DTYPES) + " (quantised weights are not read)")
    if wanted:
        return wanted, {}
    kinds: dict[str, set[str]] = {}
    for name, pieces in parts.items():
        dataset = name.rsplit("/", 1)[0] if "/experts/" in name else name
        key = "experts" if "/experts/" in name else dataset
        kinds.setdefault(key, set()).update(DTYPES[tensors[piece.tensor].dtype] for piece in pieces)
    chosen = {name: found.pop() if len(found) == 1 else "fp32" for name, found in kinds.items()}
    main = chosen.pop("experts")
    return main, {name: kind for name, kind in chosen.items() if kind != main}


def _summary(others: dict[str, str]) -> str:
    """"48 x router fp32, 1 x norm fp32"."""
    count = Counter(f"{name.rsplit('/', 1)[-1]} {kind}" for name, kind in others.items())
    return ", ".join(f"{n} x {what}" for what, n in count.items())
