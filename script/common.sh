# Sourced by the other scripts: help, set-up, and starting main.py on one or several processes.
set -euo pipefail

# Usage is the comment block at the top of the calling script.
if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    exit 0
fi

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# launch COMMAND ARGUMENTS…: main.py under torchrun on NGPU processes, or alone (NGPU=1, the default).
launch() {
    if ((${NGPU:-1} > 1)); then
        "$PY" -m torch.distributed.run --standalone --nproc-per-node="$NGPU" main.py "$@"
    else
        "$PY" main.py "$@"
    fi
}

elapsed() { printf '%d min %02d s' $((SECONDS / 60)) $((SECONDS % 60)); }

# recipe FILE: a recipe with those that it is based on, for the keys below.
recipe() {
    local base
    cat "$1"
    base="$(sed -n 's/^base: *\([^ #]*\).*/\1/p' "$1")"
    if [[ -n "$base" ]]; then recipe "$(dirname "$1")/$base"; fi
}

# rooms_version: what `previous` is for stages that make rooms: the same command of another version makes others.
rooms_version() { grep -hE '^(ROOMS|ANNOTATION)_VERSION = ' datasets/rooms/version.py datasets/rooms/annotate.py; }

# stage NAME RESULT COMMAND…: run `main.py COMMAND…` unless RESULT is there and this very command made it.
# A stamp in the folder `stamps` is "key time": the key covers the command, its recipe and `previous`, the stamps of what
# it builds on, and `previous` is then its own. `RUN` holds what stages make, `of` is "1/12" or nothing.
stage() {
    local name="$1" result="$2" key word
    shift 2
    mkdir -p "$stamps"
    key="$({
        printf '%s\n' "$previous" "$@"
        for word; do case "$word" in *.yaml) recipe "$word" ;; esac done
    } | cksum)"
    printf '\n== %s%s (after %s)\n' "${of:+$of }" "$name" "$(elapsed)"
    if [[ -e "$result" && -f "$stamps/$name.done" && "$(cat "$stamps/$name.done")" == "$key "* ]]; then
        echo "complete: $result"
    else
        rm -f "$stamps/$name.done"
        # What another command left must not be resumed. Rooms and scenes check that for themselves; what export and
        # names write is whole, and they refuse a folder that is there.
        if [[ ! -f "$stamps/$name.begun" || "$(cat "$stamps/$name.begun")" != "$key" || " export names " == *" $1 "* ]]; then
            case "$result" in "$RUN"/*) rm -rf "$result" ;; esac
            echo "$key" >"$stamps/$name.begun"
        fi
        "$PY" main.py "$@" || {
            echo "$(basename "$0" .sh): stage $name failed; run the same command again to go on from here." >&2
            exit 1
        }
        echo "$key $(date +%s)" >"$stamps/$name.partial"
        mv "$stamps/$name.partial" "$stamps/$name.done"
        rm -f "$stamps/$name.begun"
    fi
    previous="$(cat "$stamps/$name.done")"
}
