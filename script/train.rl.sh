#!/usr/bin/env bash
# Reinforcement learning (GRPO) from an SFT model.
#
#   bash script/train.rl.sh [arguments of `main.py grpo`]
#
#   CONFIG=script/recipes/grpo.yaml      recipe; script/recipes/tiny.grpo.yaml runs on a CPU
#   MODEL=runs/sft                       the SFT run: where training starts, and the KL reference; default: the recipe's
#   DATA=data/scannet                    data root (data/README.md); default: the recipe's
#   RUN=runs/grpo                        where the run goes; default: the recipe's
#   NGPU=8                               processes, one a GPU (default 1)
#
# It goes on from the newest checkpoint of an interrupted run: --resume. Other keys: --set rollout.group_size=16
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

overrides=()
[[ -z "${MODEL:-}" ]] || overrides+=("init=$MODEL")
[[ -z "${DATA:-}" ]] || overrides+=("data.root=$DATA")
[[ -z "${RUN:-}" ]] || overrides+=("run.dir=$RUN")
launch grpo --config "${CONFIG:-script/recipes/grpo.yaml}" ${overrides[@]+--set "${overrides[@]}"} "$@"
