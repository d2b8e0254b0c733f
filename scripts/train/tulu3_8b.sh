#!/usr/bin/env bash
# Llama-3.1-Tulu-3-8B reward model on 8 nodes of 8 GPUs. This version plans the run and prints each node's command;
# it does not start several processes yet. More arguments go to rmtool train: scripts/train/tulu3_8b.sh --json
set -euo pipefail
exec rmtool train --recipe tulu3-8b --dry-run "$@"
