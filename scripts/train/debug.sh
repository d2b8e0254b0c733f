#!/usr/bin/env bash
# Train the tiny debug model on one device. More arguments go to rmtool train: scripts/train/debug.sh --set train.seed=1
set -euo pipefail
exec rmtool train --recipe debug "$@"
