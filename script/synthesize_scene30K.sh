#!/usr/bin/env bash
# Write chain-of-thought data in Scene-30K's format with a teacher model.
#
#   bash script/synthesize_scene30K.sh [arguments of `main.py synthesize`]
#
#   TEACHER=rules                        who writes:
#                                          rules   offline, works answers out from the scenes' labelled boxes
#                                          gemini  GEMINI_API_KEY (or GOOGLE_API_KEY)
#                                          openai  OPENAI_API_KEY, or OPENAI_BASE_URL=http://localhost:8000/v1
#                                                  for a server of your own, with MODEL
#   MODEL=NAME                           the teacher's model; default: the teacher's own
#   DATA=data/rooms                      data root with prepared scenes
#   OUT=DATA/annotations/Scene-30K.synthesized.jsonl
#
# Questions are those of ScanQA, ScanRefer, Nr3D and SceneVerse on training scenes (docs/scene30k.md). An interrupted run goes on where it stopped and
# pays for nothing twice. Arguments such as --dry-run, --rpm 1000, --max-cost 200 pass through
# (docs/synthesis_operation.md). To train on the result, make it DATA/annotations/Scene-30K.jsonl.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA="${DATA:-data/rooms}"
"$PY" main.py synthesize --root "$DATA" --out "${OUT:-$DATA/annotations/Scene-30K.synthesized.jsonl}" \
    --teacher "${TEACHER:-rules}" --model "${MODEL:-}" "$@"
