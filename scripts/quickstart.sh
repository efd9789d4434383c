#!/usr/bin/env bash
# The main job on a fresh machine: sets up an environment and runs the quickstart on the embedded model.
#   bash scripts/quickstart.sh [--output_dir runs/quickstart]
# Relative paths among the arguments start where it was called.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
setup_env report
cd "$caller"
exec trl-dynamics quickstart "$@"
