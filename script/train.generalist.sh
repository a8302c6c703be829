#!/usr/bin/env bash
# Supervised fine-tuning (SFT): the cold start on Scene-30K, then the tasks.
#
#   bash script/train.generalist.sh [arguments of `main.py sft`]
#
#   CONFIG=script/recipes/sft.yaml       recipe; script/recipes/tiny.sft.yaml runs on a CPU. In two stages:
#                                        script/recipes/sft.cold_start.yaml, then script/recipes/sft_tasks.yaml
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct    language model: a name or a folder; default: the recipe's
#   ENCODER=runs/detector/best           pre-trained scene encoder; default: the recipe's
#   DATA=data/scannet                    data root (data/README.md); default: the recipe's
#   RUN=runs/sft                         where the run goes; default: the recipe's
#   NGPU=8                               processes, one a GPU (default 1)
#
# It goes on from the newest checkpoint of an interrupted run: --resume. Other keys: --set optim.lr=2e-5
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

overrides=()
[[ -z "${MODEL:-}" ]] || overrides+=("model.language.model=$MODEL")
[[ -z "${ENCODER:-}" ]] || overrides+=("model.encoder.pretrained=$ENCODER")
[[ -z "${DATA:-}" ]] || overrides+=("data.root=$DATA")
[[ -z "${RUN:-}" ]] || overrides+=("run.dir=$RUN")
launch sft --config "${CONFIG:-script/recipes/sft.yaml}" ${overrides[@]+--set "${overrides[@]}"} "$@"
