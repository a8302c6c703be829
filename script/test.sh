#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash script/test.sh [arguments of pytest]           ruff, pyright, and the fast tests
#   bash script/test.sh --slow [arguments of pytest]    only the slow tests: kill, soak, browser, learning
#   bash script/test.sh --gpu [arguments of pytest]     only the tests that need a CUDA device
#
# Tests that need a package which set-up leaves out. It is fetched into a temporary folder that only they see; where it
# cannot be, the script says so and does nothing:
#
#   bash script/test.sh --trl [arguments of pytest]     the GRPO loss against TRL's
#   bash script/test.sh --triton [arguments of pytest]  the Triton kernels, in Triton's interpreter on the CPU
#   bash script/test.sh --demo [arguments of pytest]    the demo in gradio, driven by a browser
#   bash script/test.sh --docs [arguments of pytest]    the documentation as a site
#
#   JOBS=2                                              test processes
#   THREEDR1_REAL_DATA, THREEDR1_PARITY_DATA            folders of real scans and of official scores; tests that need
#                                                       them skip where they are absent
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
jobs=(-n "${JOBS:-2}")
triton=3.6.0 # of PyTorch 2.11
trl=1.16.0 # the release whose code tests/engine/test_grpo_trl.py runs

pin() { grep -o "$1==[0-9.]*" setup.py; } # the release of an extra that setup.py names

# fetch PIP-ARGUMENTS… PACKAGE: puts it where only the tests of this run see it, or ends the script
fetch() {
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    # What requirements.txt has, in the versions that the other tests run with; gradio takes an older pillow.
    grep -vE '^pillow|\[' requirements.txt >"$folder/constraints.txt"
    if ! "$PY" -m pip install --quiet --no-compile --disable-pip-version-check --timeout 10 --retries 1 \
        --target "$folder" --constraint "$folder/constraints.txt" "$@"; then
        echo "test: ${*: -1} cannot be fetched here; its tests are left out" >&2
        exit 0
    fi
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
}

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
        fetch --no-deps "trl==$trl"
        "$PY" -m pytest tests/engine/test_grpo_trl.py "${@:2}"
        exit
        ;;
    --triton)
        fetch --no-deps "triton==$triton"
        "$PY" -m pytest "${jobs[@]}" -m "not gpu" tests/models/test_decode_attention_triton.py \
            tests/models/test_lm_head_triton.py tests/utils/test_splat_triton.py "${@:2}"
        exit
        ;;
    --demo)
        fetch "$(pin gradio)"
        "$PY" -m pytest -m "not gpu" tests/engine/test_demo.py tests/engine/test_demo_browser.py "${@:2}"
        exit
        ;;
    --docs)
        fetch "$(pin mkdocs-material)"
        "$PY" -m pytest tests/test_docs_site.py "${@:2}"
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
