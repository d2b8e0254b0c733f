"""Token cache: tokenized records on disk, one safetensors file per entry.

In: a key that stands for everything the token ids depend on (text, template, tokenizer, options, versions). Out: the
records that were tokenized under the same key, or nothing (see `rmtool.data.cache_files`).
Cost: 4 bytes of disk per token, and the same again while an entry is written.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rmtool.data.cache_files import cache_errors, cache_folder, commit_entry, find_entry, unfinished_entry
from rmtool.tokenization.response_group import ResponseGroup
from rmtool.tokenization.token_store import TokenStore
from rmtool.tokenization.tokenized_dataset import GroupSink, TokenizedDataset

TOKENS = "tokens"  # the kind of cache entries
_DTYPES = {"I32": np.int32, "I64": np.int64}


def get(key: str, say: Callable[[str], None]) -> TokenizedDataset | None:
    """Load the entry of `key`, without metadata; None if there is none, or it is corrupted."""
    path = find_entry(TOKENS, key, say)
    if path is None:
        return None
    arrays, counts = _map_safetensors(path)
    indices, failed = array("q", arrays.pop("indices").tobytes()), arrays.pop("failed").tolist()
    groups = TokenStore.from_arrays(**arrays)
    return TokenizedDataset(groups=groups, indices=indices, counts=Counter(counts), failed=failed)


class _Sink:
    """Appends groups to a store; an error of the disk is not one of the data."""

    def __init__(self, folder: Path):
        self.folder = folder
        with cache_errors(folder):
            self.groups = TokenStore(folder)

    def append(self, group: ResponseGroup) -> None:
        with cache_errors(self.folder):
            self.groups.append(group)


def store(encode: Callable[[GroupSink], TokenizedDataset], folder: Path) -> TokenizedDataset:
    """Tokenize into a temporary file in `folder`.

    Raises:
        RmtoolError: E0502 it cannot be written; and what `encode` raises.
    """
    sink = _Sink(folder)
    tokenized = encode(sink)
    tokenized.groups = sink.groups
    return tokenized


def put(key: str, encode: Callable[[GroupSink], TokenizedDataset]) -> TokenizedDataset:
    """Tokenize, and write the result as the entry of `key`.

    Raises:
        RmtoolError: as `store`.
    """
    from safetensors.numpy import save_file

    folder = cache_folder(TOKENS)
    with unfinished_entry(TOKENS) as unfinished:
        tokenized = store(encode, folder)
        groups = tokenized.groups
        assert isinstance(groups, TokenStore)
        places = {"indices": np.array(tokenized.indices), "failed": np.array(tokenized.failed, dtype=np.int64)}
        # Written from the mapped file: the ids are never held in memory.
        with cache_errors(folder):
            save_file(groups.arrays() | places, unfinished, {"counts": json.dumps(tokenized.counts)})
        commit_entry(unfinished, key, ".safetensors")
    return tokenized


def _map_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Map the tensors of a verified entry; safetensors' own reader would copy them into memory."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        counts = json.loads(header.pop("__metadata__")["counts"])
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)[8 + size :]
    arrays = {name: content[slice(*item["data_offsets"])].view(_DTYPES[item["dtype"]]) for name, item in header.items()}
    return arrays, counts
