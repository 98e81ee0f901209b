"""Files that are whole under their name or not there at all; and TOML."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from hpcmoe.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | os.PathLike) -> dict:
    """The content of a TOML file. Raises UserError where it cannot be read, or is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error


def check_folder(dir) -> None:
    """Make the folder where there is none and try to write in it; what is there stays.

    Raises UserError where that fails: better before hours of work than after.
    """
    path = os.fspath(dir)
    try:
        _make(path)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def replacing(path) -> Iterator[str]:
    """Gives a temporary name beside `path`; at the end what was written there becomes `path`.

    Folders are made. On any failure the temporary file is removed and `path` stays as it was.
    OSError becomes a UserError that names the path.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        _make(folder or ".")
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder or ".")
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename there is nothing left to remove
            os.remove(temporary)


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder}: is a file: expected a folder") from None


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself was synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror or error}")
