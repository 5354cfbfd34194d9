#!/usr/bin/env bash
# Make .venv with this project and its development tools, at the versions of constraints.txt.
#
#   tools/setup_venv.sh            # or: PYTHON=/path/to/python3.12 tools/setup_venv.sh
#   tools/setup_venv.sh te         # and into .venv/te, a folder of its own, what tests/te runs: its requirements.txt
#
# Needs CPython 3.12 and nothing else. A second call costs nothing until setup.py or constraints.txt change: a stamp in .venv
# holds their checksum, and is written last, so that an interrupted call is simply repeated. uv (inside .venv) installs where
# it can, under the indexes and certificates of the user's pip configuration; pip installs where uv cannot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.installed
extras=dev

fail() { # one sentence to stderr, then stop
    echo "setup: $*" >&2
    exit 1
}

is_python312() { # a pyenv shim answers to its name and then fails, so the interpreter has to run
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate pyenv_root
    if [ -n "${PYTHON:-}" ]; then
        is_python312 "$PYTHON" || fail "PYTHON=$PYTHON is not a CPython 3.12 with the venv module; point it at one."
        echo "$PYTHON"
        return
    fi
    pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
    for candidate in python3.12 python3 python "$pyenv_root"/versions/3.12*/bin/python; do
        if is_python312 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no CPython 3.12 with the venv module on the PATH or under $pyenv_root/versions; install one, or say PYTHON=/path/to/python3.12."
}

pip_setting() { # the value that pip's own configuration (files and environment) gives to option $1, lines joined by spaces
    "$venv/bin/python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1 | sed 's/\\n/ /g'
}

lend_pip_settings_to_uv() { # what the user already said to uv stands; an unset option stays unset
    local value
    value=$(pip_setting index-url);       [ -z "$value" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}"
    value=$(pip_setting extra-index-url); [ -z "$value" ] || export UV_INDEX="${UV_INDEX:-$value}"
    value=$(pip_setting find-links);      [ -z "$value" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}"
    value=$(pip_setting cert);            [ -z "$value" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}"
    # pip takes the best version of all indexes; without this, uv stops at the first index that knows the name
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
}

with_uv() {
    (lend_pip_settings_to_uv && "$venv/bin/uv" pip install --python "$venv/bin/python" "$@")
}

install_with_uv() {
    "$venv/bin/python" -m pip install -q -c constraints.txt uv || return 1
    with_uv "$@"
}

install() {
    install_with_uv "$@" || {
        echo "setup: uv could not install; trying pip, which is slower."
        "$venv/bin/python" -m pip install "$@"
    }
}

install_te() { # for tests/te; a folder that nothing else has on its path, so that Transformer Engine is found there alone
    local folder=$venv/te wanted=tests/te/requirements.txt
    cmp -s "$wanted" "$folder/.installed" && return
    rm -rf "$folder"
    echo "setup: installing Transformer Engine's Python into $folder, for tests/te"
    set -- --target "$folder" --no-deps -r "$wanted"
    with_uv -q "$@" || "$venv/bin/python" -m pip install -q "$@" || {
        rm -rf "$folder"
        fail "the packages of $wanted could not be installed, see the lines above; with TE=optional its tests are skipped."
    }
    cp "$wanted" "$folder/.installed"
}

checksum=$(echo "$extras" | cat - setup.py constraints.txt | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then
    [ "${1:-}" != te ] || install_te
    exit 0
fi
if [ -e "$venv" ]; then
    is_python312 "$venv/bin/python" || fail "$PWD/$venv is there but is not a working CPython 3.12 environment; remove it and repeat."
else
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version) ($("$python" -c 'import sys; print(sys.executable)'))"
    "$python" -m venv "$venv"
fi
echo "setup: installing megatron_dynmoe[$extras] and what it needs (PyTorch is large: minutes on a slow line)"
install -c constraints.txt -e ".[$extras]" || fail "the installation failed, see the lines above; repeat the command once it is mended."
echo "$checksum" >"$stamp"
[ "${1:-}" != te ] || install_te
