#!/usr/bin/env bash
# Lint, type check and all tests, `slow` and `real` ones too, in .venv (made if it is not there). Needs no network
# beyond the package index. More arguments go to pytest: scripts/test.sh -k packing
# Tests marked `real` need ../shared and say so when it is not there; `gpu` ones need a CUDA device.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
