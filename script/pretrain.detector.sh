#!/usr/bin/env bash
# Pre-train the scene encoder on 3D boxes.
#
#   bash script/pretrain.detector.sh [arguments of `main.py detect`]
#
#   CONFIG=script/recipes/detect.yaml    recipe
#   DATA=data/scannet                    data root (data/README.md); default: the recipe's
#   RUN=runs/detector                 where the run goes; default: the recipe's
#   NGPU=8                               processes, one a GPU (default 1)
#
# It goes on from the newest checkpoint of an interrupted run: --resume.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

overrides=()
[[ -z "${DATA:-}" ]] || overrides+=("data.root=$DATA")
[[ -z "${RUN:-}" ]] || overrides+=("run.dir=$RUN")
launch detect --config "${CONFIG:-script/recipes/detect.yaml}" ${overrides[@]+--set "${overrides[@]}"} "$@"
