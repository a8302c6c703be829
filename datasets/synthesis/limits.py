"""How fast a teacher may be asked: token buckets for requests and tokens a minute, charged by estimate."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from .teacher import Reply, Request

MINUTE = 60.0
CHARACTERS_A_TOKEN = 4.0  # of English text, before any reply says how many tokens its prompt had
THOUGHT_TOKENS, ANSWER_TOKENS = 1500.0, 300.0  # of a first reply with its hidden thought, and of a check's
_MEMORY = 0.05  # weight of the newest reply in the running means


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, counted or estimated."""

    input_tokens: float = 0.0
    output_tokens: float = 0.0

    @property
    def total(self) -> float:
        """Of prompt and reply."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)


class Estimator:
    """How many tokens a request will take, learnt from the replies so far: running means for thoughts and checks."""

    def __init__(self) -> None:
        self._per_token = {False: CHARACTERS_A_TOKEN, True: CHARACTERS_A_TOKEN}
        self._output = {False: THOUGHT_TOKENS, True: ANSWER_TOKENS}

    def estimate(self, request: Request) -> Usage:
        """Expected tokens of a request."""
        return self.estimate_many(1, len(request.prompt), checking=bool(request.think))

    def estimate_many(self, requests: int, characters: int, *, checking: bool) -> Usage:
        """Expected tokens of so many requests of one kind, whose prompts have so many characters together."""
        return Usage(characters / self._per_token[checking], requests * self._output[checking])

    def learn(self, request: Request, reply: Reply) -> None:
        """Take in what a reply counted; those without counts teach nothing."""
        self.learn_from(len(request.prompt), bool(request.think), reply)

    def learn_from(self, characters: int, checking: bool, reply: Reply) -> None:
        """The same of a prompt that is known by its length and kind alone."""
        if reply.input_tokens > 0:
            newest = characters / reply.input_tokens
            self._per_token[checking] += _MEMORY * (newest - self._per_token[checking])
        if reply.output_tokens > 0:
            self._output[checking] += _MEMORY * (reply.output_tokens - self._output[checking])


class TokenBucket:
    """At most `per_minute` units in any 60 seconds, served in the order of asking.

    A second's worth (one unit at least) may come at once; the rest flows in so slowly that a full bucket and a
    minute's flow together keep the limit. More may be taken than is there: the taker waits until the debt is paid.

    Args:
        per_minute: the limit; 0 for none.
        clock: seconds that only grow.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._capacity = max(1.0, per_minute / MINUTE)
        # a limit of one unit a minute leaves nothing beside the unit itself
        self._rate = max(per_minute - self._capacity, min(per_minute, 1.0)) / MINUTE
        self._level, self._clock, self._last = self._capacity, clock, clock()

    def take(self, amount: float) -> float:
        """Take units; the seconds to wait before using them."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._last) * self._rate)
        self._last = now
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def correct(self, amount: float) -> None:
        """Charge what an estimate left out; a negative amount gives back what it took too much."""
        if self._rate:
            self._level = min(self._capacity, self._level - amount)


class Limits:
    """The pace of one teacher.

    Args:
        requests_per_minute, tokens_per_minute: what the account allows; 0 for no limit.
        estimator: who says how many tokens a request will take.
    """

    def __init__(
        self,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        *,
        estimator: Estimator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if min(requests_per_minute, tokens_per_minute) < 0:
            raise ValueError("Rate limits cannot be negative; 0 means none.")
        self.estimator = estimator or Estimator()
        self._requests, self._tokens = TokenBucket(requests_per_minute, clock), TokenBucket(tokens_per_minute, clock)
        self._clock, self._closed_until = clock, 0.0

    async def admit(self, request: Request) -> Usage:
        """Wait for a request's turn; returns the tokens it was charged for, to be settled when it has ended."""
        charged = self.estimator.estimate(request)
        wait = max(self._requests.take(1), self._tokens.take(charged.total))
        if wait:
            await asyncio.sleep(wait)
        while (pause := self._closed_until - self._clock()) > 0:
            await asyncio.sleep(pause)
        return charged

    def settle(self, charged: Usage, request: Request, reply: Reply | None) -> None:
        """Correct the charge by what was used. A failed request keeps its charge: the server may have counted it."""
        if reply is None:
            return
        used = reply.input_tokens + reply.output_tokens
        if used:
            self._tokens.correct(used - charged.total)
        self.estimator.learn(request, reply)

    def close_for(self, seconds: float) -> None:
        """Let nobody ask for a while: a server that names a time to wait means everyone who shares the account."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)
