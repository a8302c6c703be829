"""Processes that work for this one, started afresh: neither CUDA nor threads survive a fork."""

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_MAIN = Path(__file__).resolve().parents[1] / "main.py"
# What a worker runs first. Until main.py has said what `threedr1` is, a checkout that is not installed cannot be
# imported, so the worker is handed built-in functions and bytes alone.
_START = """
import os, pickle, runpy
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
runpy.run_path(main, run_name="threedr1_worker")
begin, content = pickle.loads(started)
begin(content)
"""


def start_pool(workers: int, begin: Callable[[Any], object], content: Any) -> ProcessPoolExecutor:
    """A pool whose processes have each called `begin(content)`, on one thread of the CPU.

    Args:
        begin: a function of a module; it keeps what later tasks need.
        content: anything that pickles; pickled once, here.
    """
    start = (_START, {"main": str(_MAIN), "started": pickle.dumps((begin, content))})
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=exec, initargs=start)
