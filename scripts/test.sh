#!/usr/bin/env bash
# Run lint, type checks and the quick tests in .venv (created if needed). Only the package index needs a network.
# With arguments, run only pytest with them: scripts/test.sh -m slow, scripts/test.sh -k packing
# `slow` tests start processes or cover many cases; `real` tests need ../shared and are skipped without it; `gpu` tests
# need a CUDA device. .ci/run runs them all.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
# The tests of a file share trained models, so they stay on one worker.
exec python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
