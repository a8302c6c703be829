"""Batches at Gemini, through google-genai: a file of requests by the Files interface, a file of replies back."""

import base64
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from .batches import CANCELLED, EXPIRED, FAILED, ROW_ERROR, ROW_MALFORMED, BatchGone, BatchState
from .gemini_teacher import GeminiTeacher, read_response
from .teacher import Reply, Request, TeacherUnavailable, media_type

T = TypeVar("T")
_ENDED = {
    "JOB_STATE_SUCCEEDED": "completed",
    "JOB_STATE_PARTIALLY_SUCCEEDED": "completed",
    "JOB_STATE_FAILED": FAILED,
    "JOB_STATE_EXPIRED": EXPIRED,
    "JOB_STATE_CANCELLED": CANCELLED,
}


class GeminiBatches:
    """Gemini's batch interface.

    Args:
        teacher: whose key, model and patience are used.
    """

    def __init__(self, teacher: GeminiTeacher):
        self.identity, self.retries = teacher.identity, teacher.retries
        self._teacher = teacher

    def row(self, key: str, request: Request) -> bytes:
        """The row of the file of requests: what generate_content sends, by REST's names."""
        parts: list[dict[str, Any]] = [
            {"inlineData": {"mimeType": media_type(image), "data": base64.b64encode(image).decode()}}
            for image in request.images
        ]
        config = self._teacher.generation_config(bool(request.think))
        content = {"role": "user", "parts": [*parts, {"text": request.prompt}]}
        return orjson.dumps({"key": key, "request": {"contents": [content], "generationConfig": config}})

    async def upload(self, path: Path) -> str:
        """Give Gemini a file of requests, which it keeps for two days."""

        async def send() -> Any:
            with self._teacher.lend_plain() as client:
                try:
                    config = {"display_name": path.name, "mime_type": "jsonl"}
                    return await client.aio.files.upload(file=path, config=config)
                except (ValueError, KeyError):  # how the library says that it was cut off on the way
                    raise TeacherUnavailable("Gemini did not take the whole file of requests") from None

        file = await self._within(send())
        if not file.name:
            raise TeacherUnavailable("Gemini's reply about a file has no name")
        return file.name

    async def submit(self, file: str, token: str) -> str:
        """Start a batch under the token as its display name."""
        with self._teacher.lend_plain() as client:
            job = await self._within(
                client.aio.batches.create(model=self._teacher.model, src=file, config={"display_name": token})
            )
        if not job.name:
            raise TeacherUnavailable("Gemini's reply about a batch has no name")
        return job.name

    async def find(self, token: str) -> str:
        """The batch whose display name is the token."""

        async def search() -> str:
            with self._teacher.lend_plain() as client:
                async for job in await client.aio.batches.list(config={"page_size": 100}):
                    if job.display_name == token:
                        return job.name or ""
            return ""

        return await self._within(search())

    async def look(self, batch_id: str) -> BatchState:
        """How a batch stands."""
        with self._teacher.lend_plain() as client:
            job = await self._within(client.aio.batches.get(name=batch_id), gone=batch_id)
        state = job.state.value if job.state else ""
        files = (job.dest.file_name,) if job.dest and job.dest.file_name else ()
        return BatchState(_ENDED.get(state, ""), files, message=state)

    async def read(self, file: str) -> AsyncIterator[tuple[str, Reply | str]]:
        """Rows of a file of replies."""
        with self._teacher.lend_plain() as client:
            content: bytes = await self._within(client.aio.files.download(file=file), gone=file)
        for line in content.splitlines():
            yield read_row(line)

    async def cancel(self, batch_id: str) -> None:
        """Ask for an end."""
        with self._teacher.lend_plain() as client:
            await self._within(client.aio.batches.cancel(name=batch_id), gone=batch_id)

    async def close(self) -> None:
        """Close the connections."""
        await self._teacher.close()

    async def _within(self, call: Awaitable[T], gone: str = "") -> T:
        """A call's result, its errors as every teacher's."""
        teacher = self._teacher
        try:
            return await call
        except teacher.api_error as error:
            if gone and getattr(error, "code", None) == 404:
                raise BatchGone(f"Gemini has no {gone}") from None
            raise teacher.translate(error) from None
        except teacher.unread as error:
            raise TeacherUnavailable(f"Gemini's reply was cut off ({type(error).__name__})") from None
        except teacher.lost as error:
            raise TeacherUnavailable(f"The connection to Gemini failed ({type(error).__name__})") from None


def read_row(line: bytes) -> tuple[str, Reply | str]:
    """Key and reply, or the reason why there is none, of a row of replies."""
    from google.genai import types

    try:
        row = orjson.loads(line)
        key = row["key"]
        if not isinstance(key, str):
            return "", ROW_MALFORMED
        if row.get("error") or not row.get("response"):
            return key, ROW_ERROR
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "", ROW_MALFORMED
    try:
        # as the library reads replies: fields that it does not know are left out
        return key, read_response(types.GenerateContentResponse._from_response(response=row["response"], kwargs={}))
    except (ValidationError, TeacherUnavailable, AttributeError, TypeError):
        return key, ROW_MALFORMED
