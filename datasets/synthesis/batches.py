"""What providers' batch interfaces have in common: a file of requests goes in, a file of replies comes out in a day.

A batch has three names: our `token`, which the provider keeps beside it and by which it can be found again; the
provider's id; and the keys of its requests, which name the rows of both files.
"""

import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from .budget import BudgetSpent
from .journal import request_key
from .limits import Usage
from .teacher import GivenUp, Reply, Request, RetryOptions

BATCH_SIZE = 5_000  # requests in one batch
MOST_BATCH_SIZE = 50_000  # of OpenAI; Gemini names no number
MOST_BATCH_BYTES = 175_000_000  # before the last row; OpenAI takes files of 200 MB, Gemini of 2 GB
POLL_SECONDS, SHORTEST_POLL = 60.0, 0.02

# reason codes of what failed in a batch, beside those of replies (blocked_…, truncated, empty)
FAILED, EXPIRED, CANCELLED = "batch_failed", "batch_expired", "batch_cancelled"
LOST = "batch_lost"  # the provider does not know it (any more)
ROW_MISSING, ROW_MALFORMED, ROW_ERROR = "batch_row_missing", "batch_row_malformed", "batch_row_error"


@dataclass(frozen=True)
class BatchState:
    """How a batch stands.

    `ended` is "" while it works, `completed` where every request was tried, else one of the reason codes. `files` hold
    what came of its requests, also of one that expired or was cancelled. `done` requests of it are answered.
    """

    ended: str = ""
    files: tuple[str, ...] = ()
    done: int = 0
    message: str = ""
    queue_full: bool = False  # it failed because the account has too much in the queue


class BatchGone(Exception):
    """The provider does not know a batch, or what came of it."""


class BatchService(Protocol):
    """A provider's batch interface.

    Every method raises TeacherUnavailable where a later try may succeed and ValueError where none will.
    """

    identity: str
    retries: RetryOptions

    def row(self, key: str, request: Request) -> bytes:
        """The row of the file of requests, without its end."""
        ...

    async def upload(self, path: Path) -> str:
        """Give the provider a file of requests; its name there. Costs nothing."""
        ...

    async def submit(self, file: str, token: str) -> str:
        """Start a batch; its id."""
        ...

    async def find(self, token: str) -> str:
        """The id of the batch that was started under a token; "" where there is none."""
        ...

    async def look(self, batch_id: str) -> BatchState:
        """How a batch stands. BatchGone where the provider does not know it."""
        ...

    def read(self, file: str) -> AsyncIterator[tuple[str, Reply | str]]:
        """Key, and reply or reason, of every row; the key is "" where the row is malformed. BatchGone as above."""
        ...

    async def cancel(self, batch_id: str) -> None:
        """Ask for an end. What is answered by then is still to be read."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


@dataclass(frozen=True)
class Batches:
    """A provider's batch interface, and how it is used: requests in a batch at most, seconds between two looks."""

    service: BatchService
    size: int = BATCH_SIZE
    poll: float = POLL_SECONDS


@dataclass
class Pack:
    """Requests on the way into a batch, in a file that goes with it, so that their pictures are not held.

    Args:
        folder: where the file lies.
        prefix: how its name begins.
    """

    folder: Path
    prefix: str
    keys: list[str] = field(default_factory=list)
    estimate: Usage = Usage()
    size: int = 0

    def __enter__(self) -> "Pack":
        # a name is needed: google-genai uploads paths
        self._file: IO[bytes] = tempfile.NamedTemporaryFile(dir=self.folder, prefix=self.prefix, suffix=".jsonl")  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str, row: bytes, estimate: Usage) -> None:
        """One more request."""
        self.keys.append(key)
        self.size += self._file.write(row + b"\n")
        self.estimate += estimate

    def path(self) -> Path:
        """The file, whole."""
        self._file.flush()
        return Path(self._file.name)


class JournalTeacher:
    """Answers nothing that the journal does not hold: says of each request whether it failed or was not reached.

    Args:
        identity: as in `Teacher`.
        given_up: reason codes of the requests that failed, by key.
    """

    def __init__(self, identity: str, given_up: Mapping[str, str]):
        self.identity, self._given_up = identity, given_up

    async def ask(self, request: Request) -> Reply:
        """GivenUp or BudgetSpent."""
        reason = self._given_up.get(request_key(self.identity, request))
        if reason is None:
            raise BudgetSpent
        raise GivenUp(reason)

    async def close(self) -> None:
        """Nothing to close."""
