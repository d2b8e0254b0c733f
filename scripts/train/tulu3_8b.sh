#!/usr/bin/env bash
# Train the Llama-3.1-Tulu-3-8B reward model on 8 nodes of 8 GPUs. Run it once on every node:
#
#   NODE_RANK=0 MASTER_ADDR=node0 scripts/train/tulu3_8b.sh      # and NODE_RANK=1 to 7 on the others
#
# Arguments are passed to rmtool train: --dry-run prints the plan, --nodes 1 --gpus-per-node 8 takes the same steps on
# one node.
set -euo pipefail
: "${NODE_RANK:?set it to the rank of this node, 0 to 7}" "${MASTER_ADDR:?set it to the hostname or IP address of node 0}"
exec rmtool train --recipe tulu3-8b --node-rank "$NODE_RANK" --main-address "$MASTER_ADDR" "$@"
