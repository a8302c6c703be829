"""What teachers behind a network share: pace, retries, an overall time-out, and the HTTP library."""

import asyncio
import importlib
import logging
import os
import random
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .limits import Limits
from .teacher import Reply, Request, RetryOptions, TeacherUnavailable, backoff

_log = logging.getLogger(__name__)


def http_library() -> Any:
    """httpx2 or httpx, whichever is installed: google-genai and huggingface-hub bring one of them.

    Raises:
        ValueError: neither is installed.
    """
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ValueError("Network teachers need the package httpx: pip install httpx.")


def ssl_context(library: Any) -> ssl.SSLContext:
    """One context for all clients, as making one takes tens of milliseconds; SSL_CERT_FILE and _DIR hold."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file or folder:
        return ssl.create_default_context(cafile=file, capath=folder)
    return library.create_ssl_context()


class Clients:
    """HTTP clients, one for a request in flight, made as they are needed.

    A client looks at every idle connection of its pool before each request: of one pool for 64 requests that costs
    as much as the request itself.

    Args:
        make: makes a client.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._made: list[Any] = []
        self._idle: list[Any] = []

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """A client that nobody else has; the one given back last, as its connection is the likeliest to be open."""
        if not self._idle:
            self._made.append(self._make())
            self._idle.append(self._made[-1])
        client = self._idle.pop()
        try:
            yield client
        finally:
            self._idle.append(client)

    def all(self) -> list[Any]:
        """Those made so far."""
        return list(self._made)


async def within(seconds: float, reply: Awaitable[Reply]) -> Reply:
    """A reply, or asyncio.TimeoutError; without a task of its own where Python knows how (3.11)."""
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(reply, seconds)
    async with asyncio.timeout(seconds):
        return await reply


class NetworkTeacher(ABC):
    """A teacher whose requests may fail and are tried again.

    Args:
        identity: as in `Teacher`.
        timeout: seconds that a whole reply may take, however slowly it drips.
        retries, seed: of the backoff after a failed request.
        limits: pace; by default none. Every attempt takes its turn and is charged.
    """

    def __init__(
        self,
        identity: str,
        *,
        timeout: float,
        retries: RetryOptions | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ):
        self.identity, self.timeout = identity, timeout
        self.retries, self.limits = retries or RetryOptions(), limits or Limits()
        self._rng = random.Random(seed)

    @abstractmethod
    async def ask_once(self, request: Request) -> Reply:
        """One attempt; TeacherUnavailable where another one may succeed."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connections."""

    async def ask(self, request: Request) -> Reply:
        """A reply; asked for again where the server is busy, too slow, or the connection is lost.

        Raises:
            TeacherUnavailable: the last attempt failed as well.
            ValueError: the server refused in a way that no retry mends.
        """
        attempt = 0
        while True:
            try:
                return await self._attempt(request)
            except TeacherUnavailable as error:
                attempt += 1
                if attempt == self.retries.attempts:
                    raise
                delay = backoff(attempt - 1, error.retry_after, self.retries, self._rng)
                if error.retry_after is not None:
                    self.limits.close_for(min(error.retry_after, self.retries.longest_server_delay))
                _log.info("%s; trying again in %.1f s.", error, delay)
                await asyncio.sleep(delay)

    async def _attempt(self, request: Request) -> Reply:
        charged = await self.limits.admit(request)
        used: Reply | None = None
        try:
            used = reply = await within(self.timeout, self.ask_once(request))
        except asyncio.TimeoutError:
            raise TeacherUnavailable(f"There was no whole reply within {self.timeout:g} s") from None
        finally:
            self.limits.settle(charged, request, used)
        return reply
