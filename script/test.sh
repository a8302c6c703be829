#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash script/test.sh [arguments of pytest]           ruff, pyright, and the fast tests
#   bash script/test.sh --slow [arguments of pytest]    only the slow tests: kill, soak, browser, learning
#   bash script/test.sh --gpu [arguments of pytest]     only the tests that need a CUDA device
#   bash script/test.sh --trl [arguments of pytest]     only the GRPO loss against TRL's, which is fetched into a temporary
#                                                       folder; where it cannot be, says so and does nothing
#
#   JOBS=2                                              test processes
#   THREEDR1_REAL_DATA, THREEDR1_PARITY_DATA            folders of real scans and of official scores; tests that need
#                                                       them skip where they are absent
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
jobs=(-n "${JOBS:-2}")
trl=1.16.0 # the release whose code tests/engine/test_grpo_trl.py runs
case "${1:-}" in
    --slow)
        shift
        exec "$PY" -m pytest "${jobs[@]}" -m "slow and not gpu" "$@"
        ;;
    --gpu)
        shift
        exec "$PY" -m pytest -m gpu "$@"
        ;;
    --trl)
        shift
        peer="$(mktemp -d)"
        trap 'rm -rf "$peer"' EXIT
        # Without its dependencies: what it needs is in requirements.txt, in the versions that the other tests run with.
        if ! "$PY" -m pip install --quiet --disable-pip-version-check --no-deps --timeout 10 --retries 1 \
            --target "$peer" "trl==$trl"; then
            echo "test: TRL $trl cannot be fetched here; the comparison with it is left out" >&2
            exit 0
        fi
        PYTHONPATH="$peer${PYTHONPATH:+:$PYTHONPATH}" "$PY" -m pytest tests/engine/test_grpo_trl.py "$@"
        exit
        ;;
esac

echo "== ruff"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
echo "== pyright"
bash script/typecheck.sh
echo "== pytest"
exec "$PY" -m pytest "${jobs[@]}" "$@"
