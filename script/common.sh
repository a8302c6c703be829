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
