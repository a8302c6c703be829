#!/usr/bin/env bash
# Whether it learns, and what each idea is worth, on generated rooms and one GPU (docs/proof.md): a model of 15 M weights
# from random ones, trained and tested on held-out rooms. Every stage takes at most nine minutes on an H100, and goes on
# where it was interrupted; one whose result is complete is skipped. Seeds are trained side by side.
#
#   bash script/proof.sh data                 rooms, prepared scenes, the untrained model
#   bash script/proof.sh detect               scene encoder
#   bash script/proof.sh align sft blind      what names stand for; then models of the scene, and without it
#   bash script/proof.sh grpo                 reinforcement learning from sft, all three rewards
#   bash script/proof.sh table7               rewards alone and in pairs
#   bash script/proof.sh table8               views: selected, best coverage, ring, top-down, none
#   bash script/proof.sh table10              encoders one by one (text and image: table8's selected views)
#   bash script/proof.sh real                 the same question of real scans: data, encoder, models (REAL=)
#   bash script/proof.sh eval sft blind       scores of models by name: eval/NAME-SEED below RUN
#   bash script/proof.sh page                 docs/proof.md from what is evaluated
#
#   SEEDS=0,1,2                  which seeds
#   RUN=runs/proof DATA=data/proof REAL_DATA=data/proof-real
#   REAL=folder                  scannet_instances/, scannet/ and annotations/ of real scans (benchmarks/real_split.py)
#   ROOMS=2500 HELD_OUT=200      generated rooms
#   ONLY=ring                    of a table, the rows whose names hold this
#   SET="run.steps=20"           overrides of every training stage;  EVAL_SET= of every evaluation
#   SHAPE=tiny                   size of the model (main.py tiny --shape);  RECIPES=script/recipes/proof
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN="${RUN:-runs/proof}"
DATA="${DATA:-data/proof}"
REAL_DATA="${REAL_DATA:-data/proof-real}"
recipes="${RECIPES:-script/recipes/proof}"
IFS=, read -ra seeds <<<"${SEEDS:-0,1,2}"
read -ra overrides <<<"${SET:-}"
read -ra eval_overrides <<<"${EVAL_SET:-}"
stamps="$RUN/stages"
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
        ("$1" "$seed" "${@:2}" 2>&1 | tr '\r' '\n' | sed -u "/^ *$/d; s/^/[$seed] /") &
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
    stage model "$RUN/model" tiny --out "$RUN/model" --corpus "$DATA" --shape "${SHAPE:-small}"
}

detect() {
    after prepare
    stage detect "$RUN/detect" detect --config "$recipes/detect.yaml" --resume \
        --set "run.dir=$RUN/detect" "data.root=$DATA" "${overrides[@]}"
}

# place NAME: where the data and the parts of a model lie, and what their stages are called.
place() {
    root="$DATA" part="" scored=eval
    case "$1" in real*) root="$REAL_DATA" part=real- scored=real.eval ;; esac
}

# tune SEED: sft, from what align left.
tune() {
    after model detect "align-$1"
    stage "sft-$1" "$RUN/sft-$1" sft --config "$recipes/sft.yaml" --resume \
        --set "run.dir=$RUN/sft-$1" "run.seed=$1" "data.root=$DATA" "model.language.model=$RUN/model" \
        "model.encoder.pretrained=$RUN/detect" "init=$RUN/align-$1" "${overrides[@]}"
}

# train SEED NAME RECIPE [KEY=VALUE…]
train() {
    local root part scored
    place "$2"
    after "${part}model" "${part}detect"
    stage "$2-$1" "$RUN/$2-$1" sft --config "$recipes/$3.yaml" --resume \
        --set "run.dir=$RUN/$2-$1" "run.seed=$1" "data.root=$root" "model.language.model=$RUN/${part}model" \
        "model.encoder.pretrained=$RUN/${part}detect" "${@:4}" "${overrides[@]}"
}

# reinforce SEED NAME [KEY=VALUE…]
reinforce() {
    after "sft-$1"
    stage "$2-$1" "$RUN/$2-$1" grpo --config "$recipes/grpo.yaml" --resume \
        --set "run.dir=$RUN/$2-$1" "run.seed=$1" "data.root=$DATA" "init=$RUN/sft-$1" "${@:3}" "${overrides[@]}"
}

# evaluate SEED NAME
evaluate() {
    local root part scored
    place "$2"
    after "$2-$1"
    stage "eval-$2-$1" "$RUN/eval/$2-$1" eval --config "$recipes/$scored.yaml" \
        --set "run.dir=$RUN/eval/$2-$1" "run.seed=$1" "data.root=$root" "label=$2-$1" "model=$RUN/$2-$1" \
        "${eval_overrides[@]}"
}

# row NAME FUNCTION ARGUMENTS…: one row of a table, trained and evaluated, if ONLY wants it.
row() {
    case "$1" in *"${ONLY:-}"*) ;; *) return ;; esac
    seeded "$2" "$1" "${@:3}"
    seeded evaluate "$1"
}

real() {
    [[ -n "${REAL:-}" ]] || fail "proof: set REAL to the folder of scannet_instances/, scannet/ and annotations/."
    previous=""
    stage real-data "$REAL_DATA/scannetv2_val.txt" bench real_split --instances "$REAL/scannet_instances" \
        --lists "$REAL/scannet" --annotations "$REAL/annotations" --out "$REAL_DATA"
    stage real-prepare "$REAL_DATA/prepared" prepare --root "$REAL_DATA"
    stage real-model "$RUN/real-model" tiny --out "$RUN/real-model" --corpus "$REAL_DATA" --shape "${SHAPE:-small}"
    after real-prepare
    stage real-detect "$RUN/real-detect" detect --config "$recipes/real.detect.yaml" --resume \
        --set "run.dir=$RUN/real-detect" "data.root=$REAL_DATA" "${overrides[@]}"
    row real train real.sft
    row real.blind train real.blind
}

table7() {
    local parts gate
    for parts in format perception semantic format+perception format+semantic perception+semantic; do
        case "$parts" in *format*) gate=true ;; *) gate=false ;; esac # gated by the form, a reward would hold it
        case "$parts" in
        *+*) row "grpo.$parts" reinforce "reward.names=${parts/+/,}" 'reward.weights=[0.5,0.5]' "reward.gate_by_format=$gate" ;;
        *) row "grpo.$parts" reinforce "reward.names=$parts" 'reward.weights=[1.0]' "reward.gate_by_format=$gate" ;;
        esac
    done
}

table8() { # a pool no larger than what is chosen leaves nothing to choose
    row views.none train views model.views.source=none
    row views.ours train views
    row views.coverage train views model.views.num_candidates=4
    row views.ring train views model.views.num_candidates=4 model.views.source=ring
    row views.top train views model.views.num_candidates=4 model.views.source=top
}

table10() {
    local name
    for name in depth point full; do row "encoders.$name" train "encoders.$name"; done
}

stages=("${@:-data}")
number=0
for name in "${stages[@]}"; do
    number=$((number + 1))
    case "$name" in
    eval)
        for model in "${stages[@]:number}"; do seeded evaluate "$model"; done
        break
        ;;
    data | detect | real | table7 | table8 | table10) "$name" ;;
    align) seeded train align align ;;
    sft) seeded tune ;;
    blind) seeded train blind sft.blind ;;
    grpo) seeded reinforce grpo ;;
    page) "$PY" main.py bench proof --collect "$RUN" ;;
    *) fail "proof: there is no stage $name; bash script/proof.sh --help lists them." ;;
    esac
done
printf '\n== proof: %s took %s\n' "${stages[*]}" "$(elapsed)"
