"""Tokenized records, kept between runs.

In: a key that says all that the token ids depend on (text, template, tokenizer, options, versions). Out: the records
that were encoded under the same key, or nothing. A key never comes back for other content, so an entry is right or not
there; one that is damaged is removed, and said.
Cost: 4 bytes of disk per token; reading an entry checks all of it, about 1 GB/s. Entries that were not used for KEPT
days go when another is written; folders of other names stay.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rmtool.errors import RmtoolError
from rmtool.tokenization.token_store import TokenStore
from rmtool.tokenization.tokenized_dataset import TokenizedDataset

KEPT = 30
_DAY = 24 * 3600
_ENTRY, _UNFINISHED = re.compile("[0-9a-f]{32}"), ".tmp-"  # names of folders: a key; what is being written
_IDS, _INDEX, _FACTS = "ids.bin", "index.npz", "entry.json"


def cache_folder() -> Path:
    """`tokens` in $RMTOOL_CACHE, or in rmtool in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmtool"
    return Path(os.environ.get("RMTOOL_CACHE") or home) / "tokens"


def get(key: str, say: Callable[[str], None]) -> TokenizedDataset | None:
    """What was kept under `key`, without labels; None if there is nothing, or it is damaged."""
    folder = cache_folder() / key
    if not folder.is_dir():
        return None
    try:
        facts = _checked(folder)
        with np.load(io.BytesIO(facts.pop("index"))) as stored:
            index = dict(stored)
        groups = TokenStore.reopen(folder / _IDS, index)
        if groups.crc != facts["ids"]:
            raise ValueError(f"{_IDS} has another checksum")
    except (OSError, ValueError) as error:
        say(f"note: the tokenized data in {folder} is damaged ({error}) and is made again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):  # the files are open: the entry may be gone by now, or not be ours to change
        os.utime(folder)
    kept = array("q", index["kept"].astype(np.int64).tobytes())
    return TokenizedDataset(
        groups=groups, indices=kept, counts=Counter(facts["counts"]), failed=index["failed"].tolist()
    )


def _checked(folder: Path) -> dict[str, Any]:
    """What `_finish` wrote, the index as bytes. Checksums come before parsers, which fail in many ways.

    Raises:
        OSError, ValueError: the files are not there, or not as they were written.
    """
    text, _, crc = (folder / _FACTS).read_bytes().rpartition(b"\n")
    if crc != b"%d" % zlib.crc32(text):
        raise ValueError(f"{_FACTS} has another checksum")
    facts, index = json.loads(text), (folder / _INDEX).read_bytes()
    if zlib.crc32(index) != facts["index"]:
        raise ValueError(f"{_INDEX} has another checksum")
    return {**facts, "index": index}


def _finish(folder: Path, tokenized: TokenizedDataset, groups: TokenStore) -> None:
    """Write what belongs to the ids."""
    groups.flush()
    places = {"kept": np.array(tokenized.indices), "failed": np.array(tokenized.failed, dtype=np.int64)}
    np.savez(folder / _INDEX, allow_pickle=False, **places, **groups.layout())
    facts = {"ids": groups.crc, "index": zlib.crc32((folder / _INDEX).read_bytes()), "counts": tokenized.counts}
    text = json.dumps(facts).encode()
    (folder / _FACTS).write_bytes(b"%b\n%d" % (text, zlib.crc32(text)))


def put(key: str, encode: Callable[[TokenStore], TokenizedDataset]) -> TokenizedDataset:
    """Encode into the cache; an entry appears when it is whole.

    Raises:
        RmtoolError: E0502 it cannot be written; and whatever `encode` raises.
    """
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
        try:
            groups = TokenStore(temporary / _IDS)
            tokenized = encode(groups)
            _finish(temporary, tokenized, groups)
            _name(temporary, root / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # the spool's open file stays readable
        _prune(root)
    except OSError as error:
        hint = "free the disk, or name another folder in $RMTOOL_CACHE; train also has --set data.cache=false"
        raise RmtoolError("E0502", f"{root} cannot be written: {error.strerror or error}", hint) from error
    return tokenized


def _name(folder: Path, entry: Path) -> None:
    try:
        folder.rename(entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another process has written the same entry meanwhile, and may be reading it: it stays.


def _prune(root: Path) -> None:
    """Remove entries that were not used for KEPT days, and what a process that was killed a day ago left behind."""
    for folder in root.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            # It may be gone by now, renamed or removed by another process; and other users' folders are theirs.
            if _is_old(folder, time.time()):
                shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path, now: float) -> bool:
    if folder.name.startswith(_UNFINISHED):
        return _last_written(folder) < now - _DAY
    return bool(_ENTRY.fullmatch(folder.name)) and folder.stat().st_mtime < now - KEPT * _DAY


def _last_written(folder: Path) -> float:
    """A folder's own time does not change while a file in it grows."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
