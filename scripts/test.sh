#!/usr/bin/env bash
# Sets up an environment and runs the tests, offline and on the CPU; arguments go to pytest, with its exit status.
#   bash scripts/test.sh [-k expression ...]
# TRL_DYNAMICS_DATA names the folder with the public data files (see README.md); tests that need it skip without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
setup_env test,deepspeed
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Bitwise comparisons need a fixed number of threads; tests/conftest.py hides the GPUs unless `-m gpu` asks for them.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadfile "$@"
