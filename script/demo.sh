#!/usr/bin/env bash
# A page in the browser: open a generated room, a prepared scene or a PLY of your own, ask, see answer and boxes.
#
#   bash script/demo.sh [arguments of `main.py demo`]
#
#   bash script/demo.sh --port 8000
#   MODEL=runs/grpo DATA=data/rooms bash script/demo.sh
#
#   MODEL=runs/quickstart/grpo           model or run folder
#   DATA=                                data root whose prepared scenes are offered
#
# gradio is installed on the first run, into .venv; into another interpreter (THREEDR1_PYTHON) nothing is installed.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ "$PY" == "$ROOT/.venv/bin/python" ]] && ! "$PY" -c 'import gradio' 2>/dev/null; then
    echo "demo: installing gradio"
    "$PY" -m pip install --disable-pip-version-check "$(grep -o 'gradio==[0-9.]*' setup.py)"
fi
"$PY" main.py demo ${MODEL:+--model "$MODEL"} ${DATA:+--data "$DATA"} "$@"
