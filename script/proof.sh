#!/usr/bin/env bash
# Whether it learns, and what each idea is worth, on generated rooms and one GPU (docs/proof.md): a model of 15 M weights
# from random ones, trained and tested on held-out rooms. Every stage is meant for nine minutes on an H100 (align and
# blind: with fewer runs at once than three; grpo: and a minute of scoring; rows of tables 8 and 10, which render each
# room, took 11 to 15 three at once on 16 cores), and goes on where it was interrupted; one that is complete is skipped.
#
#   bash script/proof.sh data                 rooms, prepared scenes, the untrained model
#   bash script/proof.sh detect               scene encoder
#   bash script/proof.sh dual                 encoder of text and pictures; tables 8 and 10 begin with it
#   bash script/proof.sh blind                a model that sees nothing of the scene, at any time after data
#   bash script/proof.sh align                what names stand for
#   bash script/proof.sh sft                  the model of the scene, from what align left
#   bash script/proof.sh grpo                 reinforcement learning from sft, all three rewards
#   bash script/proof.sh table7               rewards alone and in pairs
#   bash script/proof.sh table8               views: selected, uniform, best coverage, ring, top-down, none
#   bash script/proof.sh table10              encoders one by one (text and image: table8's selected views)
#   bash script/proof.sh table11              ranks of LoRA, on what table8's selected views (views.ours) left
#   bash script/proof.sh real                 the same question of real scans: data, encoder, models (REAL=)
#   bash script/proof.sh page                 docs/proof.md, and its headline in README.md, from what is scored
#   bash script/proof.sh pack sft             trained models as files of at most 15 MB in RUN/packed: weights in half
#                                             precision, logs and scores, no optimizer
#   bash script/proof.sh data unpack          on another machine: makes the rooms again, puts the models back
#
# A stage trains its model for every seed and scores it on the held-out rooms. Models joined by commas, rows of a table
# by their names too (grpo.format,views.ring), are trained side by side: AT_ONCE on each GPU.
#
#   SEEDS=0,1,2                  which seeds
#   AT_ONCE=3                    runs at the same time on one GPU
#   RUN=runs/proof DATA=data/proof REAL_DATA=data/proof-real
#   REAL=folder                  scannet_instances/, scannet/ and annotations/ of real scans (benchmarks/real_split.py)
#   ROOMS=2500 HELD_OUT=200      generated rooms
#   PICTURED=64 PICTURE_STEPS=2000   rooms and steps of the encoder of pictures (tables 8 and 10)
#   SET="run.steps=20"           overrides of every training stage;  EVAL_SET= of every evaluation. On a CPU that does
#                                not multiply in bfloat16 model.language.dtype=float32 is ten times as fast
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

# gpus: the GPUs that runs may be spread over, one a line; none on a CPU.
gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true
    fi
}

# typed STAGE: what somebody types to get this result, for starts.jsonl: what changes a result, seeds apart.
typed() {
    local name words=""
    for name in ROOMS HELD_OUT PICTURED PICTURE_STEPS SHAPE SET EVAL_SET RECIPES; do
        if [[ -n "${!name:-}" ]]; then words+="$name='${!name}' "; fi
    done
    echo "${words}bash script/proof.sh $1"
}

# after NAME…: what the next stage builds on; of an untrained model not when it was made, since it is made again alike.
after() {
    local name stamp
    previous=""
    for name; do
        [[ -f "$stamps/$name.done" ]] || fail "proof: stage $name comes first; run it with the same RUN and DATA."
        stamp="$(cat "$stamps/$name.done")"
        case "$name" in *model) stamp="${stamp% *}" ;; esac
        previous+="$stamp"
    done
}

# side_by_side NAME…: every model for every seed, as many at once as there are places, what they print marked.
side_by_side() {
    local devices places runs threads name seed place=0 failed=0 running=()
    mapfile -t devices < <(gpus)
    places=$((${AT_ONCE:-3} * (${#devices[@]} > 0 ? ${#devices[@]} : 1)))
    runs=$(($# * ${#seeds[@]}))
    threads=$(($(getconf _NPROCESSORS_ONLN) / (runs < places ? runs : places)))
    for name; do
        for seed in "${seeds[@]}"; do
            while [[ -n "${running[place]:-}" ]] && kill -0 "${running[place]}" 2>/dev/null; do
                place=$(((place + 1) % places))
                if ((place == 0)); then sleep 0.2; fi
            done
            if [[ -n "${running[place]:-}" ]]; then wait "${running[place]}" || failed=1; fi
            (
                if ((${#devices[@]})); then export CUDA_VISIBLE_DEVICES="${devices[place % ${#devices[@]}]}"; fi
                # or each waits with as many threads as there are cores for those of all the others
                export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
                make "$name" "$seed" 2>&1 | tr '\r' '\n' | sed -u "/^ *$/d; s/^/[$name-$seed] /"
            ) &
            running[place]=$!
            place=$(((place + 1) % places))
        done
    done
    for place in "${!running[@]}"; do wait "${running[place]}" || failed=1; done
    return $failed
}

data() {
    previous="$(rooms_version)"
    stage rooms "$DATA/rooms.json" rooms --out "$DATA" --train "${ROOMS:-2500}" --val "${HELD_OUT:-200}" \
        --seed 0 --points-only
    stage prepare "$DATA/prepared" prepare --root "$DATA"
    # by what the rooms are, not by when they were made: an unpacked model was made of the same
    previous="$(cksum <"$DATA/rooms.json")"
    stage model "$RUN/model" tiny --out "$RUN/model" --corpus "$DATA" --shape "${SHAPE:-small}" \
        --names 100 # a token each, which the recipes ask for
}

detect() {
    after prepare
    stage detect "$RUN/detect" detect --config "$recipes/detect.yaml" --resume \
        --set "run.dir=$RUN/detect" "data.root=$DATA" "${overrides[@]}"
    # the newest weights, since the best are chosen on the rooms that are scored; in half precision, to travel
    stage encoder "$RUN/encoder" export --model "$RUN/detect" --out "$RUN/encoder" --dtype float16
}

# What stands for the paper's encoders of text and pictures: trained on some of the training rooms, then frozen.
dual() {
    previous="$(rooms_version)"
    stage dual "$RUN/dual" dual --out "$RUN/dual" --rooms "${PICTURED:-64}" --steps "${PICTURE_STEPS:-2000}" --seed 0
}

real_data() {
    [[ -n "${REAL:-}" ]] || fail "proof: set REAL to the folder of scannet_instances/, scannet/ and annotations/."
    previous=""
    stage real-data "$REAL_DATA/scannetv2_val.txt" bench real_split --instances "$REAL/scannet_instances" \
        --lists "$REAL/scannet" --annotations "$REAL/annotations" --out "$REAL_DATA"
    stage real-prepare "$REAL_DATA/prepared" prepare --root "$REAL_DATA"
    stage real-model "$RUN/real-model" tiny --out "$RUN/real-model" --corpus "$REAL_DATA" --shape "${SHAPE:-small}" \
        --names 100
    after real-prepare
    stage real-detect "$RUN/real-detect" detect --config "$recipes/real.detect.yaml" --resume \
        --set "run.dir=$RUN/real-detect" "data.root=$REAL_DATA" "${overrides[@]}"
    stage real-encoder "$RUN/real-encoder" export --model "$RUN/real-detect" --out "$RUN/real-encoder" --dtype float16
}

# newest NAME: the last checkpoint of a run, relative to RUN.
newest() {
    (cd "$RUN" && printf '%s\n' "$1"/checkpoints/step-* | tail -n 1)
}

# What table 11 begins with: models that were trained on text and pictures, to which the names are new words.
pictured() {
    local seed language
    for seed in "${seeds[@]}"; do
        # as it was unpacked, without what it was made of
        if [[ -f "$stamps/pictured-$seed.done" && ! -f "$stamps/views.ours-$seed.done" ]]; then continue; fi
        after "views.ours-$seed"
        language="$RUN/$(newest "views.ours-$seed")/model/language_model"
        [[ -d "$language" ]] || fail "proof: there is no $language; remove $stamps/views.ours-$seed.done, and train it again."
        stage "pictured-$seed" "$RUN/pictured-$seed" names --names 100 --redraw --seed "$seed" \
            --out "$RUN/pictured-$seed" --model "$language"
    done
}

# of_rewards NAME: what a row of table 7 asks for. Gated by a form that is not rewarded, a reward would hold it too.
of_rewards() {
    local names="${1#grpo.}" weights='[1.0]' gate=false
    case "$names" in *+*) weights='[0.5,0.5]' ;; esac
    case "$names" in *format*) gate=true ;; esac
    printf '%s\n' "reward.names=${names/+/,}" "reward.weights=$weights" "reward.gate_by_format=$gate"
}

# make NAME SEED: train one model and score it.
make() {
    local root="$DATA" part="" scored=eval given=()
    case "$1" in real*) root="$REAL_DATA" part=real- scored=real.eval ;; esac
    case "$1" in
    align) train "$@" align ;;
    sft) train "$@" sft "init=$RUN/align-$2" ;;
    blind) train "$@" sft.blind model.encoder.pretrained= ;; # it is shown nothing that an encoder finds
    grpo) reinforce "$@" ;;
    grpo.*)
        mapfile -t given < <(of_rewards "$1")
        reinforce "$@" "${given[@]}"
        ;;
    views.none) train "$@" views model.views.source=none model.views.image_encoder_tokens=0 ;;
    views.ours) train "$@" views ;;
    views.uniform) train "$@" views model.views.choice=uniform ;;
    # a pool no larger than what is shown leaves nothing to choose but the order
    views.coverage) train "$@" views model.views.num_candidates=4 model.views.choice=uniform ;;
    views.ring | views.top)
        train "$@" views model.views.num_candidates=4 model.views.choice=uniform "model.views.source=${1#views.}"
        ;;
    encoders.*) train "$@" "$1" ;;
    lora.*) train "$@" lora "model.language.lora_rank=${1#lora.}" ;;
    real) train "$@" real.sft ;;
    real.blind) train "$@" real.blind ;;
    *) fail "proof: there is no stage $1; bash script/proof.sh --help lists them." ;;
    esac
    if [[ "$1" != align ]]; then evaluate "$@"; fi
}

# train NAME SEED RECIPE [KEY=VALUE…]
train() {
    local needed=("${part}model" "${part}encoder") pictures=() language="$RUN/${part}model"
    case "$1" in
    sft) needed+=("align-$2") ;;
    blind) needed=(model) ;;
    views.* | encoders.*) needed+=(dual) pictures=("model.views.encoder=$RUN/dual") ;;
    lora.*) needed=("pictured-$2" encoder) language="$RUN/pictured-$2" ;;
    esac
    after "${needed[@]}"
    stage "$1-$2" "$RUN/$1-$2" sft --config "$recipes/$3.yaml" --resume \
        --set "run.dir=$RUN/$1-$2" "run.seed=$2" "data.root=$root" "model.language.model=$language" \
        "model.encoder.pretrained=$RUN/${part}encoder" "${pictures[@]}" "${@:4}" "${overrides[@]}"
}

# reinforce NAME SEED [KEY=VALUE…]
reinforce() {
    after "sft-$2"
    stage "$1-$2" "$RUN/$1-$2" grpo --config "$recipes/grpo.yaml" --resume \
        --set "run.dir=$RUN/$1-$2" "run.seed=$2" "data.root=$DATA" "init=$RUN/sft-$2" "${@:3}" "${overrides[@]}"
}

# evaluate NAME SEED
evaluate() {
    local elsewhere=()
    after "$1-$2"
    # an adapter says where its language model was, which need not be where it was unpacked
    if [[ "$1" == lora.* ]]; then elsewhere=("language_model=$RUN/pictured-$2"); fi
    stage "eval-$1-$2" "$RUN/eval/$1-$2" eval --config "$recipes/$scored.yaml" \
        --set "run.dir=$RUN/eval/$1-$2" "run.seed=$2" "data.root=$root" "label=$1-$2" "model=$RUN/$1-$2" \
        "${elsewhere[@]}" "${eval_overrides[@]}"
}

# packed_files LABEL: what travels of a run, relative to RUN: its newest checkpoint without the optimizer, logs, scores.
# The untrained model does not: its seed and the rooms make it again.
packed_files() {
    local path paths=({,real-}encoder dual {,real-}detect/{metrics,starts}.jsonl stages/{{,real-}{detect,encoder},dual}.done)
    case "$1" in
    base) ;;
    pictured-*) paths=("$1" "stages/$1.done") ;;
    *)
        path="$(newest "$1")"
        paths=("$path"/{config.yaml,model} "$1"/{metrics,speed,starts,completions}.jsonl "eval/$1" stages/{,eval-}"$1".done)
        ;;
    esac
    for path in "${paths[@]}"; do
        if [[ -e "$RUN/$path" ]]; then echo "$path"; fi
    done
}

# pack NAME…: RUN/packed/NAME-SEED.tar.gz.aa, ab, …, and what all runs build on as base.tar.gz.
pack() {
    local name seed labels=() out="$RUN/packed"
    for name; do
        for seed in "${seeds[@]}"; do
            if [[ ! -f "$stamps/$name-$seed.done" || ("$name" != align && ! -f "$stamps/eval-$name-$seed.done") ]]; then
                fail "proof: $name-$seed is not trained and scored; nothing was packed."
            fi
            labels+=("$name-$seed")
            # what these are adapters of, once
            if [[ "$name" == lora.* && " ${labels[*]} " != *" pictured-$seed "* ]]; then labels+=("pictured-$seed"); fi
        done
    done
    ((${#labels[@]})) || fail "proof: name the models to pack, such as: bash script/proof.sh pack sft."
    mkdir -p "$out"
    rm -f "$out"/*.tar.gz.*
    for name in base "${labels[@]}"; do
        packed_files "$name" | tar -C "$RUN" -cz -T - | split -b 15000000 - "$out/$name.tar.gz."
    done
    ls -l "$out"
}

unpack() {
    local first
    for first in "$RUN"/packed/*.tar.gz.aa; do
        [[ -e "$first" ]] || fail "proof: there is nothing in $RUN/packed; bash script/proof.sh pack NAME makes it."
        cat "${first%aa}"* | tar -C "$RUN" -xz
        echo "unpacked $(basename "${first%.tar.gz.aa}")"
    done
}

# group NAME: the models of a table, or the one of that name.
group() {
    case "$1" in
    table7) printf 'grpo.%s\n' format perception semantic format+perception format+semantic perception+semantic ;;
    table8) printf 'views.%s\n' none ours uniform coverage ring top ;;
    table10) printf 'encoders.%s\n' depth point full ;;
    table11) printf 'lora.%s\n' 4 8 12 16 32 ;;
    real) printf '%s\n' real real.blind ;;
    *) tr , '\n' <<<"$1" ;;
    esac
}

stages=("${@:-data}")
for name in "${stages[@]}"; do
    THREEDR1_TYPED="$(typed "$name")"
    export THREEDR1_TYPED
    case "$name" in
    data | detect | dual) "$name" ;;
    page) "$PY" main.py bench proof --collect "$RUN" ;;
    pack)
        pack "${@:2}"
        break
        ;;
    unpack) unpack ;;
    *)
        mapfile -t models < <(group "$name")
        if [[ " ${models[*]}" == *" real"* ]]; then real_data; fi
        if [[ " ${models[*]}" =~ " views."|" encoders." ]]; then dual; fi
        if [[ " ${models[*]}" == *" lora."* ]]; then pictured; fi
        side_by_side "${models[@]}"
        ;;
    esac
done
printf '\n== proof: %s took %s\n' "${stages[*]}" "$(elapsed)"
