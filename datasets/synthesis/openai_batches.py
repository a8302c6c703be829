"""Batches at OpenAI, or at any server that speaks its files and batches (/v1/files, /v1/batches)."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson

from .batches import CANCELLED, EXPIRED, FAILED, ROW_ERROR, ROW_MALFORMED, BatchGone, BatchState
from .network_teacher import http_library
from .openai_teacher import OpenAITeacher, read_completion
from .teacher import RETRIED_STATUS, Reply, Request, TeacherUnavailable, parse_retry_after, refusal, without_key

_ENDED = {"completed": "completed", "failed": FAILED, "expired": EXPIRED, "cancelled": CANCELLED}
_TOKEN = "threedr1"  # the metadata that holds our token
_PAGE = 100


class OpenAIBatches:
    """The batch interface of the server that a teacher asks.

    Args:
        teacher: whose server, key, model and patience are used.
    """

    def __init__(self, teacher: OpenAITeacher):
        self.identity, self.retries = teacher.identity, teacher.retries
        self._teacher = teacher
        self._lost: type[Exception] = http_library().RequestError

    def row(self, key: str, request: Request) -> bytes:
        """The row of the file of requests."""
        body = self._teacher.body(request)
        return orjson.dumps({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body})

    async def upload(self, path: Path) -> str:
        """Give the server a file of requests."""
        with path.open("rb") as stream:
            file = {"file": ("requests.jsonl", stream, "application/jsonl")}
            return _text(await self._call("POST", "files", data={"purpose": "batch"}, files=file), "id")

    async def submit(self, file: str, token: str) -> str:
        """Start a batch."""
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {_TOKEN: token},
        }
        return _text(await self._call("POST", "batches", json=body), "id")

    async def find(self, token: str) -> str:
        """The batch whose metadata hold the token."""
        after: dict[str, str] = {}
        while True:
            page = await self._call("GET", "batches", params={"limit": str(_PAGE), **after})
            rows = page.get("data") or []
            for row in rows:
                if (row.get("metadata") or {}).get(_TOKEN) == token:
                    return _text(row, "id")
            if not rows or not page.get("has_more"):
                return ""
            after = {"after": _text(rows[-1], "id")}

    async def look(self, batch_id: str) -> BatchState:
        """How a batch stands."""
        row = await self._call("GET", f"batches/{batch_id}")
        files = tuple(str(row[name]) for name in ("output_file_id", "error_file_id") if row.get(name))
        counts = row.get("request_counts") or {}
        errors = (row.get("errors") or {}).get("data") or []
        message = "; ".join(str(error.get("message") or error.get("code")) for error in errors[:3])
        return BatchState(
            _ENDED.get(_text(row, "status"), ""),
            files,
            int(counts.get("completed") or 0),
            without_key(message, self._teacher.key),
            any(error.get("code") == "token_limit_exceeded" for error in errors),
        )

    async def read(self, file: str) -> AsyncIterator[tuple[str, Reply | str]]:
        """Rows of a file of replies or of errors."""
        for line in (await self._send("GET", f"files/{file}/content")).content.splitlines():
            yield read_row(line)

    async def cancel(self, batch_id: str) -> None:
        """Ask for an end."""
        await self._call("POST", f"batches/{batch_id}/cancel")

    async def close(self) -> None:
        """Close the connections."""
        await self._teacher.close()

    async def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        response = await self._send(method, path, **content)
        try:
            row = orjson.loads(response.content)
        except orjson.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise TeacherUnavailable(f"The reply of {self._teacher.server} was cut off or is not JSON")
        return row

    async def _send(self, method: str, path: str, **content: Any) -> Any:
        teacher = self._teacher
        try:
            with teacher.lend_plain() as client:
                response = await client.request(method, f"{teacher.base}/{path}", **content)
        except self._lost as error:
            raise TeacherUnavailable(f"The connection to {teacher.server} failed ({type(error).__name__})") from None
        status = response.status_code
        if status in RETRIED_STATUS:
            wait = parse_retry_after(response.headers.get("Retry-After"))
            raise TeacherUnavailable(f"{teacher.server} is busy (status {status})", wait)
        if status == 404 and "/" in path:
            raise BatchGone(f"{teacher.server} has no {path}")
        if status == 404:
            raise ValueError(f"{teacher.server} has no batch interface (status 404 for /{path}); leave --batch out.")
        if status != 200:
            raise refusal(teacher.server, status, teacher.model, response.text[:4096], teacher.key)
        return response


def _text(row: dict[str, Any], name: str) -> str:
    """A text that a reply must hold."""
    if not isinstance(row.get(name), str) or not row[name]:
        raise TeacherUnavailable(f"The server's reply about a batch has no {name!r}")
    return row[name]


def read_row(line: bytes) -> tuple[str, Reply | str]:
    """Key and reply, or the reason why there is none, of a row of replies or errors."""
    try:
        row = orjson.loads(line)
        key, response, error = row["custom_id"], row.get("response") or {}, row.get("error") or {}
        body, status = response.get("body"), response.get("status_code")
        code = error.get("code")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "", ROW_MALFORMED
    if not isinstance(key, str):
        return "", ROW_MALFORMED
    if error or status != 200:
        return key, {"batch_expired": EXPIRED, "batch_cancelled": CANCELLED}.get(str(code), ROW_ERROR)
    try:
        return key, read_completion(body)
    except TeacherUnavailable:
        return key, ROW_MALFORMED
