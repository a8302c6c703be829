"""One writer thread, so that a training loop does not wait for the disk.

A thread is enough: safetensors, fsync and large writes give up Python's lock, so the loop goes on beside them.
"""

import errno
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from safetensors import SafetensorError

_ADVICE = {
    errno.ENOSPC: "the disk is full; make room on it, or lower run.keep_checkpoints",
    errno.EDQUOT: "your quota is used up; delete files of yours on that disk",
    errno.EROFS: "the file system is read-only; make it writable, or set a run.dir elsewhere",
    errno.EACCES: "permission is denied; make the folder writable",
    errno.EPERM: "permission is denied; make the folder writable",
    errno.EFBIG: "the file is larger than this process may write; raise the limit (ulimit -f)",
}


class Writer:
    """Carries out jobs one after the other in a thread, in the order in which they came.

    A job has a name, and waits to be accepted until the job of that name before it is done: what is kept in memory
    for the disk is at most one job of each name.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._jobs: dict[str, Future[None]] = {}

    def submit(self, name: str, job: Callable[[], None]) -> None:
        """Hand in a job; an error of the job of this name before it is raised here."""
        self.wait(name)
        self._jobs[name] = self._pool.submit(job)

    def wait(self, *names: str) -> None:
        """Until these jobs, by default all, are done; raises what one of them raised, once."""
        for name in names or tuple(self._jobs):
            job = self._jobs.pop(name, None)
            if job is not None:
                job.result()

    def close(self) -> list[BaseException]:
        """Let the jobs that were handed in finish and end the thread; returns what they raised."""
        self._pool.shutdown(wait=True)
        errors = [job.exception() for job in self._jobs.values()]
        self._jobs.clear()
        return [error for error in errors if error is not None]


def disk_error(error: OSError | SafetensorError) -> OSError | None:
    """The operating system's error behind a failed write; None where the file itself, not the disk, was at fault."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"os error (\d+)", str(error))  # safetensors wraps it in a text
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def advice(error: OSError) -> str:
    """Why a write failed and what to do about it."""
    known = _ADVICE.get(error.errno or 0)
    return known or f"{error.strerror or error}; check the disk and the path"
