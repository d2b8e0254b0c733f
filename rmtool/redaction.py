"""Access tokens and keys: found in text, and replaced before it is shown or written.

In: text. Out: the same text without tokens of Hugging Face, keys of Weights & Biases, passwords in addresses, and the
values with which this process is logged in.
What is printed, on a terminal or into a log, passes `redact`; recipes that contain a token are refused, so that none
gets into a file of a run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN = "***"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_MIN_LENGTH = 12  # of a value with which a process is logged in; shorter ones would hide words
_PATTERNS = re.compile(r"(?<=hf_)[A-Za-z0-9]{20,}|(?<=wandb_v1_)\w{20,}|(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)")
# As the services make them: a folder may be named hf_ and something.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{34}(?![A-Za-z0-9])|wandb_v1_\w{40,}")


def redact(text: str) -> str:
    """Replace what is secret in a text."""
    for value in _known():
        text = text.replace(value, HIDDEN)
    return _PATTERNS.sub(HIDDEN, text)


def has_token(text: str) -> bool:
    """Return whether a text contains a token or key, or a value with which this process is logged in."""
    return bool(_TOKEN.search(text)) or any(value in text for value in _known())


def _known() -> set[str]:
    """The values with which this process is logged in."""
    # Not Path.expanduser, which fails for a user without a home folder.
    home = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    stored = _read(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
    passwords = re.findall(r"\bpassword\s+(\S+)", _read(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")))
    values = {os.environ.get(name, "").strip() for name in _VARIABLES} | {stored.strip(), *passwords}
    return {value for value in values if len(value) >= _MIN_LENGTH}


@functools.lru_cache(8)
def _read(path: str) -> str:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text(encoding="utf-8")
    return ""


class RedactedStream:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Redact what Python code prints in the block: libraries, warnings, tracebacks."""
    with (
        contextlib.redirect_stdout(RedactedStream(sys.stdout)),
        contextlib.redirect_stderr(RedactedStream(sys.stderr)),
    ):
        yield
