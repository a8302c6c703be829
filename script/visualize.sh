#!/usr/bin/env bash
# Look at the predictions of a run: Rerun viewer, Rerun file or HTML report.
#
#   bash script/visualize.sh [RUN] [arguments of `main.py view`]
#
#   bash script/visualize.sh runs/quickstart/eval/grpo --html report.html
#   bash script/visualize.sh runs/quickstart/eval/grpo --save scenes.rrd
#
#   RUN=runs/quickstart/eval/grpo        run folder or predictions.jsonl, where the first argument is none
#   DATA=data/rooms                      data root with the prepared scenes
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if (($# > 0)) && [[ "$1" != -* ]]; then
    RUN="$1"
    shift
fi
"$PY" main.py view "${RUN:-runs/quickstart/eval/grpo}" --data "${DATA:-data/rooms}" "$@"
