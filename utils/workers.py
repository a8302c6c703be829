"""Processes that work for this one, started afresh: neither CUDA nor threads survive a fork."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context
from pathlib import Path
from threading import Thread
from typing import Any

_MAIN = Path(__file__).resolve().parents[1] / "main.py"
# What a worker runs first. Until main.py has said what `threedr1` is, a checkout that is not installed cannot be
# imported, so the worker is handed built-in functions and bytes alone.
_START = """
import os, pickle, runpy
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
runpy.run_path(main, run_name="threedr1_worker")
from threedr1.utils.workers import leave_with_parent
leave_with_parent()
begin, content = pickle.loads(started)
if begin is not None:
    begin(content)
"""


def start_pool(workers: int, begin: Callable[[Any], object] | None = None, content: Any = None) -> ProcessPoolExecutor:
    """A pool of processes on one thread of the CPU each, that have called `begin(content)` where there is one.

    Args:
        begin: a function of a module; it keeps what later tasks need.
        content: anything that pickles.
    """
    start = (_START, {"main": str(_MAIN), "started": pickle.dumps((begin, content))})
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=exec, initargs=start)


def leave_with_parent() -> None:
    """In a worker: end when the process that it works for ends, however that happens, and leave Ctrl-C to it.

    A pool's own processes wait for tasks for ever, since each holds both ends of the pipe that tasks come through.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def leave() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=leave, daemon=True).start()
