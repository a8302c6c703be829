"""A teacher behind any endpoint that speaks OpenAI's chat completions: OpenAI itself, vLLM, llama.cpp and others."""

import asyncio
import base64
import http.client
import json
import os
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .teacher import (
    RETRIED_STATUS,
    Reply,
    Request,
    RetryOptions,
    TeacherUnavailable,
    media_type,
    parse_retry_after,
    refusal,
    with_retries,
)

DEFAULT_MODEL = "gpt-4.1"
DEFAULT_URL = "https://api.openai.com/v1"


class OpenAITeacher:
    """Asks an OpenAI-compatible server, with the standard library's HTTP client in threads.

    The server is OPENAI_BASE_URL ("http://localhost:8000/v1"), by default OpenAI's own; the key is OPENAI_API_KEY,
    which servers of one's own do not need.

    Args:
        model: a model's name; "" for DEFAULT_MODEL at OpenAI, and needed elsewhere.
        base_url: the server instead of OPENAI_BASE_URL.
        workers: requests at a time.
        timeout: seconds without a byte from the server.
        retries, seed: of the backoff after a failed request.

    Raises:
        ValueError: no key for OpenAI's own server, no model for another one, or an address that is not one.
    """

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str = "",
        workers: int = 4,
        timeout: float = 300.0,
        retries: RetryOptions | None = None,
        seed: int = 0,
    ):
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        self._key = os.environ.get("OPENAI_API_KEY", "")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL must begin with http:// or https://, unlike {url!r}.")
        if url == DEFAULT_URL and not self._key:
            raise ValueError(
                "The OpenAI teacher needs an API key; set OPENAI_API_KEY, or OPENAI_BASE_URL to a server of your own."
            )
        if url != DEFAULT_URL and not model:
            raise ValueError(f"Name the model that {url} serves with --model.")
        self.model = model or DEFAULT_MODEL
        self.identity = f"openai/{self.model}"
        self._url, self._timeout = f"{url}/chat/completions", timeout
        self._retries, self._rng = retries or RetryOptions(), random.Random(seed)
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="teacher")

    async def ask(self, request: Request) -> Reply:
        """A reply; retried where the server is busy or the connection is lost."""
        return await with_retries(lambda: self._ask_once(request), self._retries, self._rng)

    async def _ask_once(self, request: Request) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._post, request)

    def _post(self, request: Request) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": message_content(request)}],
        }
        if request.think:
            body["temperature"] = 0.0
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        post = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(post, timeout=self._timeout) as response:
                content = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._translate(error) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise TeacherUnavailable(f"The connection to {self._url} failed ({error})") from None
        except ValueError:
            raise TeacherUnavailable(f"The reply of {self._url} was cut off or is not JSON") from None
        return read_completion(content)

    def _translate(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in RETRIED_STATUS:
            wait = parse_retry_after(error.headers.get("Retry-After"))
            return TeacherUnavailable(f"{self._url} is busy (status {error.code})", wait)
        try:
            message = error.read(4096).decode("utf-8", "replace")
        except (http.client.HTTPException, OSError):
            message = ""  # the status alone has to do
        return refusal(self._url, error.code, self.model, message, self._key)

    async def close(self) -> None:
        """Let the threads go; those that still wait for a server end with its time-out."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def message_content(request: Request) -> str | list[dict[str, Any]]:
    """A message's content: the prompt, after its pictures (as data URLs) where it has some."""
    if not request.images:
        return request.prompt
    urls = [f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}" for image in request.images]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*pictures, {"type": "text", "text": request.prompt}]


def read_completion(content: Any) -> Reply:
    """Text, tokens and, where there is no whole text, the reason; TeacherUnavailable for what is no completion."""
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = str(message.get("content") or "")
        usage = content.get("usage") or {}
        tokens = {
            "input_tokens": int(usage.get("prompt_tokens") or 0),
            "output_tokens": int(usage.get("completion_tokens") or 0),
        }
        finish, refused = choice.get("finish_reason"), bool(message.get("refusal"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise TeacherUnavailable("The server's reply is not a chat completion") from None
    if finish == "content_filter" or refused:
        return Reply(text, "blocked_content_filter" if not refused else "blocked_refusal", **tokens)
    if finish == "length":
        return Reply(text, "truncated", **tokens)
    return Reply(text, "" if text.strip() else "empty", **tokens)
