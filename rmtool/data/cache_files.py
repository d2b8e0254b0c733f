"""Entries of the cache on disk: one file each, whose name holds its key and its checksum.

In: a kind (a folder of the cache), and a key that stands for everything the content depends on. Out: the path of a
verified entry, or a temporary file that becomes one by a rename. A corrupted entry is removed and reported; entries
that were not used for MAX_AGE_DAYS are removed when one is written.
Cost: an entry is read once to verify it, about 1 GB/s.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rmtool.errors import RmtoolError

MAX_AGE_DAYS = {"tokens": 30, "records": 2}  # by kind; records have the text, and a copied file is parsed again
_DAY = 24 * 3600
_ENTRY, _UNFINISHED = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}\.\w+"), ".tmp-"


def cache_folder(kind: str) -> Path:
    """The folder of a kind of entries: in $RMTOOL_CACHE, or in `rmtool` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmtool"
    return Path(os.environ.get("RMTOOL_CACHE") or home) / kind


def find_entry(kind: str, key: str, say: Callable[[str], None]) -> Path | None:
    """Find and verify the entry of a key; None if there is none, or it is corrupted."""
    for path in cache_folder(kind).glob(f"{key}-*"):
        with contextlib.suppress(OSError):  # removed by another process, of another user, or on a read-only disk
            if f"-{_checksum(path)}." in path.name:
                with contextlib.suppress(OSError):  # another user's entry can be read, but not marked as used
                    os.utime(path)
                return path
            say(f"note: {kind.removesuffix('s')} cache {path} is corrupted (checksum mismatch); creating it again")
            path.unlink()
    return None


@contextlib.contextmanager
def unfinished_entry(kind: str) -> Iterator[Path]:
    """An empty temporary file in the folder of `kind`, removed at the end unless `commit_entry` renamed it.

    Raises:
        RmtoolError: E0502 the folder cannot be written.
    """
    folder = cache_folder(kind)
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=folder)
        os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def commit_entry(path: Path, key: str, suffix: str) -> None:
    """Rename a complete temporary file to the entry of `key`, once its content is on disk; remove old entries.

    Raises:
        RmtoolError: E0502 the folder cannot be written.
    """
    with cache_errors(path.parent):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, path.with_name(f"{key}-{_checksum(path)}{suffix}"))
        _prune(path.parent)


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError or SafetensorError into an RmtoolError: E0502 `folder` cannot be written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        temporary = folder == Path(tempfile.gettempdir())
        hint = f"free disk space, or set ${'TMPDIR' if temporary else 'RMTOOL_CACHE'} to a different folder"
        hint += "" if temporary else "; rmtool train also has --set data.cache=false"
        raise RmtoolError(
            "E0502", f"cannot write {folder}: {getattr(error, 'strerror', None) or error}", hint
        ) from error


def _checksum(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _prune(folder: Path) -> None:
    """Remove entries that were not used for their MAX_AGE_DAYS, and what a process killed a day ago left."""
    for path in folder.iterdir():
        age = MAX_AGE_DAYS[folder.name] if _ENTRY.fullmatch(path.name) else None
        days = 1 if path.name.startswith(_UNFINISHED) else age
        with contextlib.suppress(FileNotFoundError, PermissionError):  # removed by another process, or another user's
            if days and path.stat().st_mtime < time.time() - days * _DAY:
                path.unlink()
