#!/usr/bin/env bash
# Look at predictions: in Rerun, as a page to walk around in, as a plan or as a report. docs/viewer.md.
#
#   bash script/visualize.sh [RUN] [arguments of `main.py view`]
#
#   bash script/visualize.sh runs/quickstart/eval/grpo --html report.html
#   bash script/visualize.sh runs/quickstart/eval/grpo --save scenes.rrd
#   bash script/visualize.sh answers --scene my_room.ply --room room.html
#
#   RUN=runs/quickstart/eval/grpo        run folder or predictions.jsonl, where the first argument is none
#   DATA=data/rooms                      data root with the prepared scenes
#
# Or, as the official project's script: detect in one scan, write the boxes to OUT/SCAN.FORMAT, and show both.
#
#   bash script/visualize.sh PLY SCAN OUT FORMAT [arguments of `main.py view`]
#
#   bash script/visualize.sh my_room.ply my_room outputs/preds npz
#   bash script/visualize.sh my_room.ply my_room outputs/preds json --save my_room.rrd
#
#   PLY is any scan that `main.py infer` reads, FORMAT npz (default) or json; OUT is outputs/preds by default. The
#   variable MODEL names the model or run folder that detects (runs/quickstart/grpo); MODEL= detects nothing and
#   shows the boxes that are there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

shopt -s nocasematch
if [[ "${1:-}" =~ \.(ply|obj|glb|gltf|stl|off)$ ]]; then
    words=()
    while (($# > 0)) && [[ "$1" != -* ]]; do
        words+=("$1")
        shift
    done
    if ((${#words[@]} > 4)); then
        echo "visualize.sh takes PLY SCAN OUT FORMAT, and then options; see --help." >&2
        exit 2
    fi
    name="$(basename "${words[0]}")"
    boxes="${words[2]:-outputs/preds}/${words[1]:-${name%.*}}.${words[3]:-npz}"
    if [[ ! "$boxes" =~ \.(npz|json)$ ]]; then
        echo "visualize.sh writes boxes as npz or json, not as ${words[3]}." >&2
        exit 2
    fi
    model="${MODEL-runs/quickstart/grpo}"
    if [[ -n "$model" ]]; then
        # how the scan is read, and what is to be made of it, hold for the detection, too
        "$PY" main.py view --scene "${words[0]}" --model "$model" "$@" --export "$boxes"
        for word in "$@"; do
            [[ ! "$word" =~ ^--(save|room|top)(=|$) ]] || exit 0 # that is made already
        done
    fi
    "$PY" main.py view "$boxes" --scene "${words[0]}" "$@"
    exit 0
fi

if (($# > 0)) && [[ "$1" != -* ]]; then
    RUN="$1"
    shift
fi
"$PY" main.py view "${RUN:-runs/quickstart/eval/grpo}" --data "${DATA:-data/rooms}" "$@"
