#!/usr/bin/env bash
# Evaluate a model on the benchmarks: predictions.jsonl and results.json in RUN.
#
#   bash script/infer.sh [arguments of `main.py eval`]
#
#   CONFIG=script/recipes/eval.yaml      recipe; script/recipes/tiny.eval.yaml runs on a CPU
#   MODEL=runs/grpo                      model or run folder; default: the recipe's
#   DATA=data/scannet                    data root (data/README.md); default: the recipe's
#   RUN=runs/eval                        where the results go; default: the recipe's
#   NGPU=8                               processes, one a GPU, which share the questions (default 1)
#
# One that was interrupted, started again in the same RUN, asks only what was not answered.
# Some of the tasks: --set data.datasets=scanqa,sqa3d. One scan of your own: `python main.py infer --help`.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

overrides=()
[[ -z "${MODEL:-}" ]] || overrides+=("model=$MODEL")
[[ -z "${DATA:-}" ]] || overrides+=("data.root=$DATA")
[[ -z "${RUN:-}" ]] || overrides+=("run.dir=$RUN")
launch eval --config "${CONFIG:-script/recipes/eval.yaml}" ${overrides[@]+--set "${overrides[@]}"} "$@"
