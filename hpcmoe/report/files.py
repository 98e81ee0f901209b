"""Files that appear whole under their name or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from hpcmoe.errors import UserError


@contextmanager
def whole_file(path: str | Path, what: str, binary: bool = False):
    """A file to write to (text, if not binary), renamed to `path` at the end of the block.

    Folders are made. An exception in the block leaves nothing behind. what: its name in the message of the
    UserError raised where the folder or file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") if binary else open(part, "w", encoding="utf-8") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write the {what}: {error.strerror}") from error
