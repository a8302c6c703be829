"""Triton kernels without a GPU: a process of its own runs tests with them through Triton's interpreter.

The interpreter must be on before Triton is imported. A module that tests kernels has one test that starts the process,
and marks the others `inside`, which run in it alone.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="run through the interpreter by another test of this file")
outside = pytest.mark.skipif(INTERPRETED, reason="inside the interpreter already")

if INTERPRETED:  # Triton 3.6 makes loop bounds of arrays with one element, which NumPy 2.4 no longer takes for numbers
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    _patch = interpreter._patch_lang_tensor

    def _with_bounds(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_bounds


def run_through_interpreter(files: Sequence[Path], variable: str) -> None:
    """Run test files with the kernels that an environment variable chooses."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *map(str, files)],
        env=os.environ | {"TRITON_INTERPRET": "1", variable: "triton"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
