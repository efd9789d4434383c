#!/usr/bin/env bash
# Tries other versions than the tested set of constraints.txt, one at a time: a fresh environment with that one package
# changed, then the golden, contract and unit tests, on the CPU. Prints a table; fails if a version that was tried does.
#   bash scripts/compat.sh                               the newest accepted version of each package
#   bash scripts/compat.sh transformers==5.24.0          this one; python==3.12 and several at once work too
#   bash scripts/compat.sh trl==1.17.0 -- tests/golden   pytest's arguments instead of the three groups of tests
# An environment takes 2 GB below TRL_DYNAMICS_COMPAT (default: .compat in the checkout) and is reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
folder=${TRL_DYNAMICS_COMPAT:-$PWD/.compat}
rows=() failed=0

# What pip would install for these requirements, one NAME==VERSION a line; nothing is downloaded but metadata.
would_install() {
    "$python" -m pip install --dry-run --ignore-installed --quiet --report - "$@" 2>/dev/null | "$python" -c '
import json, sys
for item in json.load(sys.stdin)["install"]:
    print("{name}=={version}".format(**item["metadata"]))'
}

# Whether that torch is a CUDA build, of several GB, on a machine without a GPU.
needs_cuda() {
    ! command -v nvidia-smi >/dev/null 2>&1 && [[ $(would_install "$1") = *nvidia* ]]
}

# The newest version that setup.cfg accepts, of each package that it gives a range for, where it is not the tested one.
newer_versions() {
    local name wanted newest
    for name in transformers trl accelerate datasets peft torch; do
        wanted=$(sed -n "s/^ *\($name>[^ ]*\)/\1/p" setup.cfg)
        newest=$(would_install --no-deps "$wanted") || fail "pip could not look up $wanted"
        grep -qx "${newest%%+*}" constraints.txt || echo "${newest%%+*}"
    done
}

note() {
    rows+=("| $1 | $2 |")
    echo "$1: $2"
}

try() {
    local spec=$1 name=${1%%==*} version=${1#*==} venv="$folder/${1/==/-}" pins="$folder/${1/==/-}.txt" status=0
    local PYTHON=${PYTHON:-} python=$python
    shift
    if [ "$name" = python ]; then
        PYTHON=${PYTHON:-python$version} python=${PYTHON:-python$version}
        if ! "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            note "$spec" "not tried: no Python $version here; name one with PYTHON=/path/to/python$version" && return
        fi
    fi
    sed "s/^$name==.*/$spec/" constraints.txt >"$pins"
    if [[ $name = python || $name = torch ]] && needs_cuda "$(grep '^torch==' "$pins")"; then
        note "$spec" "not tried: there is no CPU build of $(grep '^torch==' "$pins") for it here" && return
    fi
    if ! (TRL_DYNAMICS_VENV=$venv constraints=$pins setup_env test,deepspeed) 2>"$venv.error"; then
        note "$spec" "cannot be installed beside the tested set: $(sed -n 's/^error: //p' "$venv.error")" && failed=1
        return
    fi
    PATH="$venv/bin:$PATH" python -m pytest "$@" 2>&1 | tee "$venv.tests" || status=$?
    [ "$status" = 0 ] || failed=1
    note "$spec" "$(tail -n 1 "$venv.tests") (exit status $status)"
}

python=$(find_python) || fail "no Python 3.11 or 3.12 found; name one with PYTHON=/path/to/python3.11"
mkdir -p "$folder"
specs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 == *==* ]] || fail "expected NAME==VERSION, e.g. transformers==5.24.0, not $1"
    [ "${1%%==*}" = python ] || grep -q "^${1%%==*}==" constraints.txt || fail "constraints.txt has no ${1%%==*}"
    specs+=("$1")
    shift
done
[ $# -gt 0 ] && shift
if [ ${#specs[@]} = 0 ]; then
    found=$(newer_versions)
    mapfile -t specs < <(printf '%s' "$found")
    [ ${#specs[@]} -gt 0 ] || { echo "no newer version than the tested ones" && exit 0; }
fi
[ $# -gt 0 ] || set -- -n 2 --dist loadfile tests/golden tests/integration/test_compat.py tests/unit
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
for spec in "${specs[@]}"; do
    try "$spec" "$@"
done
printf '%s\n' "" "| changed | golden, contract and unit tests |" "| --- | --- |" "${rows[@]}"
exit "$failed"
