"""The data engine: questions -> teacher -> filters -> records, through a journal that no paid answer is lost from."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from ...utils.text import format_response, parse_response
from ..scene_store import SceneInfo, SceneStore
from .datasheet import write_datasheet
from .description import Describer, InputOptions, caption_lists, join_captions
from .filters import FilterOptions, check_boxes, check_consistency, check_gold, check_response, near_duplicates
from .journal import Journal, request_key
from .prompts import answer_prompt, check_prompt
from .sources import Question, load_questions
from .teacher import Reply, Request, Teacher, TeacherUnavailable
from .views import UniformViews, ViewsOf, within_limits

FAILURES_IN_A_ROW = 20  # after so many questions without any answer the teacher is taken to be gone
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a question: `reason` is "" where think and answer passed every filter but near_duplicate."""

    question: Question
    reason: str
    think: str = ""
    answer: str = ""
    reply: str = ""
    asked: int = 0  # requests answered for it, in this run or an earlier one
    input_tokens: int = 0
    output_tokens: int = 0


class Engine:
    """Asks one teacher about questions and judges what comes back.

    Args:
        teacher: who is asked.
        journal: replies received so far; those to come are added.
        index: labels and boxes of the scenes.
        describe: the scene description for a question's prompt.
        views_of: pictures for a question's prompt; None shows none.
        options: thresholds of the filters.
        workers: requests at a time.
    """

    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        *,
        index: Mapping[str, SceneInfo],
        describe: Callable[[Question], str],
        options: FilterOptions,
        workers: int,
        views_of: ViewsOf | None = None,
    ):
        if workers < 1:
            raise ValueError(f"The engine needs at least one worker, not {workers}.")
        self.teacher, self.journal = teacher, journal
        self.index, self.describe, self.views_of = index, describe, views_of
        self.options, self.workers = options, workers
        self.new_requests = 0
        self._failures_in_a_row = 0

    async def _ask(self, request: Request) -> Reply:
        """The reply to a request, from the journal where it was received before."""
        key = request_key(self.teacher.identity, request)
        reply = self.journal.get(key)
        if reply is None:
            reply = await self.teacher.ask(request)
            self.journal.add(key, reply)
            self.new_requests += 1
        return reply

    async def _request(self, question: Question) -> Request:
        """What the teacher is asked first, with pictures where it is to see some."""
        images: tuple[bytes, ...] = ()
        if self.views_of is not None:
            views = await asyncio.to_thread(self.views_of, question.scene_id, question.text)
            images = within_limits(views, question.scene_id)
        return Request(question, answer_prompt(question, self.describe(question), len(images)), images=images)

    async def judge(self, question: Question) -> Outcome:
        """Ask about one question, and filter. Filters that cost nothing come before the one that asks again."""
        reply = await self._ask(await self._request(question))
        reason = reply.reason or check_response(reply.text, question, self.options)
        outcome = Outcome(
            question,
            reason,
            reply=reply.text,
            asked=1,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
        )
        if reason:
            return outcome
        response = parse_response(reply.text)
        if self.options.applies("inconsistent"):
            again = await self._ask(Request(question, check_prompt(question, response.think), response.think))
            outcome = replace(
                outcome,
                asked=2,
                input_tokens=reply.input_tokens + again.input_tokens,
                output_tokens=reply.output_tokens + again.output_tokens,
            )
            reason = f"check_{again.reason}" if again.reason else ""
            reason = reason or check_consistency(response.answer, parse_response(again.text).answer, self.options)
        info = self.index[question.scene_id]
        reason = reason or check_gold(response.answer, question, self.options)
        reason = reason or check_boxes(reply.text, info.to_model(info.boxes_K7), self.options)
        return replace(outcome, reason=reason, think=response.think, answer=response.answer)

    async def _judge_or_fail(self, question: Question) -> Outcome:
        try:
            outcome = await self.judge(question)
        except TeacherUnavailable as error:
            self._failures_in_a_row += 1
            _log.warning("%s: no answer: %s.", question.question_id, error)
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise ValueError(
                    f"The teacher failed {FAILURES_IN_A_ROW} times in a row, the last time with: {error}. What was "
                    "answered is kept; run the same command again later to go on."
                ) from None
            return Outcome(question, "failed")
        self._failures_in_a_row = 0
        return outcome

    async def run(self, questions: Iterable[Question], progress: tqdm) -> list[Outcome]:
        """Outcomes in the questions' order. The first error that no retry mends ends the run."""
        waiting: Iterator[tuple[int, Question]] = enumerate(questions)
        outcomes: dict[int, Outcome] = {}

        async def work() -> None:
            for index, question in waiting:  # workers share the iterator, so each takes the next question
                outcomes[index] = await self._judge_or_fail(question)
                progress.update()
                # gives the others a turn where the teacher never waits
                await asyncio.sleep(0)

        workers = [asyncio.create_task(work()) for _ in range(self.workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.teacher.close()
        return [outcomes[index] for index in sorted(outcomes)]


def mark_near_duplicates(outcomes: list[Outcome], options: FilterOptions) -> list[Outcome]:
    """The outcomes, with those rejected that repeat an earlier accepted one."""
    accepted = [index for index, outcome in enumerate(outcomes) if not outcome.reason]
    pairs = [(outcomes[index].question, outcomes[index].answer) for index in accepted]
    marked = list(outcomes)
    for number in near_duplicates(pairs, options):
        index = accepted[number]
        marked[index] = replace(outcomes[index], reason="near_duplicate")
    return marked


def to_record(outcome: Outcome, teacher: str) -> dict[str, Any]:
    """An accepted outcome as a row of Scene-30K.jsonl: scene_id, question_id, question, cot and our further fields."""
    question = outcome.question
    return {
        "scene_id": question.scene_id,
        "question_id": question.question_id,
        "question": question.text,
        "cot": format_response(outcome.think, outcome.answer),
        "task": question.task,
        "object_ids": list(question.object_ids),
        "gold_answer": question.gold_answers[0],
        "source": question.source,
        "teacher": teacher,
    }


def to_reject(outcome: Outcome) -> dict[str, Any]:
    """A rejected outcome as a row of the file of rejects."""
    question = outcome.question
    return {
        "scene_id": question.scene_id,
        "question_id": question.question_id,
        "question": question.text,
        "reason": outcome.reason,
        "reply": outcome.reply,
    }


def as_plain(options: FilterOptions | InputOptions) -> dict[str, Any]:
    """Options as they stand in the report, tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def make_report(
    outcomes: list[Outcome], left_out: Counter[str], engine: Engine, settings: dict[str, Any]
) -> dict[str, Any]:
    """Counts of a run: what was asked, kept, rejected and why, and the tokens it took (earlier runs included)."""
    kept = [outcome for outcome in outcomes if not outcome.reason]
    rejected = Counter(outcome.reason for outcome in outcomes if outcome.reason)
    failed = rejected.pop("failed", 0)
    return {
        "settings": {**settings, "identity": engine.teacher.identity, "filters": as_plain(engine.options)},
        "questions": len(outcomes),
        "left_out": dict(sorted(left_out.items())),
        "kept": len(kept),
        "kept_by_source": dict(sorted(Counter(outcome.question.source for outcome in kept).items())),
        "rejected": dict(sorted(rejected.items())),
        "failed": failed,
        "requests": sum(outcome.asked for outcome in outcomes),
        "new_requests": engine.new_requests,
        "input_tokens": sum(outcome.input_tokens for outcome in outcomes),
        "output_tokens": sum(outcome.output_tokens for outcome in outcomes),
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def beside(out: Path, ending: str) -> Path:
    """A companion of the output file: `<out>.journal.jsonl` and the like."""
    return out.with_name(out.name + ending)


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def synthesize_with(
    teacher: Teacher,
    root: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    limit: int = 0,
    workers: int = 4,
    seed: int = 0,
    options: FilterOptions | None = None,
    store: SceneStore | None = None,
    inputs: InputOptions | None = None,
    views_of: ViewsOf | None = None,
) -> dict[str, Any]:
    """`synthesize` with a teacher at hand; see there. `store` saves reading the scenes' index again."""
    out, options, inputs = Path(out), options or FilterOptions(), inputs or InputOptions()
    journal_path = beside(out, ".journal.jsonl")
    if out.exists() and not journal_path.exists():
        raise ValueError(f"{out} was not written by this engine (it has no journal beside it); choose another --out.")
    store = store or SceneStore(Path(root) / "prepared")
    if inputs.views and views_of is None:
        views_of = UniformViews(store, inputs.views, inputs.view_size)
    questions, left_out = load_questions(root, store, split=split, seed=seed, limit=limit, sources=inputs.sources)
    if isinstance(views_of, UniformViews):
        views_of.require(question.scene_id for question in questions)
    captions = caption_lists(root, split)
    describe = Describer(store.index, join_captions(captions), inputs.description)
    with Journal(journal_path) as journal, tqdm(total=len(questions), desc="synthesize", unit="question") as progress:
        engine = Engine(
            teacher,
            journal,
            index=store.index,
            describe=describe,
            options=options,
            workers=workers,
            views_of=views_of,
        )
        outcomes = mark_near_duplicates(asyncio.run(engine.run(questions, progress)), options)
        settings = {"root": str(root), "split": split, "seed": seed, "limit": limit, "inputs": as_plain(inputs)}
        report = make_report(outcomes, left_out, engine, settings)
        records = (to_record(outcome, teacher.identity) for outcome in outcomes if not outcome.reason)
        rejects = (to_reject(outcome) for outcome in outcomes if outcome.reason)
        write_atomically(beside(out, ".rejects.jsonl"), _lines(rejects))
        write_atomically(out, _lines(records))
        write_atomically(beside(out, ".report.json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_datasheet(out, store.index, captions)
    if report["failed"]:
        _log.warning("%d questions had no answer; run the same command again to ask them.", report["failed"])
    return report
