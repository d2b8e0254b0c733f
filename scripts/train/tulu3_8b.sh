#!/usr/bin/env bash
# Llama-3.1-Tulu-3-8B reward model on 8 nodes of 8 GPUs. Run it once on every node:
#
#   NODE_RANK=0 MASTER_ADDR=node0 scripts/train/tulu3_8b.sh      # and NODE_RANK=1 to 7 on the others
#
# More arguments go to rmtool train: --dry-run for the plan; --nodes 1 --gpus-per-node 8 for the same steps on one node.
set -euo pipefail
: "${NODE_RANK:?which node this is, 0 to 7}" "${MASTER_ADDR:?the name or address of node 0}"
exec rmtool train --recipe tulu3-8b --node-rank "$NODE_RANK" --main-address "$MASTER_ADDR" "$@"
