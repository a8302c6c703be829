"""A teacher behind any endpoint that speaks OpenAI's chat completions: OpenAI itself, vLLM, llama.cpp and others."""

import base64
import os
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import orjson

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

DEFAULT_MODEL = "gpt-4.1"
DEFAULT_URL = "https://api.openai.com/v1"
KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"


def identity_of(model: str) -> str:
    """What replies are kept under."""
    return f"openai/{model or DEFAULT_MODEL}"


class OpenAITeacher(NetworkTeacher):
    """Asks an OpenAI-compatible server, with the HTTP client that google-genai and huggingface-hub use as well.

    The server is OPENAI_BASE_URL ("http://localhost:8000/v1"), by default OpenAI's own; the key is OPENAI_API_KEY,
    which servers of one's own do not need.

    Args:
        model: a model's name; "" for DEFAULT_MODEL at OpenAI, and needed elsewhere.
        base_url: the server instead of OPENAI_BASE_URL.
        timeout: seconds that a whole reply may take.
        retries, seed: of the backoff after a failed request.
        limits: requests and tokens a minute; by default none.

    Raises:
        ValueError: no key for OpenAI's own server, no model for another one, or an address that is not one.
    """

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str = "",
        timeout: float = 300.0,
        retries: RetryOptions | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ):
        super().__init__(identity_of(model), timeout=timeout, retries=retries, limits=limits, seed=seed)
        url = (base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        self.key = check_key(os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
        self.server, self.base = server_name(url), url
        if url == DEFAULT_URL and not self.key:
            raise ValueError(
                "The OpenAI teacher needs an API key; set OPENAI_API_KEY, or OPENAI_BASE_URL to a server of your own."
            )
        if url != DEFAULT_URL and not model:
            raise ValueError(f"Name the model that {self.server} serves with --model.")
        self.model = model or DEFAULT_MODEL
        self._url = f"{url}/chat/completions"
        library = http_library()
        self._lost: type[Exception] = library.RequestError
        plain = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers = {"Content-Type": "application/json", "Accept": "application/json", **plain}
        context = ssl_context(library)
        self._plain = Clients(lambda: library.AsyncClient(headers=plain, timeout=timeout, verify=context))
        # `within` bounds a whole reply, so that the library's timers for each of its parts are not needed
        self._clients = Clients(lambda: library.AsyncClient(headers=headers, timeout=None, verify=context))

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent."""
        message = {"role": "user", "content": message_content(request)}
        body: dict[str, Any] = {"model": self.model, "messages": [message]}
        if request.think:
            body["temperature"] = 0.0
        return body

    def lend_plain(self) -> AbstractContextManager[Any]:
        """A client for what is no completion."""
        return self._plain.lend()

    async def ask_once(self, request: Request) -> Reply:
        """One attempt."""
        try:
            with self._clients.lend() as client:
                response = await client.post(self._url, content=orjson.dumps(self.body(request)))
        except self._lost as error:
            raise TeacherUnavailable(f"The connection to {self.server} failed ({type(error).__name__})") from None
        if response.status_code in RETRIED_STATUS:
            wait = parse_retry_after(response.headers.get("Retry-After"))
            raise TeacherUnavailable(f"{self.server} is busy (status {response.status_code})", wait)
        if response.status_code != 200:
            raise refusal(self.server, response.status_code, self.model, response.text[:4096], self.key)
        try:
            content = orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise TeacherUnavailable(f"The reply of {self.server} was cut off or is not JSON") from None
        return read_completion(content)

    async def close(self) -> None:
        """Close the connections."""
        for client in [*self._clients.all(), *self._plain.all()]:
            await client.aclose()


def server_name(url: str) -> str:
    """An address without the user, password and query that it may carry, to be shown.

    Raises:
        ValueError: not an address.
    """
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        raise ValueError(f"{URL_VARIABLE} is not an address; write one like http://localhost:8000/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{URL_VARIABLE} must begin with http:// or https:// and a server, as http://localhost:8000/v1."
        )
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


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
        tokens: dict[str, Any] = {
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
