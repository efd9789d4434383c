# Sourced by quickstart.sh and test.sh: a virtual environment with this checkout in it, made once and reused.
#   setup_env EXTRAS    creates or updates the environment and puts it first on PATH
# TRL_DYNAMICS_VENV names another place for it (default: .venv in the checkout), PYTHON another interpreter.

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            >/dev/null 2>&1; then
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

install() {
    local venv=$1 extras=$2 python log needed_mb=4000
    python=$(find_python) || fail "no Python 3.11 or 3.12 found; install one or name it with PYTHON=/path/to/python3.11"
    # The CUDA build of torch and its libraries are several times the size of the CPU build.
    command -v nvidia-smi >/dev/null 2>&1 && needed_mb=12000
    require_disk "$(dirname "$venv")" "$needed_mb"
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -m venv "$venv" >/dev/null 2>&1 ||
            fail "$python cannot make a virtual environment in $venv; on Debian or Ubuntu install python3-venv"
    fi
    log="$venv/install.log"
    echo "installing into $venv (a few minutes the first time; log: $log)"
    # torch comes first: with it in place no other package can pull in a different build.
    if ! { "$venv/bin/python" -m pip install -c constraints.txt torch &&
        "$venv/bin/python" -m pip install -c constraints.txt -e ".[$extras]"; } >"$log" 2>&1; then
        if grep -qE 'ConnectionError|NewConnectionError|Max retries|ProxyError|ReadTimeout|name resolution' "$log"; then
            fail "no network: pip could not reach its package index (log: $log)"
        fi
        fail "pip could not install: $(grep 'ERROR' "$log" | head -n 1) (log: $log)"
    fi
}

setup_env() {
    local extras=$1 venv stamp wanted
    venv=${TRL_DYNAMICS_VENV:-$PWD/.venv}
    mkdir -p "$(dirname "$venv")" 2>/dev/null || fail "cannot write $(dirname "$venv"); set TRL_DYNAMICS_VENV to another place"
    # Two starts at once would install over each other.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$venv.lock"
        flock 9
    fi
    stamp="$venv/installed-$extras"
    wanted="$(cat constraints.txt setup.cfg pyproject.toml | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        install "$venv" "$extras"
        echo "$wanted" >"$stamp"
    fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>&-
    fi
    export PATH="$venv/bin:$PATH"
}
