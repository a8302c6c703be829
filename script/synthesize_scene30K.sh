#!/usr/bin/env bash
# Write chain-of-thought data in Scene-30K's format with a teacher model.
#
#   bash script/synthesize_scene30K.sh [arguments of `main.py synthesize`]
#
#   TEACHER=rules                        rules (offline), gemini (GEMINI_API_KEY) or openai (any compatible server)
#   MODEL=NAME                           the teacher's model; default: the teacher's own
#   DATA=data/rooms                      data root with prepared scenes
#   OUT=DATA/annotations/Scene-30K.synthesized.jsonl
#
# An interrupted run goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA="${DATA:-data/rooms}"
"$PY" main.py synthesize --root "$DATA" --out "${OUT:-$DATA/annotations/Scene-30K.synthesized.jsonl}" \
    --teacher "${TEACHER:-rules}" --model "${MODEL:-}" "$@"
