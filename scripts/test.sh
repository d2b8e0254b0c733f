#!/usr/bin/env bash
# Lint, type check and the quick tests, in .venv (made if it is not there). No network is needed beyond the package
# index. Arguments go to pytest instead: scripts/test.sh -m slow, scripts/test.sh -m real, scripts/test.sh -k packing
# `slow` tests start processes or go through many cases; `real` ones need ../shared and are skipped, with a word, where
# it is not; `gpu` ones need a CUDA device. .ci/run runs them all.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
# A file's tests stay on one worker: they share what its fixtures trained.
exec python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
