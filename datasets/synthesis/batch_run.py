"""Fills the journal through a provider's batch interface; the engine then judges what is in it.

What is missing is asked in batches: first the thoughts, and as soon as a batch of these has ended, the checks of those
that pass the free filters. A batch is noted in the journal before it is submitted and named there as soon as it has an
id, so that a run that goes on finds it again and asks for nothing that is under way.
"""

import asyncio
import logging
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from ..scene_store import SceneInfo
from .asking import Asker, check_of
from .batches import (
    LOST,
    MOST_BATCH_BYTES,
    ROW_MALFORMED,
    ROW_MISSING,
    Batches,
    BatchGone,
    BatchState,
    Pack,
)
from .budget import Budget
from .filters import FilterOptions
from .journal import BatchNote, Journal, request_key
from .limits import Estimator, Usage
from .prompts import check_prompt
from .sources import Question
from .teacher import Reply, Request, TeacherUnavailable, backoff

LOOKS = 2  # at the files of a batch in which rows are missing or malformed, before these are asked again
_SYNCED_TOGETHER = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """A request whose reply is waited for: the question's position, and what the estimator learns from."""

    position: int
    characters: int
    checking: bool


class BatchRun:
    """Asks about questions in batches until the journal has every reply that can be had.

    Args:
        batches: the provider, the size of a batch, and the pace of looking.
        journal: replies received so far, and batches under way; those to come are added.
        index: labels and boxes of the scenes.
        ask_about: the first request about a question.
        options: thresholds of the filters.
        budget: what all replies in the journal may cost; it has been charged with those that are there.
        estimator: who says what a request will take.
        seed: of the jitter of retries.
    """

    def __init__(
        self,
        batches: Batches,
        journal: Journal,
        *,
        index: Mapping[str, SceneInfo],
        ask_about: Asker,
        options: FilterOptions,
        budget: Budget,
        estimator: Estimator,
        seed: int = 0,
    ):
        self.service, self.journal, self.index = batches.service, journal, index
        self.ask_about, self.options = ask_about, options
        self.budget, self.estimator = budget, estimator
        self.size, self.poll = batches.size, batches.poll
        self.new_requests = self.submitted = 0
        self.failures: Counter[str] = Counter()  # requests by reason code, every try counted
        self.given_up: dict[str, str] = {}  # reason codes by key, of those that are not tried again
        self._questions: Sequence[Question] = ()
        self._ready: deque[int] = deque()  # positions of questions whose next request is to be found
        self._held = False  # the budget or the provider's queue has no room until an open batch ends
        self._first_keys: dict[int, str] = {}
        self._waiting: dict[str, Waiting] = {}
        self._tries: Counter[str] = Counter()
        self._looks: Counter[str] = Counter()  # in vain, by token
        self._done: dict[str, int] = {}  # requests answered of each open batch, by token
        self._in_vain, self._last_failure = 0, ""  # batches in a row of which nothing came
        self._not_before = 0.0
        self._rng = random.Random(seed)

    @property
    def open(self) -> list[BatchNote]:
        """Batches of this teacher that are not done with."""
        return [note for note in self.journal.open_batches.values() if note.identity == self.service.identity]

    # ---- the run

    async def run(self, questions: Sequence[Question]) -> None:
        """Ask until nothing is missing that can be had.

        Raises:
            ValueError: the provider refuses, or batch after batch comes to nothing.
        """
        self._questions, self._ready = questions, deque(range(len(questions)))
        self._begin()
        with tqdm(desc="batches", unit="request", dynamic_ncols=True) as bar:
            try:
                await self._look_at_all()
                while True:
                    await self._advance()
                    self._show(bar)
                    if not self.open and not self._ready:
                        break
                    await asyncio.sleep(self.poll)
                    await self._look_at_all()
            finally:
                await self.service.close()

    async def cancel(self) -> int:
        """End every open batch and keep what is answered by then; how many there were."""
        self._begin()
        try:
            while any(not note.batch_id for note in self.open):
                await self._recover()
                await asyncio.sleep(self.poll)
            notes = self.open
            for note in notes:
                try:
                    await self.service.cancel(note.batch_id)
                except BatchGone:
                    continue  # looking at it says so as well
                except (ValueError, TeacherUnavailable) as error:  # one that has ended cannot be cancelled
                    _log.warning("Batch %s: %s", note.batch_id, error)
            await self._look_at_all()
            while self.open:
                await asyncio.sleep(self.poll)
                await self._look_at_all()
        finally:
            await self.service.close()
        return len(notes)

    def _begin(self) -> None:
        for note in self.open:
            self.budget.commit(note.estimate)
        # files of a run that was killed; the journal's lock says that no other run uses them
        for path in self.journal.path.parent.glob(self._prefix() + "*"):
            path.unlink()

    def _prefix(self) -> str:
        return f".{self.journal.path.name}.batch-"

    def _show(self, bar: tqdm) -> None:
        notes = self.open
        bar.total = self.new_requests + sum(len(note.keys) for note in notes)
        bar.n = self.new_requests + sum(self._done.get(note.token, 0) for note in notes)
        spent = f"${self.budget.spent:,.2f}" if self.budget.price else ""
        bar.set_postfix_str(", ".join(filter(None, (f"{len(notes)} open", spent))))

    # ---- asking

    async def _advance(self) -> None:
        """Put every request that is missing, and that budget and queue allow, into batches.

        Raises:
            ValueError: as many batches in a row came to nothing as a request is tried.
        """
        if self._ready and self._in_vain >= self.service.retries.attempts:
            raise ValueError(
                f"{self._in_vain} batches in a row came to nothing, the last one with: {self._last_failure}. What was "
                "answered is kept; run the same command again later to go on."
            )
        if self._held or time.monotonic() < self._not_before:
            return
        under_way = {key for note in self.open for key in note.keys}
        while self._ready and not self._held:
            with Pack(self.journal.path.parent, self._prefix()) as pack:
                await self._fill(pack, under_way)
                if pack.keys and not await self._submit(pack):
                    return

    async def _fill(self, pack: Pack, under_way: set[str]) -> None:
        """Put requests into a pack until it is full, the budget is, or there are none."""
        while self._ready and len(pack.keys) < self.size and pack.size < MOST_BATCH_BYTES:
            position = self._ready.popleft()
            request, key = await self._next_request(position)
            if request is not None and key not in self.given_up:
                estimate = self._estimate(request)
                if key in under_way:
                    self._waiting[key] = Waiting(position, len(request.prompt), bool(request.think))
                elif self.budget.fits(pack.estimate + estimate):
                    self._waiting[key] = Waiting(position, len(request.prompt), bool(request.think))
                    pack.add(key, self.service.row(key, request), estimate)
                    under_way.add(key)
                elif pack.keys or self.open:
                    self._ready.appendleft(position)
                    self._held = True
                    return
                # else the budget does not reach this question, whatever comes
            await asyncio.sleep(0)  # Ctrl-C is heard here

    def _estimate(self, request: Request) -> Usage:
        """What a request may take; a first one with its check, as a thought without one is worth nothing."""
        estimate = self.estimator.estimate(request)
        if request.think or not self.options.applies("inconsistent"):
            return estimate
        empty = len(check_prompt(request.question, ""))
        check = self.estimator.estimate_many(1, empty, checking=True)
        return estimate + check + Usage(estimate.output_tokens)  # the check repeats the thought

    async def _next_request(self, position: int) -> tuple[Request | None, str]:
        """The request that a question waits for, with its key; None where every reply is there."""
        question = self._questions[position]
        key = self._first_keys.get(position, "")
        reply = self.journal.get(key) if key else None
        if reply is None:
            ask_about = self.ask_about
            first = await asyncio.to_thread(ask_about, question) if ask_about.reads_files else ask_about(question)
            key = self._first_keys[position] = request_key(self.service.identity, first)
            reply = self.journal.get(key)
            if reply is None:
                return first, key
        check = check_of(question, reply, self.index[question.scene_id], self.options)
        if check is None:
            return None, ""
        key = request_key(self.service.identity, check)
        return (check, key) if self.journal.get(key) is None else (None, "")

    async def _submit(self, pack: Pack) -> bool:
        """Start a batch; False where that failed or is not known, and is seen to at the next look.

        Raises:
            ValueError: the provider refused.
        """
        note = BatchNote(f"s30k-{secrets.token_hex(8)}", self.service.identity, tuple(pack.keys), pack.estimate)
        try:
            file = await self.service.upload(pack.path())
        except TeacherUnavailable as error:
            self._put_back(note)
            self._held = False
            self._come_to_nothing(str(error), error.retry_after)
            return False
        await self.journal.open_batch(note)
        self.budget.commit(note.estimate)
        try:
            batch_id = await self.service.submit(file, note.token)
        except TeacherUnavailable as error:
            _log.info("%s; looking whether the batch was started.", error)
            self._wait(error.retry_after)
            return False
        except ValueError:
            await self.journal.end_batch(note.token, "refused")
            raise
        await self.journal.name_batch(note.token, batch_id)
        self.submitted += 1
        _log.info("Batch %s: %d requests.", batch_id, len(note.keys))
        return True

    # ---- looking

    async def _look_at_all(self) -> None:
        await self._recover()
        for note in self.open:
            if note.batch_id:
                await self._look(note)

    async def _recover(self) -> None:
        """Find batches of which it is not known whether they were started: by the token that the provider keeps.

        One that is not found twice, a poll apart, was not.
        """
        for note in [note for note in self.open if not note.batch_id]:
            try:
                batch_id = await self.service.find(note.token)
            except TeacherUnavailable as error:
                _log.info("%s; trying again.", error)
                continue
            if batch_id:
                await self.journal.name_batch(note.token, batch_id)
                self.submitted += 1
                continue
            self._looks[note.token] += 1
            if self._looks[note.token] >= LOOKS:
                await self._close(note, "not started")
                self._put_back(note)
                self._come_to_nothing("the provider did not take the batch", None)

    async def _look(self, note: BatchNote) -> None:
        """See how a batch stands, and take in what came of it when it has ended."""
        try:
            state = await self.service.look(note.batch_id)
            self._done[note.token] = state.done
            if not state.ended:
                return
            reasons = await self._collect(note, state)
        except TeacherUnavailable as error:
            _log.info("%s; looking at batch %s again.", error, note.batch_id)
            return
        except BatchGone as error:
            _log.warning("Batch %s is lost: %s.", note.batch_id, error)
            state = BatchState(LOST, message=str(error))
            reasons = {key: LOST for key in note.keys if self.journal.get(key) is None}
        vague = any(reason in (ROW_MISSING, ROW_MALFORMED) for reason in reasons.values())
        if vague and self._looks[note.token] < LOOKS - 1:
            self._looks[note.token] += 1  # the file may not have been whole yet, and what is in it is paid for
            return
        await self._close(note, state.ended)
        others = bool(self.open)
        if state.queue_full and others:
            self._put_back(note)
            self._held = True  # until one of the others ends
            return
        self._count(note, reasons)
        self._put_back(note)
        if state.ended != "completed" and len(reasons) == len(note.keys):
            self._come_to_nothing(f"{state.ended} {state.message}".strip(), None)
        else:
            self._in_vain = 0

    async def _collect(self, note: BatchNote, state: BatchState) -> dict[str, str]:
        """Put the replies of a batch into the journal; the reason codes of requests without one."""
        wanted, seen, reasons, malformed = set(note.keys), set[str](), dict[str, str](), False
        waiting = []
        for file in state.files:
            async for key, outcome in self.service.read(file):
                malformed |= not key
                if key not in wanted or key in seen:
                    continue
                if isinstance(outcome, str):
                    reasons[key] = outcome
                    continue
                seen.add(key)
                if self.journal.get(key) is None:
                    waiting.append(self._receive(key, outcome))
                if len(waiting) >= _SYNCED_TOGETHER:
                    await asyncio.gather(*waiting)
                    waiting.clear()
        await asyncio.gather(*waiting)
        absent = ROW_MALFORMED if malformed else ROW_MISSING
        default = absent if state.ended == "completed" else state.ended
        return {key: reasons.get(key, default) for key in note.keys if self.journal.get(key) is None}

    async def _receive(self, key: str, reply: Reply) -> None:
        reply = replace(reply, batched=True)
        self.new_requests += 1
        self.budget.add(reply.input_tokens, reply.output_tokens, batched=True)
        waiting = self._waiting.get(key)
        if waiting is not None:
            self.estimator.learn_from(waiting.characters, waiting.checking, reply)
        await self.journal.add(key, reply)

    async def _close(self, note: BatchNote, how: str) -> None:
        await self.journal.end_batch(note.token, how)
        self.budget.release(note.estimate)
        self._done.pop(note.token, None)
        self._held = False

    def _count(self, note: BatchNote, reasons: Mapping[str, str]) -> None:
        """Count what failed, and give up what has failed too often."""
        for key, reason in reasons.items():
            self.failures[reason] += 1
            self._tries[key] += 1
            if self._tries[key] >= self.service.retries.attempts:
                self.given_up[key] = reason
        if reasons:
            codes = ", ".join(f"{reason} {count}" for reason, count in Counter(reasons.values()).most_common())
            _log.warning("Batch %s: %d of %d requests failed: %s.", note.batch_id, len(reasons), len(note.keys), codes)

    def _put_back(self, note: BatchNote) -> None:
        """Questions of a batch that is done with go on, before those that were not asked: their thoughts are paid."""
        waiting = [self._waiting.pop(key) for key in note.keys if key in self._waiting]
        self._ready.extendleft(row.position for row in reversed(waiting))

    def _wait(self, retry_after: float | None) -> None:
        self._not_before = time.monotonic() + backoff(self._in_vain, retry_after, self.service.retries, self._rng)

    def _come_to_nothing(self, message: str, retry_after: float | None) -> None:
        """A batch of which nothing came."""
        self._wait(retry_after)
        self._in_vain += 1
        self._last_failure = message
