#!/usr/bin/env bash
# Train the tiny debug model on one device. Arguments are passed to rmtool train:
#
#   scripts/train/debug.sh --set train.seed=1
set -euo pipefail
exec rmtool train --recipe debug "$@"
