"""What a training process leaves for the launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rmtool.training.worker_status import read_status, status_file

FULL_DISK = """
import errno, sys
from pathlib import Path
from rmtool.training import worker_status as module

def full(folder, status):
    (folder / f".rank-{status.rank}.json").touch()
    raise OSError(errno.ENOSPC, "No space left on device")

folder = Path(sys.argv[1])
module.mark_started(folder, 3)
reserved = (folder / ".rank-3.reserve").stat()
assert reserved.st_blocks * 512 >= reserved.st_size > 10_000
if sys.argv[2] == "full":
    module._write = full
module.mark_exited(folder, 3, 5, {"code": "E0502", "rows": ["r" * 100] * 20})
"""


def test_an_error_reaches_the_launcher_also_on_a_full_disk(tmp_path: Path) -> None:
    for disk in ("full", "free"):
        subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), disk], check=True)
        status = read_status(status_file(tmp_path, 3))
        assert (status.rank, status.exit, (status.error or {})["code"]) == (3, 5, "E0502")
        assert not (tmp_path / ".rank-3.reserve").exists()
