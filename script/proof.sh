#!/usr/bin/env bash
# Whether it learns, and what each idea is worth, on generated rooms and one GPU (docs/proof.md): a model of 15 M weights
# from random ones, trained and tested on held-out rooms. Every stage takes at most nine minutes on an H100, and goes on
# where it was interrupted; one whose result is complete is skipped.
#
#   bash script/proof.sh data                 rooms, prepared scenes, the untrained model
#   bash script/proof.sh detect               scene encoder
#   bash script/proof.sh sft blind            models of SEEDS side by side: of the scene, and without it
#   bash script/proof.sh eval sft blind       scores of these models
#
#   SEEDS=0,1,2                  seeds, side by side on the GPU
#   RUN=runs/proof DATA=data/proof
#   ROOMS=2500 HELD_OUT=200      generated rooms
#   SET="run.steps=20"           overrides of every training stage
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN="${RUN:-runs/proof}"
DATA="${DATA:-data/proof}"
IFS=, read -ra seeds <<<"${SEEDS:-0,1,2}"
read -ra overrides <<<"${SET:-}"
stamps="$RUN/stages"
recipes=script/recipes/proof
of=""

# after NAME…: what the next stage builds on.
after() {
    local name
    previous=""
    for name; do
        [[ -f "$stamps/$name.done" ]] || fail "proof: stage $name comes first; run it with the same RUN and DATA."
        previous+="$(cat "$stamps/$name.done")"
    done
}

# seeded FUNCTION ARGUMENTS…: FUNCTION SEED ARGUMENTS… for every seed at once, what they print marked by the seed.
seeded() {
    local seed pids=() pid failed=0
    for seed in "${seeds[@]}"; do
        ("$1" "$seed" "${@:2}" 2>&1 | sed -u $'s/\r/\\n/g' | grep --line-buffered -v '^ *$' | sed -u "s/^/[$seed] /") &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

data() {
    previous=""
    stage rooms "$DATA/rooms.json" rooms --out "$DATA" --train "${ROOMS:-2500}" --val "${HELD_OUT:-200}" \
        --seed 0 --points-only
    stage prepare "$DATA/prepared" prepare --root "$DATA"
    stage model "$RUN/model" tiny --out "$RUN/model" --corpus "$DATA" --shape small
}

detect() {
    after prepare
    stage detect "$RUN/detect" detect --config "$recipes/detect.yaml" --resume \
        --set "run.dir=$RUN/detect" "data.root=$DATA" "${overrides[@]}"
}

# train SEED NAME RECIPE [KEY=VALUE…]
train() {
    after model detect
    stage "$2-$1" "$RUN/$2-$1" sft --config "$recipes/$3.yaml" --resume \
        --set "run.dir=$RUN/$2-$1" "run.seed=$1" "data.root=$DATA" "model.language.model=$RUN/model" \
        "model.encoder.pretrained=$RUN/detect/best" "${@:4}" "${overrides[@]}"
}

sft() { train "$1" sft sft; }
blind() { train "$1" blind sft.blind; }

# evaluate SEED NAME
evaluate() {
    after "$2-$1"
    stage "eval-$2-$1" "$RUN/eval/$2-$1" eval --config "$recipes/eval.yaml" \
        --set "run.dir=$RUN/eval/$2-$1" "run.seed=$1" "data.root=$DATA" "label=$2-$1" "model=$RUN/$2-$1"
}

stages=("${@:-data}")
if [[ "${stages[0]}" == eval ]]; then
    for name in "${stages[@]:1}"; do seeded evaluate "$name"; done
    exit 0
fi
for name in "${stages[@]}"; do
    case "$name" in
    data | detect) "$name" ;;
    sft | blind) seeded "$name" ;;
    *) fail "proof: there is no stage $name; bash script/proof.sh --help lists them." ;;
    esac
done
printf '\n== proof: %s took %s\n' "${stages[*]}" "$(elapsed)"
