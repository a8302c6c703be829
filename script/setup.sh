#!/usr/bin/env bash
# Makes .venv in the checkout and installs requirements.txt into it. A second run sees that all is done and returns.
#
#   bash script/setup.sh                      set up
#   source script/setup.sh                    for scripts: the same, and afterwards ROOT and PY (the interpreter) are
#                                             set, and the working directory is the checkout
#
#   PYTHON=/path/to/python3.11                interpreter that makes .venv (3.10 to 3.12; 3.11 preferred)
#   THREEDR1_PYTHON=/path/to/python           use this interpreter as it is: no .venv, nothing is installed
#   THREEDR1_NO_VENV=1                        the same with `python3` (or PYTHON)
#   THREEDR1_BUILD_OPS=1                      compile the CUDA library too (default: cpu, where there is a compiler; 0)
set -euo pipefail

absolute() { # a path made absolute; a bare command name stays one
    if [[ "$1" == */* && "$1" != /* ]]; then echo "$PWD/$1"; else echo "$1"; fi
}

PYTHON="$(absolute "${PYTHON:-}")"
THREEDR1_PYTHON="$(absolute "${THREEDR1_PYTHON:-}")"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

fail() {
    echo "$*" >&2
    exit 1
}

if [[ "${BASH_SOURCE[0]}" == "$0" && $# -gt 0 ]]; then # sourced, it sees the arguments of the other script
    case "$1" in
    -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) fail "setup.sh takes no arguments, but was given $*; bash script/setup.sh --help says what it reads." ;;
    esac
fi

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    if [[ -n "$PYTHON" ]]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12; name another interpreter."
        command -v "$PYTHON"
        return
    fi
    local name
    for name in python3.11 python3.12 python3.10 python3 python; do
        if command -v "$name" >/dev/null && supported "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "No Python 3.10, 3.11 or 3.12 found; install Python 3.11, or name an interpreter: PYTHON=/path/to/python3.11."
}

# What an up-to-date .venv was made from: the pins, setup.py and what it compiles, the place, the Python version.
stamp() {
    "$1" - "$ROOT" <<'PYTHON_CODE'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
content = b"".join((root / name).read_bytes() for name in ("requirements.txt", "setup.py", "utils/box_intersection.pyx"))
print(hashlib.sha256(content + f"{root} {sys.version_info[:2]}".encode()).hexdigest())
PYTHON_CODE
}

check_given() { # an interpreter that the user vouches for: right version, and what every command needs is there
    supported "$PY" || fail "$PY is not a Python 3.10, 3.11 or 3.12."
    "$PY" - <<'PYTHON_CODE' || exit 1
import importlib.util, sys
def missing(names):
    return ", ".join(name for name in names.split() if importlib.util.find_spec(name) is None)

core = missing("torch transformers peft safetensors numpy scipy PIL yaml orjson tqdm")
if core:
    sys.exit(f"{sys.executable} lacks {core}; install requirements.txt there, or let script/setup.sh make .venv.")
parts = missing("accelerate h5py plyfile trimesh matplotlib rapidfuzz pycocoevalcap")
if parts:
    print(f"setup: {sys.executable} lacks {parts}; the commands that need them will say so.", file=sys.stderr)
PYTHON_CODE
}

make_venv() {
    local base
    base="$(find_python)"
    "$base" -c 'import venv, ensurepip' 2>/dev/null || fail "$base cannot make virtual environments; install its venv package (Debian and Ubuntu: apt install python3-venv), or name another interpreter with PYTHON=."
    echo "setup: making .venv with $("$base" --version 2>&1) ($base)"
    "$base" -m venv .venv
}

install_packages() {
    local torch_pin
    torch_pin="$(grep '^torch==' requirements.txt)"
    echo "setup: installing $torch_pin"
    "$PY" -m pip install --disable-pip-version-check "$torch_pin"
    echo "setup: installing the other packages of requirements.txt"
    "$PY" -m pip install --disable-pip-version-check -r requirements.txt
    if [[ -n "${THREEDR1_BUILD_OPS:-}" ]]; then # asked for by name: a failure is one
        install_checkout
        return
    fi
    if THREEDR1_BUILD_OPS=cpu install_checkout; then return; fi
    echo "setup: nothing could be compiled here (see above); plain PyTorch will compute the same, more slowly" >&2
    install_checkout
}

install_checkout() {
    "$PY" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
}

set_up_venv() {
    PY="$ROOT/.venv/bin/python"
    local made=".venv/.threedr1-stamp" begun=".venv/.threedr1-begun"
    if [[ -f "$made" && "$(cat "$made")" == "$(stamp "$PY" 2>/dev/null)" ]]; then
        return
    fi
    if command -v flock >/dev/null; then # two scripts started at once: the second waits, then finds all done
        exec 9>"$ROOT/.threedr1-setup.lock"
        flock 9
        if [[ -f "$made" && "$(cat "$made")" == "$(stamp "$PY" 2>/dev/null)" ]]; then
            exec 9>&-
            return
        fi
    fi
    if [[ -d .venv && ! -f "$made" && ! -f "$begun" ]]; then
        fail ".venv exists, but this script did not make it; move it away, or use it as it is: THREEDR1_PYTHON=$PY."
    fi
    # An interrupted installation can leave packages that only look complete, so it starts again from nothing.
    if [[ -f "$begun" ]] || ! "$PY" -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
    fi
    [[ -d .venv ]] || mkdir .venv
    touch "$begun"
    rm -f "$made"
    [[ -x "$PY" ]] || make_venv
    install_packages
    stamp "$PY" >"$made.partial"
    mv "$made.partial" "$made"
    rm -f "$begun"
    echo "setup: done"
    if command -v flock >/dev/null; then exec 9>&-; fi
}

if [[ -n "$THREEDR1_PYTHON" ]]; then
    PY="$(command -v "$THREEDR1_PYTHON")" || fail "THREEDR1_PYTHON=$THREEDR1_PYTHON is not an interpreter."
    check_given
elif [[ "${THREEDR1_NO_VENV:-0}" == 1 ]]; then
    PY="$(command -v "${PYTHON:-python3}")" || fail "THREEDR1_NO_VENV=1 needs python3 on PATH, or PYTHON=."
    check_given
else
    set_up_venv
fi
export ROOT PY
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    echo "setup: ready ($PY)"
fi
