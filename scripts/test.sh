#!/usr/bin/env bash
# Lint, type check and all tests but those marked `real`, in .venv (made if it is not there). No network is needed
# beyond the package index. Arguments go to pytest instead: scripts/test.sh -m real, scripts/test.sh -k packing
# Tests marked `real` need ../shared and are skipped, with a word, where it is not; `gpu` ones need a CUDA device.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# A file's tests stay on one worker: they share what its fixtures trained.
exec python -m pytest -m "not real" --numprocesses 2 --dist loadscope --no-loadscope-reorder
