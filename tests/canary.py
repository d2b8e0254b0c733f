"""Canary tokens: every byte that a test writes, prints or sends is searched for them.

They are in the environment, in the login file of huggingface_hub and in a netrc file. A test that puts one somewhere
else (a flag, a recipe, an error message) does so outside of its tmp_path: see `outside` in conftest.py.
"""

from __future__ import annotations

import base64
import mmap
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HF_TOKEN = "hf_CANARYenvironmentAAAAAAAAAAAAAAAAAAAA"[:37]
LOGIN_TOKEN = "hf_CANARYloginfileBBBBBBBBBBBBBBBBBBBBBB"[:37]
GIVEN_TOKEN = "hf_CANARYgivenCCCCCCCCCCCCCCCCCCCCCCCCCC"[:37]  # not that of a login: in a flag, a recipe, a message
WANDB_KEY = "cafe0123456789cafe0123456789cafe01234567"
NETRC_KEY = "beef0123456789beef0123456789beef01234567"
CANARIES = [token.encode() for token in (HF_TOKEN, LOGIN_TOKEN, GIVEN_TOKEN, WANDB_KEY, NETRC_KEY)]
# As in the header of a request.
CANARIES += [base64.b64encode(f"api:{key}".encode()) for key in (WANDB_KEY, NETRC_KEY)]

LOGIN = Path(tempfile.mkdtemp(prefix="rmtool-login-"))  # not in a folder that is searched
(LOGIN / "token").write_text(LOGIN_TOKEN)
(LOGIN / "netrc").write_text(f"machine 127.0.0.1 login user password {NETRC_KEY}\n")
(LOGIN / "netrc").chmod(0o600)
os.environ.update(HF_TOKEN_PATH=str(LOGIN / "token"), NETRC=str(LOGIN / "netrc"))


def leaks(data: bytes | mmap.mmap) -> list[str]:
    """Return the canaries that are in some bytes, by their first letters."""
    return [canary[:12].decode() for canary in CANARIES if data.find(canary) >= 0]


def leaks_in_files(folder: Path, known: set[tuple[Any, ...]]) -> list[str]:
    """Return the files below a folder with a canary, but those in `known`; add them to it."""
    found = []
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            found += [f"{_shown(path)}: {leak}" for leak in _leaks_in_file(path, known)]
    return found


def _shown(path: Path) -> str:
    """A path without the canaries in it: the report of a leak is searched, too."""
    text = os.fsencode(path)
    for canary in CANARIES:
        text = text.replace(canary, canary[:12])
    return os.fsdecode(text)


def _leaks_in_file(path: Path, known: set[tuple[Any, ...]]) -> list[str]:
    try:
        about = path.stat(follow_symlinks=False)
        identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if identity in known:
            return []
        known.add(identity)
        found = leaks(str(path).encode())
        if not stat.S_ISREG(about.st_mode) or not about.st_size:
            return found
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return found + leaks(data)
    except (OSError, ValueError):  # gone, unreadable as the test wanted, or emptied meanwhile
        return []


class Heard:
    """What tests and their processes print, as far as a test reads it: the rest is in the report of the test."""

    def __init__(self) -> None:
        self.leaks: list[str] = []
        self.read = 0  # bytes

    def hear(self, where: str, *outputs: object) -> None:
        for output in outputs:
            data = output.encode("utf-8", "backslashreplace") if isinstance(output, str) else output
            if isinstance(data, bytes):
                self.read += len(data)
                self.leaks += [f"{where}: {leak}" for leak in leaks(data)]

    def take(self) -> list[str]:
        found, self.leaks = self.leaks, []
        return found


def listen(heard: Heard, fixtures: Iterable[type]) -> None:
    """Hear what tests read of captured output, and what processes print that `subprocess.run` waits for."""
    for fixture in fixtures:
        _tap(fixture, "readouterr", heard, "captured output")
    _tap(subprocess.Popen, "communicate", heard, "output of a process")


def _tap(owner: Any, name: str, heard: Heard, where: str) -> None:
    original = getattr(owner, name)

    def tapped(self: Any, *arguments: Any, **named: Any) -> Any:
        outputs = original(self, *arguments, **named)
        heard.hear(where, *outputs)
        return outputs

    setattr(owner, name, tapped)
