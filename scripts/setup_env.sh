# Sourced by quickstart.sh, test.sh and compat.sh: a virtual environment with this checkout in it, made once and reused.
#   setup_env EXTRAS    creates or updates the environment and puts it first on PATH
# TRL_DYNAMICS_VENV names another place for it (default: .venv in the checkout, where relative paths start), PYTHON
# another interpreter, TRL_DYNAMICS_CONSTRAINTS other pins than constraints.txt (an absolute path).

constraints=${TRL_DYNAMICS_CONSTRAINTS:-constraints.txt}

fail() {
    echo "error: $*" >&2
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

require_disk() {
    local folder=$1 needed_mb=$2 free_mb
    free_mb=$(df -Pm "$folder" | awk 'NR == 2 {print $4}')
    [ "$free_mb" -ge "$needed_mb" ] ||
        fail "the environment needs $needed_mb MB in $folder, $free_mb MB are free; free some or set TRL_DYNAMICS_VENV"
}

make_venv() {
    local venv=$1 python
    if [ -x "$venv/bin/python" ] && ! is_supported "$venv/bin/python"; then
        fail "$venv holds another Python than 3.11 and 3.12; delete it or set TRL_DYNAMICS_VENV to another place"
    fi
    # Without Debian's python3-venv a first try leaves a python without pip behind; a later one completes it.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) ||
            fail "no Python 3.11 or 3.12 found; install one or name it with PYTHON=/path/to/python3.11"
        "$python" -m venv "$venv" >/dev/null 2>&1 ||
            fail "$python cannot make a virtual environment in $venv; on Debian or Ubuntu install python3-venv"
    fi
}

# The line that says why: pip's first error line, else the last line of its log.
reason() {
    grep -iE '^ *error' "$1" | head -n 1 | grep . || tail -n 1 "$1"
}

install() {
    local venv=$1 extras=$2 log needed_mb=4000
    local unreachable='ConnectionError|ConnectTimeout|ReadTimeout|Max retries|ProxyError|[Nn]ame ?[Rr]esolution'
    # The CUDA build of torch and its libraries are several times the size of the CPU build.
    command -v nvidia-smi >/dev/null 2>&1 && needed_mb=12000
    require_disk "$(dirname "$venv")" "$needed_mb"
    make_venv "$venv"
    log="$venv/install.log"
    echo "installing into $venv (a few minutes the first time; log: $log)"
    # torch comes first: with it in place no other package can pull in a different build.
    if ! { "$venv/bin/python" -m pip install -c "$constraints" torch &&
        "$venv/bin/python" -m pip install -c "$constraints" -e ".[$extras]"; } >"$log" 2>&1; then
        # pip itself calls an index it cannot reach "conflicting dependencies", because of the pins.
        if grep -qE "$unreachable" "$log"; then
            fail "no network: pip could not reach its package index (log: $log)"
        fi
        fail "pip could not install: $(reason "$log") (log: $log)"
    fi
}

setup_env() {
    local extras=$1 venv stamp wanted other
    venv=${TRL_DYNAMICS_VENV:-$PWD/.venv}
    [[ $venv == /* ]] || venv=$PWD/$venv
    { mkdir -p "$(dirname "$venv")" && [ -w "$(dirname "$venv")" ]; } 2>/dev/null ||
        fail "cannot write $(dirname "$venv"); set TRL_DYNAMICS_VENV to another place"
    # Two starts at once would install over each other.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$venv.lock"
        flock 9
    fi
    stamp="$venv/installed-$extras"
    wanted="$(cat "$constraints" setup.cfg pyproject.toml | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        # What other extras installed from other pins is about to be overwritten: they no longer count as installed.
        for other in "$venv"/installed-*; do
            [ "$(cat "$other" 2>/dev/null)" = "$wanted" ] || rm -f "$other"
        done
        install "$venv" "$extras"
        echo "$wanted" >"$stamp"
    fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>&-
    fi
    export PATH="$venv/bin:$PATH"
}
