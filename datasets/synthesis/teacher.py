"""What every teacher has in common: the interface, and the words and waits of those behind a network."""

import email.utils
import random
import time
from dataclasses import dataclass
from typing import Protocol

from .sources import Question

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True)
class Request:
    """One thing to ask. Network teachers read `prompt` and `images` (JPEG or PNG files) alone.

    `think` is "" unless an answer is to be checked.
    """

    question: Question
    prompt: str
    think: str = ""
    images: tuple[bytes, ...] = ()


def media_type(image: bytes) -> str:
    """The media type of a picture's bytes; ValueError for what is neither PNG nor JPEG."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if image.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    raise ValueError("Views for a teacher must be PNG or JPEG files; convert them first.")


@dataclass(frozen=True)
class Reply:
    """What came back. `reason` says why there is no usable text: blocked, truncated, cannot_tell, …

    `batched` replies came through a provider's batch interface, at its price.
    """

    text: str
    reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    batched: bool = False


class Teacher(Protocol):
    """Writes thoughts and answers.

    `identity` names the teacher, its model and the settings that its replies depend on: replies of another identity
    are not reused. `ask` raises TeacherUnavailable where a later try may succeed and ValueError where none will.
    """

    identity: str

    async def ask(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class TeacherUnavailable(Exception):
    """A request failed in a way that may pass: server overloaded, connection lost, quota of the minute used up.

    `retry_after` is what the server asked for, in seconds.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class GivenUp(TeacherUnavailable):
    """A request that was tried as often as it is tried. It says nothing about the requests after it."""


@dataclass(frozen=True)
class RetryOptions:
    """Exponential backoff with jitter. Seconds. `longest_server_delay` bounds what a server may ask for."""

    attempts: int = 6
    first_delay: float = 1.0
    longest_delay: float = 60.0
    longest_server_delay: float = 600.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("A teacher needs at least one attempt; set attempts to 1 or more.")


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where there is none to read."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass  # then it is a date, or nothing
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def backoff(attempt: int, retry_after: float | None, options: RetryOptions, rng: random.Random) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 0).

    At least what the server asked for, and up to a tenth more, so that those it sent away do not come back at once.
    """
    ceiling = min(options.longest_delay, options.first_delay * 2**attempt)
    jittered = ceiling * rng.uniform(0.5, 1.0)
    if retry_after is None:
        return jittered
    return max(jittered, min(retry_after, options.longest_server_delay) * rng.uniform(1.0, 1.1))


def check_key(key: str, variable: str) -> str:
    """A key without blanks around it; ValueError for one that no header can carry, without repeating it."""
    key = key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{variable} holds characters that no API key has; copy the key again.")
    return key


def without_key(message: str, key: str) -> str:
    """The beginning of a server's message on one line, without the key that some servers repeat."""
    return " ".join((message.replace(key, "***") if key else message).split())[:300]


def refusal(server: str, status: int, model: str, message: str, key: str) -> ValueError:
    """The error for a status that no retry mends, without the key that some servers repeat in their messages."""
    if status in (401, 403):
        return ValueError(f"{server} refused the API key (status {status}); set the right one in the environment.")
    if status == 404:
        return ValueError(f"{server} has no model {model!r} (status 404); name another one with --model.")
    shown = without_key(message, key)
    return ValueError(f"{server} refused the request (status {status}): {shown or 'it gave no reason'}.")
