"""Files that are on the disk when a function returns, and what is known of them: size and hash.

In: paths and bytes. Out: durable files, their entries in a manifest, and how a file differs from its entry.
Cost: an fsync per file; one read per hash, 1 to 2 GB/s.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

_BLOCK = 1 << 22  # bytes that are hashed at once
Entries = dict[str, dict[str, Any]]  # by relative path: size and sha256


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's error behind an exception: torch raises others in its place."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if isinstance(error, CheckpointException):
            return next(filter(None, (disk_error(cause) for cause, _ in error.failures.values())), None)
        error = error.__cause__ or error.__context__
    return None


def write_file(path: Path, data: bytes) -> None:
    """Write a file and make it durable; a disk may take less than all at once."""
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def file_entry(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def difference(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file."""
    try:
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            return f"{name} has {size:,} bytes instead of {expected['size']:,}"
        return None if file_entry(folder / name) == expected else f"{name} has a different hash"
    except OSError as error:
        return f"cannot read {name}: {error.strerror}"


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
