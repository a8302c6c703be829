"""What teachers behind a network share: pace, retries, an overall time-out, and the HTTP library."""

import asyncio
import importlib
import logging
import random
from abc import ABC, abstractmethod
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
            used = reply = await asyncio.wait_for(self.ask_once(request), self.timeout)
        except asyncio.TimeoutError:
            raise TeacherUnavailable(f"There was no whole reply within {self.timeout:g} s") from None
        finally:
            self.limits.settle(charged, request, used)
        return reply
