"""The append-only journal: every reply that was paid for is on the disk before anything is done with it."""

import fcntl
import hashlib
import logging
import os
from pathlib import Path
from types import TracebackType

import orjson

from .teacher import Reply, Request

_log = logging.getLogger(__name__)


class Journal:
    """Replies by request key, one JSON object a line, synced row by row.

    A row cut off by a kill or a full disk is dropped when the file is opened again; the rest is kept. The file is
    locked while it is open, so that two runs cannot pay for the same answers.

    Raises:
        ValueError: another run holds the journal, or a row before the last one is broken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise ValueError(f"Another run is writing {self.path}; wait for it, or choose another --out.") from None
        try:
            self._replies = self._read()
        except ValueError:
            self._stream.close()
            raise

    def _read(self) -> dict[str, Reply]:
        self._stream.seek(0)
        replies: dict[str, Reply] = {}
        whole = 0
        for number, line in enumerate(self._stream, 1):
            if not line.endswith(b"\n"):
                _log.warning("%s: the last row was cut off and is dropped.", self.path)
                break
            try:
                row = orjson.loads(line)
                key = row.pop("key")
                replies[key] = Reply(**row)
            except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{self.path}, row {number}: not a row of a journal; delete that line, or move the file away."
                ) from None
            whole += len(line)
        self._stream.truncate(whole)
        self._stream.seek(0, os.SEEK_END)
        return replies

    def get(self, key: str) -> Reply | None:
        """The reply to a request, where it was received."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Store a reply; on return it is on the disk."""
        row = {
            "key": key,
            "text": reply.text,
            "reason": reply.reason,
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
        }
        self._stream.write(orjson.dumps(row) + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._replies[key] = reply

    def __len__(self) -> int:
        return len(self._replies)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def request_key(identity: str, request: Request) -> str:
    """Key of a request: the same teacher asked the same thing has answered already.

    The question's own name is part of it, as the rule teacher reads the question and not the prompt.
    """
    parts = [identity, request.question.scene_id, request.question.text, request.prompt]
    # appended only where there are pictures, so that keys of text alone stay what they were
    parts += [hashlib.sha256(image).hexdigest() for image in request.images]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]
