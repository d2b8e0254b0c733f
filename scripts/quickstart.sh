#!/usr/bin/env bash
# Install rmtool into .venv (if it is not installed), then train and evaluate the tiny `debug` model and score with it.
# Requires Python 3.11 or newer and a package index; no GPU, no other network. Can be repeated: it overwrites
# runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

step rmtool train --recipe debug --output runs/quickstart --overwrite
step rmtool eval runs/quickstart --samples 3
step rmtool score recipes/debug/responses.jsonl --model runs/quickstart --output runs/quickstart/responses.scored.jsonl --overwrite
printf '\nThe first scored rows:\n'
head -n 3 runs/quickstart/responses.scored.jsonl
printf '\nCurves of loss, accuracy and reward margin: %s\n' "$PWD/runs/quickstart/curves.png"
