#!/usr/bin/env bash
# Proves on a machine with one NVIDIA GPU what tests on a CPU cannot, in ten minutes and without a network.
#   benchmarks/gpu_check.sh [--data_dir FOLDER] [--cpu]
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Empty caches, so that nothing of earlier runs is taken for a result of this one.
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 HF_DATASETS_CACHE="$scratch/cache"
unset PYTHONDONTWRITEBYTECODE  # or each of the runs would compile modules again
python3 -m benchmarks.gpu_check "$@"
