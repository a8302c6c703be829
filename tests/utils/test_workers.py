"""Processes that work for another: they know what they were given, and end with it however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threedr1.utils.workers import start_pool

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import os, runpy, time
if __name__ == "__main__":
    runpy.run_path("main.py", run_name="parent")
    from threedr1.utils.workers import start_pool
    pool = start_pool(1, len, [])
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_a_worker_begins_with_what_it_is_given_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with start_pool(1, os.chdir, str(tmp_path)) as pool:
        assert pool.submit(os.getcwd).result() == str(tmp_path)
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_parent(how, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert _lives(worker)
        parent.send_signal(how)
        parent.wait(30)
    until = time.monotonic() + 30
    while _lives(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(process: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False
