"""Users' rewards, named `module:function`, run in a pool of worker processes with a time limit.

A reward that raises, hangs, dies or returns nonsense costs its own rows, not the run: see `UserReward`.
"""

import math
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from typing import Any

_WORKER = Path(__file__).with_name("worker.py")
_LOAD_TIMEOUT_S = 120.0


class _Worker:
    """One worker process (see worker.py). After a failure of the process itself it must be closed."""

    def __init__(self, spec: str):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(theirs.fileno()), spec, *filter(None, sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        # also at the end of the interpreter, should nobody close the reward
        self._finalizer = weakref.finalize(self, _end, self.process, self.connection)
        try:
            reason = self._receive(_LOAD_TIMEOUT_S)
        except (TimeoutError, EOFError, OSError) as error:
            self.close()
            raise ValueError(f"The reward {spec} could not be loaded: {error or 'its process ended'}.") from None
        if reason is not None:
            self.close()
            raise ValueError(f"The reward {spec} could not be loaded: {reason}")

    def call(self, message: bytes, timeout_s: float) -> tuple[str, Any]:
        """The worker's reply; TimeoutError, EOFError or OSError where the process is of no more use."""
        self.connection.send_bytes(message)
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        if not self.connection.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return pickle.loads(self.connection.recv_bytes())

    def close(self) -> None:
        self._finalizer()


def _end(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


class UserReward:
    """A reward function of the user, `module:function` or `path/to/file.py:function`, with the usual signature.

    The whole batch goes to one worker in one call. If that call fails (an exception, no answer within `timeout_s`, a
    dead process, not one finite number or None per completion), rows are tried one by one over all `num_workers`
    workers, to tell the bad from the good; after five times `timeout_s` in all, the rest counts as failed. A failed
    row gives NaN (not None: None is the reward's own "does not apply"). Columns must be picklable. POSIX only.

    ValueError at construction, where the reward cannot be loaded.
    """

    def __init__(self, spec: str, timeout_s: float = 30.0, num_workers: int = 2):
        if timeout_s <= 0 or num_workers < 1:
            raise ValueError(f"timeout_s must be positive and num_workers at least 1, not {timeout_s}, {num_workers}.")
        self.spec = spec
        self.timeout_s = timeout_s
        self.num_workers = num_workers
        self.last_failure = ""
        self._idle: Queue[_Worker | None] = Queue()  # None: a worker that is started when it is needed
        self._idle.put(_Worker(spec))
        for _ in range(num_workers - 1):
            self._idle.put(None)

    def __call__(self, completions: list[str], **columns: Sequence[Any]) -> list[float | None]:
        deadline = time.monotonic() + 5 * self.timeout_s
        rewards = self._attempt(completions, columns, deadline)
        if rewards is not None:
            return rewards
        if len(completions) == 1:
            return [math.nan]

        def one(row: int) -> float | None:
            columns_of_row = {name: [values[row]] for name, values in columns.items()}
            result = self._attempt([completions[row]], columns_of_row, deadline)
            return math.nan if result is None else result[0]

        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(one, range(len(completions))))

    def _attempt(
        self, completions: list[str], columns: Mapping[str, Sequence[Any]], deadline: float
    ) -> list[float | None] | None:
        """The rewards of one call, or None where it failed."""
        message = _message(completions, columns)
        worker = self._idle.get()
        try:
            timeout_s = min(self.timeout_s, deadline - time.monotonic())
            if timeout_s <= 0:
                self.last_failure = f"no time left within {5 * self.timeout_s:g} s for the whole batch"
                return None
            worker = worker or _Worker(self.spec)
            status, value = worker.call(message, timeout_s)
        except (TimeoutError, EOFError, OSError) as error:
            self.last_failure = str(error) or "the reward's process ended"
            if worker is not None:  # None: it could not be started
                worker.close()
            worker = None
            return None
        finally:
            self._idle.put(worker)
        if status == "error":
            self.last_failure = value
            return None
        return value

    def close(self) -> None:
        """End the worker processes."""
        workers = [self._idle.get() for _ in range(self.num_workers)]
        for worker in workers:
            if worker is not None:
                worker.close()
            self._idle.put(None)


def _message(completions: list[str], columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Plain pickle, since multiprocessing's own would send tensors as handles of shared memory."""
    try:
        return pickle.dumps((completions, columns))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"The columns cannot be sent to a user's reward, which runs elsewhere: {error}.") from None
