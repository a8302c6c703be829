#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash script/test.sh [arguments of pytest]           ruff, pyright, and the fast tests
#   bash script/test.sh --slow [arguments of pytest]    only the slow tests: kill, soak, browser, learning
#   bash script/test.sh --gpu [arguments of pytest]     only the tests that need a CUDA device
#
#   JOBS=2                                              test processes
#   THREEDR1_REAL_DATA, THREEDR1_PARITY_DATA            folders of real scans and of official scores; tests that need
#                                                       them skip where they are absent
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
jobs=(-n "${JOBS:-2}")
case "${1:-}" in
    --slow)
        shift
        exec "$PY" -m pytest "${jobs[@]}" -m "slow and not gpu" "$@"
        ;;
    --gpu)
        shift
        exec "$PY" -m pytest -m gpu "$@"
        ;;
esac

echo "== ruff"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
echo "== pyright"
bash script/typecheck.sh
echo "== pytest"
exec "$PY" -m pytest "${jobs[@]}" "$@"
