"""Fuzz test of reading: each malformed preference file must be read, or refused with an RmtoolError.

    python scripts/fuzz_reading.py --inputs 1000000 --seed 1

In: a seed. Out: how many files were read or refused (by error id); with exit code 1, the first input that ended in a
different exception, and its seed.
Cost: about 700 inputs a second and core; one process per core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmtool.errors import RmtoolError

Q, GOOD, BAD = "Wie spät ist es?", 'Es ist "vier"\n\\ Uhr 🙂.', "Fünf\t"
MESSAGES = [{"role": "user", "content": Q}]
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": Q, "chosen": GOOD, "rejected": BAD, "margin": 1.5, "subset": "x"},
    {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": GOOD}], "rejected": BAD},
    {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"},
    {"context": MESSAGES, "response1": GOOD, "response2": BAD, "overall_preference": -2},
    {"prompt": Q, "answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2}]},
    {"instruction": Q, "completions": [{"response": GOOD, "overall_score": 8.5}, {"response": BAD, "overall_score": 1}],
     "source": "x"},
    {"question": Q, "response_A": GOOD, "response_B": BAD, "label": "A>B"},
    {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, Q]},
    {"prompt": Q, "response": GOOD, "helpfulness": 4},
    {"conversation_a": [*MESSAGES, {"role": "assistant", "content": GOOD}], "winner": "model_a",
     "conversation_b": [*MESSAGES, {"role": "assistant", "content": BAD}]},
    {"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": [{"type": "function"}], "system": "kurz", "weight": 2},
)  # fmt: skip
PIECES = (
    *(b'"', b"\\", b"\\u", b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"-Infinity", b"1e999"),
    *(
        b"null",
        b"true",
        b"0",
        b"-",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\x00",
        b"\n",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"[" * 99,
    ),
    *(b'"prompt":1,', b'"chosen":null,', b'{"a":' * 70, "\N{LINE SEPARATOR}".encode(), b"9" * 5000, b"\t", b""),
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    " ",
    [],
    {},
    [None],
    [[]],
    "x",
    {"role": "user"},
    [1, "a"],
)


def rows_of(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return valid rows in one format."""
    row = rng.choice(ROWS)
    return [row | {"id": number} for number in range(count)]


def as_bytes(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    ascii_only = rng.random() < 0.5
    return b"\n".join(json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows)


def with_invalid_value(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """Remove a field of a row or of something in it, or give it a value of a different type."""
    row = json.loads(json.dumps(rng.choice(rows)))
    target: Any = row
    while isinstance(target, dict | list) and target:
        key = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
        inner = target[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            target = inner
            continue
        if rng.random() < 0.3:
            del target[key]
        else:
            target[key] = rng.choice(VALUES)
        break
    return as_bytes([*rows, row], rng)


def with_invalid_bytes(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """Remove, insert or repeat bytes."""
    content = as_bytes(rows, rng)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 0, 1, 2, 9, 200)))
        middle = rng.choice(PIECES) if rng.random() < 0.7 else content[start:end] * 2
        content = content[:start] + middle + content[end:]
    return content


def with_noise(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    return rng.randbytes(rng.randrange(200))


MAKERS: tuple[Callable[[random.Random, list[dict[str, Any]]], bytes], ...] = (
    *(with_invalid_bytes, with_invalid_bytes, with_invalid_value, with_invalid_value, with_noise),
)


def make_input(seed: int) -> bytes:
    """Return a malformed file (occasionally still a valid one)."""
    rng = random.Random(seed)
    return rng.choice(MAKERS)(rng, rows_of(rng, rng.randrange(1, 5)))


# One error in a row, which a reader of that row must find, whatever the format.
FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda line: line[: len(line) // 2],
    "not UTF-8": lambda line: line[:-1] + b',"z":"\xff"}',
    "unpaired surrogate": lambda line: line[:-1] + b',"z":"\\udc00"}',
    "NUL": lambda line: line[:-1] + b',"z":"\\u0000"}',
    "duplicate key": lambda line: line[:-1] + b',"id":1}',
    "NaN": lambda line: line[:-1] + b',"z":NaN}',
    "number too large": lambda line: line[:-1] + b',"z":-1e999}',
    "nested too deep": lambda line: line[:-1] + b',"z":' + b"[" * 70 + b"]" * 70 + b"}",
    "a list": lambda line: b"[" + line + b"]",
    "extra data": lambda line: line + b" 1",
    "no fields": lambda line: b"{}",
    "a single quote": lambda line: line.replace(b'"id"', b"'id'"),
}


def plant(seed: int) -> tuple[bytes, int, str]:
    """Return a file with one error, its line (from 1) and its kind. The file has a blank line, and may have CRLF."""
    rng = random.Random(seed)
    lines = as_bytes(rows_of(rng, rng.randrange(2, 40)), rng).split(b"\n")
    at, kind = rng.randrange(len(lines)), rng.choice(list(FAULTS))
    lines[at] = FAULTS[kind](lines[at])
    blank = rng.randrange(len(lines))
    lines.insert(blank, b"")
    end = rng.choice((b"\n", b"\r\n"))
    return end.join(lines) + rng.choice((b"", end)), at + 1 + (blank <= at), kind


def first_error(path: Path) -> RmtoolError | None:
    """Return the error that `rmtool` reports for the file; None if it reads it."""
    from rmtool.data.record import RowOptions
    from rmtool.data.rejects import Rejects
    from rmtool.data.sources import SourceCount, read_records
    from rmtool.errors import RmtoolError

    rejects = Rejects()
    try:
        for _ in read_records(str(path), RowOptions(), rejects, SourceCount(str(path)), lambda: None):
            pass
        rejects.raise_if_any()
    except RmtoolError as error:
        return error
    return None


def run_share(share: tuple[int, int]) -> tuple[Counter[str], str | None]:
    """Return the outcomes of the inputs with these seeds, and the first unexpected exception."""
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        for seed in range(*share):
            path.write_bytes(make_input(seed))
            try:
                error = first_error(path)
                assert error is None or int(error.exit_code) in (2, 3), error
                outcomes[error.id if error else "read"] += 1
            except Exception:  # noqa: BLE001 - what the script looks for
                return outcomes, f"seed {seed}: {path.read_bytes()!r}\n{traceback.format_exc()}"
    return outcomes, None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started, total, step = time.perf_counter(), Counter[str](), 5_000
    first = args.seed * 10**9
    shares = [(at, min(at + step, first + args.inputs)) for at in range(first, first + args.inputs, step)]
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        for outcomes, failure in pool.imap_unordered(run_share, shares):
            total += outcomes
            if failure:
                sys.stderr.write(failure)
                return 1
    shown = ", ".join(f"{name} {count:,}" for name, count in sorted(total.items()))
    sys.stdout.write(f"{sum(total.values()):,} inputs in {time.perf_counter() - started:.0f} s: {shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
