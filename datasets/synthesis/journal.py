"""The append-only journal: every reply that was paid for is on the disk before anything is done with it."""

import asyncio
import fcntl
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson

from .limits import Usage
from .teacher import Reply, Request

MERGE_EVERY = 8192  # new rows that are looked up in a dictionary before they join the arrays
_log = logging.getLogger(__name__)


class RowIndex:
    """Where the row of each key lies in the file: 20 bytes a row, so that a hundred thousand replies cost little."""

    def __init__(self) -> None:
        self._keys_R = np.empty(0, np.uint64)  # the first 64 bits of the key, sorted; R rows
        self._starts_R = np.empty(0, np.int64)
        self._lengths_R = np.empty(0, np.int32)
        self._new: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._keys_R) + len(self._new)

    def add(self, key: int, start: int, length: int) -> None:
        """A row's place."""
        self._new[key] = (start, length)
        if len(self._new) >= MERGE_EVERY:
            self._merge()

    def _merge(self) -> None:
        places_N2 = np.array(list(self._new.values()), np.int64)
        keys_R = np.concatenate([self._keys_R, np.fromiter(self._new, np.uint64, len(self._new))])
        order_R = np.argsort(keys_R, kind="stable")
        self._keys_R = keys_R[order_R]
        self._starts_R = np.concatenate([self._starts_R, places_N2[:, 0]])[order_R]
        self._lengths_R = np.concatenate([self._lengths_R, places_N2[:, 1].astype(np.int32)])[order_R]
        self._new.clear()

    def get(self, key: int) -> tuple[int, int] | None:
        """Start and length of the newest row of a key, in bytes."""
        if key in self._new:
            return self._new[key]
        row = int(np.searchsorted(self._keys_R, np.uint64(key), side="right")) - 1
        if row < 0 or int(self._keys_R[row]) != key:
            return None
        return int(self._starts_R[row]), int(self._lengths_R[row])


@dataclass
class BatchNote:
    """A batch that is not done with: noted before it is submitted, named once the provider has given it an id.

    `token` is our own name for it, which the provider keeps; `keys` are those of its requests, `estimate` what they
    may take.
    """

    token: str
    identity: str
    keys: tuple[str, ...]
    estimate: Usage
    batch_id: str = ""


class Journal:
    """Replies by request key, one JSON object a line, written as they come and synced many at a time.

    A row cut off by a kill or a full disk is dropped when the file is opened again; the rest is kept. The file is
    locked while it is open, so that two runs cannot pay for the same answers. Replies stay on the disk; memory holds
    where they lie. Rows about batches say which requests are at a provider: `open_batches` are those without an end.

    Args:
        path: the file; made where it is absent.
        read_only: look into it without a lock and change nothing; one that is absent counts as empty.

    Raises:
        ValueError: another run holds the journal, or a row before the last one is broken.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False):
        self.path = Path(path)
        self.input_tokens = self.output_tokens = 0
        self.batched_input_tokens = self.batched_output_tokens = 0  # of these, those of batches
        self.open_batches: dict[str, BatchNote] = {}
        self._index = RowIndex()
        self._size = self._synced = 0  # bytes written, bytes known to be on the disk
        self._file = self._open(read_only)
        self._followers: list[asyncio.Future[None]] | None = None  # who waits for the sync under way; None without one
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        try:
            self._read(read_only)
        except ValueError:
            self.close()
            raise

    def _open(self, read_only: bool) -> int:
        if read_only:
            return os.open(self.path if self.path.exists() else os.devnull, os.O_RDONLY)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"Another run is writing {self.path}; wait for it, or choose another --out.") from None
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a new file's name must outlive a power cut as well as its rows
        finally:
            os.close(folder)
        return file

    def _read(self, read_only: bool) -> None:
        with os.fdopen(os.dup(self._file), "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    _log.warning("%s: the last row was cut off and is dropped.", self.path)
                    break
                try:
                    row = orjson.loads(line)
                    if "batch" in row:
                        self._note(row)
                    else:
                        self._index.add(_short(row.pop("key")), self._size, len(line))
                        self._count(Reply(**row))
                except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
                    raise ValueError(
                        f"{self.path}, row {number}: not a row of a journal; delete that line, or move the file away."
                    ) from None
                self._size += len(line)
        if not read_only:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)  # rows that a killed run wrote and did not sync count as received from here on
        self._synced = self._size

    def _count(self, reply: Reply) -> None:
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens
        if reply.batched:
            self.batched_input_tokens += reply.input_tokens
            self.batched_output_tokens += reply.output_tokens

    def _note(self, row: dict[str, Any]) -> None:
        token = row["batch"]
        if "ended" in row:
            self.open_batches.pop(token, None)
        elif "id" in row:
            self.open_batches[token].batch_id = row["id"]
        else:
            note = BatchNote(token, row["identity"], tuple(row["keys"]), Usage(*row["estimate"]))
            self.open_batches[token] = note

    def get(self, key: str) -> Reply | None:
        """The reply to a request, where it was received."""
        place = self._index.get(_short(key))
        if place is None:
            return None
        row = orjson.loads(os.pread(self._file, place[1], place[0]))
        return Reply(**row) if row.pop("key") == key else None

    async def add(self, key: str, reply: Reply) -> None:
        """Store a reply. It is written at once, so that a kill of this process cannot undo it; on return it is synced,
        so that a power cut cannot either. Callers who wait together share one sync.
        """
        row: dict[str, Any] = {
            "key": key,
            "text": reply.text,
            "reason": reply.reason,
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
        }
        if reply.batched:
            row["batched"] = True
        start = self._size
        self._write(orjson.dumps(row) + b"\n")
        self._index.add(_short(key), start, self._size - start)
        self._count(reply)
        await self._sync()

    async def open_batch(self, note: BatchNote) -> None:
        """Note a batch before it is submitted; on return the row is synced."""
        estimate = [note.estimate.input_tokens, note.estimate.output_tokens]
        await self._add_note(
            {"batch": note.token, "identity": note.identity, "keys": list(note.keys), "estimate": estimate}
        )

    async def name_batch(self, token: str, batch_id: str) -> None:
        """Note the id that a provider gave a batch."""
        await self._add_note({"batch": token, "id": batch_id})

    async def end_batch(self, token: str, how: str) -> None:
        """Note that nothing more is to come of a batch; every reply of it is in the journal by now."""
        await self._add_note({"batch": token, "ended": how})

    async def _add_note(self, row: dict[str, Any]) -> None:
        self._write(orjson.dumps(row) + b"\n")
        self._note(row)
        await self._sync()

    async def _sync(self) -> None:
        """Wait until all that is written is on the disk. Of those who come during a sync one begins the next."""
        written, loop = self._size, asyncio.get_running_loop()
        while self._synced < written:
            if self._followers is not None:
                self._followers.append(loop.create_future())
                await self._followers[-1]
                continue
            self._followers, reached = [], self._size
            try:
                await loop.run_in_executor(self._syncer, os.fsync, self._file)
                self._synced = reached
            finally:
                followers, self._followers = self._followers, None
                for follower in followers:
                    if not follower.done():
                        follower.set_result(None)

    def _write(self, line: bytes) -> None:
        done = 0
        try:
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError:
            os.ftruncate(self._file, self._size)  # half a row would swallow the next one
            raise
        self._size += len(line)

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Finish the sync under way, sync what a stopped run left, and let the file go."""
        self._syncer.shutdown()
        if self._synced < self._size:
            os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _short(key: str) -> int:
    """The first 64 bits of a key of hexadecimal digits."""
    return int(key[:16], 16)


def request_key(identity: str, request: Request) -> str:
    """Key of a request: the same teacher asked the same thing has answered already.

    The question's own name is part of it, as the rule teacher reads the question and not the prompt.
    """
    parts = [identity, request.question.scene_id, request.question.text, request.prompt]
    # appended only where there are pictures, so that keys of text alone stay what they were
    parts += [hashlib.sha256(image).hexdigest() for image in request.images]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]
