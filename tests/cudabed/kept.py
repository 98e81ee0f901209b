"""Folders that take long to make, kept for later runs in the folder for temporary files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Callable


def kept(name: str, parts: list[bytes], make: Callable[[Path], Path]) -> Path:
    """The folder of that name for these contents; make(work) makes it within an empty folder, and says where, if it is not there yet."""
    cache = Path(tempfile.gettempdir()) / f"hpcmoe-{name}-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            made = make(Path(work))
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return folder
