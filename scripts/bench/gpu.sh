#!/usr/bin/env bash
# Check rmtool on one CUDA device, and measure it, in parts of at most eight minutes, a process each:
#
#   scripts/bench/gpu.sh OUT_FOLDER [--part NAME]... [--again] [--device cpu] [--model FOLDER] [--pairs FILE.jsonl]
#
# Uses the python in PATH as it is: no package index, no files but those of this repository and those named. Every part
# leaves OUT_FOLDER/PART.json; a part that has one, failed or not, is not run without --again, so the same call continues
# one that was interrupted. `--list` prints the parts. Exit code: 0, 1 if a part failed (the others run), 2 for wrong
# options or missing packages, 130 if interrupted.
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
export PYTHONPATH=$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}
exec python "$root/scripts/bench/gpu_parts.py" "$@"
