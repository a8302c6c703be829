#!/usr/bin/env bash
# The whole pipeline on generated rooms, with or without a GPU: set-up, rooms, preparation, pre-training of the scene
# encoder, SFT, GRPO, evaluation of every model on held-out rooms, and a report with pictures.
#
#   bash script/quickstart.sh
#
#   RUN=runs/quickstart          where everything that is trained and measured goes
#   DATA=data/rooms              where the rooms go
#   ROOMS=40 HELD_OUT=10 SEED=0   how many rooms, and which
#   FRESH=1                      start again: removes RUN first
#
# A stage whose result is complete is skipped; an interrupted one goes on. A stage whose command or recipe has changed is
# done again, and so are all stages after it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN="${RUN:-runs/quickstart}"
DATA="${DATA:-data/rooms}"
[[ "${FRESH:-0}" != 1 ]] || rm -rf "$RUN"
if ((${HELD_OUT:-10} < 3)); then
    echo "quickstart: HELD_OUT must be at least 3; with fewer rooms some tasks have no question left." >&2
    exit 1
fi
stamps="$RUN/stages"
mkdir -p "$stamps"
number=0
total=12
previous="" # stamp of the stage before

elapsed() { printf '%d min %02d s' $((SECONDS / 60)) $((SECONDS % 60)); }

# stage NAME RESULT COMMAND…: run `main.py COMMAND…` unless RESULT is there and this very command made it.
# A stamp is "key time": the key covers the command, the recipes and the stamp before, hence every earlier stage.
stage() {
    local name="$1" result="$2" key
    shift 2
    number=$((number + 1))
    key="$({ printf '%s\n' "$previous" "$@" && cat script/recipes/tiny.*.yaml; } | cksum)"
    printf '\n== %d/%d %s (after %s)\n' "$number" "$total" "$name" "$(elapsed)"
    if [[ -e "$result" && -f "$stamps/$name.done" && "$(cat "$stamps/$name.done")" == "$key "* ]]; then
        echo "complete: $result"
    else
        rm -f "$stamps/$name.done"
        if [[ ! -f "$stamps/$name.begun" || "$(cat "$stamps/$name.begun")" != "$key" ]]; then
            # What another command left must not be resumed. Rooms and scenes check that for themselves.
            case "$result" in "$RUN"/*) rm -rf "$result" ;; esac
            echo "$key" >"$stamps/$name.begun"
        fi
        "$PY" main.py "$@" || {
            echo "quickstart: stage $name failed; run the same command again to go on from here." >&2
            exit 1
        }
        echo "$key $(date +%s)" >"$stamps/$name.partial"
        mv "$stamps/$name.partial" "$stamps/$name.done"
        rm -f "$stamps/$name.begun"
    fi
    previous="$(cat "$stamps/$name.done")"
}

# evaluate LABEL MODEL [KEY=VALUE…]
evaluate() {
    stage "eval-$1" "$RUN/eval/$1" eval --config script/recipes/tiny.eval.yaml \
        --set "run.dir=$RUN/eval/$1" "data.root=$DATA" "label=$1" "model=$2" "${@:3}"
}

stage rooms "$DATA/rooms.json" \
    rooms --out "$DATA" --train "${ROOMS:-40}" --val "${HELD_OUT:-10}" --seed "${SEED:-0}" --frames 6
stage prepare "$DATA/prepared" prepare --root "$DATA"
stage tiny "$RUN/tiny" tiny --out "$RUN/tiny" --corpus "$DATA"
stage detect "$RUN/detect" detect --config script/recipes/tiny.detect.yaml --resume \
    --set "run.dir=$RUN/detect" "data.root=$DATA"
stage untrained "$RUN/untrained" sft --config script/recipes/tiny.sft.yaml --resume \
    --set "run.dir=$RUN/untrained" "data.root=$DATA" "model.language.model=$RUN/tiny" \
    "model.encoder.pretrained=$RUN/detect" run.steps=0
stage sft "$RUN/sft" sft --config script/recipes/tiny.sft.yaml --resume \
    --set "run.dir=$RUN/sft" "data.root=$DATA" "model.language.model=$RUN/tiny" \
    "model.encoder.pretrained=$RUN/detect"
stage grpo "$RUN/grpo" grpo --config script/recipes/tiny.grpo.yaml --resume \
    --set "run.dir=$RUN/grpo" "data.root=$DATA" "init=$RUN/sft"
evaluate most-frequent "$RUN/sft" answers=most-frequent
evaluate untrained "$RUN/untrained"
evaluate sft "$RUN/sft"
evaluate grpo "$RUN/grpo"
stage report "$RUN/report.html" view "$RUN" --data "$DATA" --html "$RUN/report.html"

printf '\n== quickstart took %s; open %s\n' "$(elapsed)" "$RUN/report.html"
