"""The Gemini teacher, through Google's own client library (google-genai, extra `synthesis`)."""

import asyncio
import json
import math
import os
import sys
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from .limits import Limits
from .network_teacher import Clients, NetworkTeacher, http_library, ssl_context
from .teacher import (
    RETRIED_STATUS,
    Reply,
    Request,
    RetryOptions,
    TeacherUnavailable,
    check_key,
    media_type,
    parse_retry_after,
    refusal,
)

if TYPE_CHECKING:
    from google.genai import types

DEFAULT_MODEL = "gemini-2.5-pro"
KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of a lost connection in whichever HTTP library google-genai chose (it differs by release)."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError, asyncio.TimeoutError]
    for library, name in (("httpx", "RequestError"), ("httpx2", "RequestError"), ("aiohttp", "ClientError")):
        if library in sys.modules:
            found.append(getattr(sys.modules[library], name))
    return tuple(found)


def identity_of(model: str, thinking_budget: int) -> str:
    """What replies are kept under: the model, and how much it thinks."""
    return f"gemini/{model or DEFAULT_MODEL}/thinking={thinking_budget}"


def retry_delay(details: Any) -> float | None:
    """Seconds of the RetryInfo that Gemini puts into the body of an error ("37s"); None where there is none."""
    try:
        rows = details["error"]["details"]
        text = next(row["retryDelay"] for row in rows if "retryDelay" in row)
        return max(0.0, float(text.removesuffix("s")))
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return None


class GeminiTeacher(NetworkTeacher):
    """Asks Gemini.

    Args:
        model: a model's name; "" for DEFAULT_MODEL.
        thinking_budget: tokens of hidden thought; -1 leaves it to the model, 0 switches it off where it can be.
        base_url: another endpoint; by default the library's own, which the variable GOOGLE_GEMINI_BASE_URL changes.
        timeout: seconds that a whole reply may take.
        retries, seed: of the backoff after a failed request.
        limits: requests and tokens a minute; by default none.

    Raises:
        ValueError: no key in the environment.
        ModuleNotFoundError: google-genai is not installed.
    """

    def __init__(
        self,
        model: str = "",
        *,
        thinking_budget: int = -1,
        base_url: str | None = None,
        timeout: float = 300.0,
        retries: RetryOptions | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ):
        super().__init__(
            identity_of(model, thinking_budget), timeout=timeout, retries=retries, limits=limits, seed=seed
        )
        variable = next((name for name in KEY_VARIABLES if os.environ.get(name, "").strip()), "")
        if not variable:
            raise ValueError(
                f"The Gemini teacher needs an API key; set {KEY_VARIABLES[0]}, or use --teacher rules, which needs "
                "no network."
            )
        try:
            from google import genai
            from google.genai import errors, types
            from pydantic import ValidationError
        except ImportError:
            raise ValueError('The Gemini teacher needs the package: pip install "google-genai>=1.40".') from None
        self._key = check_key(os.environ[variable], variable)
        self.model, self.thinking_budget = model or DEFAULT_MODEL, thinking_budget
        # the library loads certificates, 20 ms a client, for every transport that is given none
        context = ssl_context(http_library())
        contexts = {"verify": context, "ssl": context}

        def make(**options: Any) -> Any:
            http_options = types.HttpOptions(base_url=base_url, async_client_args=contexts, **options)
            return genai.Client(api_key=self._key, vertexai=False, http_options=http_options)

        self._plain = Clients(lambda: make(timeout=round(timeout * 1000)))
        # `within` bounds a whole reply, so that the library's timers for each of its parts are not needed; and it
        # takes a quarter of a request's time to translate a configuration that never changes
        headers = {"X-Server-Timeout": str(math.ceil(timeout))}
        self._clients = {
            checking: Clients(
                partial(make, headers=headers, extra_body={"generationConfig": self.generation_config(checking)})
            )
            for checking in (False, True)
        }
        self._part = types.Part.from_bytes
        self.api_error: type[Exception] = errors.APIError
        self.unread: tuple[type[Exception], ...] = (
            errors.UnknownApiResponseError,
            json.JSONDecodeError,
            ValidationError,
        )
        self.lost = _transport_errors()

    async def ask_once(self, request: Request) -> Reply:
        """One attempt."""
        pictures = [self._part(data=image, mime_type=media_type(image)) for image in request.images]
        contents = [*pictures, request.prompt] if pictures else request.prompt
        try:
            with self._clients[bool(request.think)].lend() as client:
                response = await client.aio.models.generate_content(model=self.model, contents=contents)
        except self.api_error as error:
            raise self.translate(error) from None
        except self.unread as error:
            raise TeacherUnavailable(f"Gemini's reply was cut off ({type(error).__name__})") from None
        except self.lost as error:
            raise TeacherUnavailable(f"The connection to Gemini failed ({type(error).__name__})") from None
        return read_response(response)

    def generation_config(self, checking: bool) -> dict[str, Any]:
        """How the model is to write a first reply, or a check, by REST's names."""
        config: dict[str, Any] = {"thinkingConfig": {"thinkingBudget": self.thinking_budget}}
        return {**config, "temperature": 0.0} if checking else config

    def lend_plain(self) -> AbstractContextManager[Any]:
        """A client of Google's library for what is no reply."""
        return self._plain.lend()

    def translate(self, error: Any) -> Exception:
        """An error of Google's library as every teacher's."""
        message = str(error.message or "")
        if error.code in RETRIED_STATUS:
            headers = getattr(error.response, "headers", None) or {}
            wait = parse_retry_after(headers.get("retry-after"))
            wait = retry_delay(error.details) if wait is None else wait
            return TeacherUnavailable(f"Gemini is busy (status {error.code})", wait)
        if error.code == 400 and "api key" in message.lower():
            return refusal("Gemini", 401, self.model, message, self._key)
        return refusal("Gemini", error.code, self.model, message, self._key)

    async def close(self) -> None:
        """Close the connections."""
        for clients in (self._plain, *self._clients.values()):
            for client in clients.all():
                await client.aio.aclose()


def read_response(response: "types.GenerateContentResponse") -> Reply:
    """Text, tokens and, where there is no whole text, the reason: blocked_…, truncated or empty.

    TeacherUnavailable for what holds neither a candidate, nor a reason, nor a count: no model wrote that.
    """
    usage = response.usage_metadata
    tokens: dict[str, Any] = {
        "input_tokens": (usage.prompt_token_count or 0) if usage else 0,
        "output_tokens": (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0) if usage else 0,
    }
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        return Reply("", f"blocked_prompt_{feedback.block_reason.value.lower()}", **tokens)
    written = any(candidate.content or candidate.finish_reason for candidate in response.candidates or [])
    if not written and usage is None:
        raise TeacherUnavailable("Gemini's reply holds nothing")
    if not response.candidates:
        return Reply("", "empty", **tokens)
    candidate = response.candidates[0]
    parts = (candidate.content.parts or []) if candidate.content else []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    finish = candidate.finish_reason.value if candidate.finish_reason else "STOP"
    if finish == "MAX_TOKENS":
        return Reply(text, "truncated", **tokens)
    if finish not in ("STOP", "FINISH_REASON_UNSPECIFIED"):
        return Reply(text, f"blocked_{finish.lower()}", **tokens)
    return Reply(text, "" if text.strip() else "empty", **tokens)
