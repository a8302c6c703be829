"""What the demo's server refuses before the web framework sees it: every file, foreign paths, too much at once.

The framework checks paths itself; this is a second lock, and it closes what the framework leaves open: that uploads
are handed out, and that a visitor has the server fetch an address for them.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

from .demo_scenes import UPLOAD_SECONDS, sweep, waiting_bytes

BODY_BYTES = 256 * 1024  # of a request that is no upload
_FILES_WAITING = 4  # of the largest size: uploads that may lie on the disk unopened, before another is refused
_FORM_BYTES = 64 * 1024  # what a form adds to the file in it
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


def is_foreign(name: str, uploads: Path) -> bool:
    """Whether a path is none of a file in the folder for uploads: an address, or elsewhere, by whatever detour."""
    if "\0" in name or "://" in name:
        return True
    return not Path(uploads, name).resolve().is_relative_to(uploads.resolve())


def asks_file(path: str) -> bool:
    """Whether the path of a request asks for a file, or for another server's page: this page needs neither."""
    path = unquote(path)
    return any(part in path for part in ("/file=", "/file/", "/proxy="))


def names_foreign(data: Any, uploads: Path) -> bool:
    """Whether a request's data, as JSON gives it, holds the description of a file that is no upload."""
    if isinstance(data, dict):
        path = data.get("path")
        if isinstance(path, str) and is_foreign(path, uploads):
            return True
        return any(names_foreign(value, uploads) for value in data.values())
    return isinstance(data, list) and any(names_foreign(value, uploads) for value in data)


class Gate:
    """ASGI middleware that refuses as the functions above say.

    Args:
        uploads: folder in which uploads arrive.
        file_bytes: of an upload at most.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], uploads: Path, file_bytes: int):
        self.app = app
        self.uploads = uploads
        self.file_bytes = file_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if asks_file(scope["path"]):
            await _refuse(send, 403, "That file is not to be had here.")
        elif scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
        elif scope["path"].rstrip("/").endswith("/upload"):
            size = _length(scope)
            if size is None or size > self.file_bytes + _FORM_BYTES:
                await _refuse(send, 413, f"A file may have up to {self.file_bytes / 2**20:.0f} MB.")
                return
            sweep(self.uploads, UPLOAD_SECONDS)
            if waiting_bytes(self.uploads) > _FILES_WAITING * self.file_bytes:
                await _refuse(send, 503, "Many files wait to be opened; try again in a few minutes.")
            else:
                await self.app(scope, receive, send)
        else:
            await self._checked(scope, receive, send)

    async def _checked(self, scope: Message, receive: Receive, send: Send) -> None:
        """A request with a body that is read, and looked at, before it is passed on."""
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the visitor is gone
            body += message.get("body", b"")
            if len(body) > BODY_BYTES:
                await _refuse(send, 413, "That is too much at once.")
                return
            if not message.get("more_body"):
                break
        try:
            foreign = names_foreign(json.loads(body or b"null"), self.uploads)
        except (ValueError, RecursionError):
            await _refuse(send, 400, "That is no request of this page.")
            return
        if foreign:
            await _refuse(send, 403, "That file is not to be had here.")
            return
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


def _length(scope: Message) -> int | None:
    """The stated length of a request's body."""
    stated = dict(scope["headers"]).get(b"content-length", b"")
    return int(stated) if stated.isdigit() else None


async def _refuse(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": sentence}).encode()})
