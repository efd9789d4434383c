#!/usr/bin/env bash
# The main job on a fresh machine: sets up an environment and runs the quickstart on the embedded model.
#   bash scripts/quickstart.sh [--output_dir runs/quickstart]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
setup_env report
exec trl-dynamics quickstart "$@"
