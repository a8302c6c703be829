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
number=0
total=12
previous="$(rooms_version)" # stamp of the stage before

# numbered NAME RESULT COMMAND…: the next of all stages; each builds on all before it.
numbered() {
    number=$((number + 1))
    of="$number/$total" stage "$@"
}

# evaluate LABEL MODEL [KEY=VALUE…]
evaluate() {
    numbered "eval-$1" "$RUN/eval/$1" eval --config script/recipes/tiny.eval.yaml \
        --set "run.dir=$RUN/eval/$1" "data.root=$DATA" "label=$1" "model=$2" "${@:3}"
}

numbered rooms "$DATA/rooms.json" \
    rooms --out "$DATA" --train "${ROOMS:-40}" --val "${HELD_OUT:-10}" --seed "${SEED:-0}" --frames 6
numbered prepare "$DATA/prepared" prepare --root "$DATA"
numbered tiny "$RUN/tiny" tiny --out "$RUN/tiny" --corpus "$DATA" --names 32
numbered detect "$RUN/detect" detect --config script/recipes/tiny.detect.yaml --resume \
    --set "run.dir=$RUN/detect" "data.root=$DATA"
numbered untrained "$RUN/untrained" sft --config script/recipes/tiny.sft.yaml --resume \
    --set "run.dir=$RUN/untrained" "data.root=$DATA" "model.language.model=$RUN/tiny" \
    "model.encoder.pretrained=$RUN/detect" run.steps=0
numbered sft "$RUN/sft" sft --config script/recipes/tiny.sft.yaml --resume \
    --set "run.dir=$RUN/sft" "data.root=$DATA" "model.language.model=$RUN/tiny" \
    "model.encoder.pretrained=$RUN/detect"
numbered grpo "$RUN/grpo" grpo --config script/recipes/tiny.grpo.yaml --resume \
    --set "run.dir=$RUN/grpo" "data.root=$DATA" "init=$RUN/sft"
evaluate most-frequent "$RUN/sft" answers=most-frequent
evaluate untrained "$RUN/untrained"
evaluate sft "$RUN/sft"
evaluate grpo "$RUN/grpo"
numbered report "$RUN/report.html" view "$RUN" --data "$DATA" --html "$RUN/report.html"

printf '\n== quickstart took %s; open %s\n' "$(elapsed)" "$RUN/report.html"
