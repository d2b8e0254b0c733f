#!/usr/bin/env bash
# Run all benchmarks on a CUDA device: scripts/bench/bench_gpu.sh [FOLDER for the JSON files and the plot]
# Requires a GPU with 80 GB, Python 3.11 or newer and a package index (or PEER_PYTHON, an interpreter with trl); data and
# model are in ../shared. A benchmark that fails does not stop the others; the exit code is then 1.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../../runs/bench-gpu}")
cd "$(dirname "$0")/../.." || exit 2
source scripts/setup.sh || exit 2
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device available" >&2; exit 2; }
mkdir -p "$out"
peers=(${PEER_PYTHON:+--peer-python "$PEER_PYTHON"})
gpu=(--device cuda --precision bf16)
failed=()

bench() { # bench NAME SCRIPT OPTIONS...
    local name=$1 script=$2
    shift 2
    printf '\n\033[1m%s\033[0m\n' "$name"
    python "scripts/bench/$script" "$@" "${gpu[@]}" --json "$out/$name.json" || { [ $? -eq 130 ] && exit 130; failed+=("$name"); }
}

train=(--batch-size 32 --steps 10 --rounds 3 "${peers[@]}")
bench train-smollm2-hh bench_train.py "${train[@]}"
bench train-smollm2-hh-without-liger bench_train.py "${train[@]}" --liger off
bench train-smollm2-rmb bench_train.py "${train[@]}" --data rmb
bench train-1b-hh bench_train.py "${train[@]}" --random-llama 1b
bench train-1b-hh-without-liger bench_train.py "${train[@]}" --random-llama 1b --liger off
bench score-smollm2-hh bench_score.py --count 4096 --sample 512 "${peers[@]}"
bench score-smollm2-16 bench_score.py --count 4096 --sample 512 --responses 16 "${peers[@]}"
bench score-smollm2-16-long bench_score.py --count 1024 --sample 256 --responses 16 --min-prompt 512 "${peers[@]}"
bench score-1b-hh bench_score.py --count 2048 --sample 256 --random-llama 1b "${peers[@]}"
bench score-8b-hh bench_score.py --count 1024 --sample 128 --random-llama 8b "${peers[@]}"
bench cost-smollm2 bench_cost.py steps --plot "$out/cost-smollm2.png"

printf '\nresults: %s\n' "$out"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
