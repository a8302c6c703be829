"""The data engine: questions -> teacher -> filters -> records, through a journal that no paid answer is lost from."""

import asyncio
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson

from ...utils.files import replacing, write_whole
from ...utils.text import parse_response
from ..scene_store import SceneInfo, SceneStore
from .asking import Asker, build_asker, reject
from .batch_run import BatchRun
from .batches import Batches, JournalTeacher
from .budget import Budget, BudgetSpent
from .datasheet import write_datasheet
from .description import InputOptions, caption_lists
from .filters import FilterOptions, check_consistency
from .journal import Journal, request_key
from .limits import Estimator
from .operation import WORKERS, Progress, make_report
from .outcomes import FAILED, Outcome, OutcomeSpool, to_record, to_reject
from .prompts import check_prompt
from .sources import Question, load_questions
from .teacher import GivenUp, Reply, Request, Teacher, TeacherUnavailable

FAILURES_IN_A_ROW = 20  # after so many questions without any answer the teacher is taken to be gone
_log = logging.getLogger(__name__)


class Engine:
    """Asks one teacher about questions and judges what comes back.

    Args:
        teacher: who is asked.
        journal: replies received so far; those to come are added.
        index: labels and boxes of the scenes.
        ask_about: the first request about a question.
        options: thresholds of the filters.
        workers: requests at a time.
        budget: what all replies in the journal may cost; by default whatever they do.
        estimator: who says what a request will cost; the teacher's own, where it keeps a pace by one.
    """

    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        *,
        index: Mapping[str, SceneInfo],
        ask_about: Asker,
        options: FilterOptions,
        workers: int = WORKERS,
        budget: Budget | None = None,
        estimator: Estimator | None = None,
    ):
        if workers < 1:
            raise ValueError(f"The engine needs at least one worker, not {workers}.")
        self.teacher, self.journal = teacher, journal
        self.index, self.ask_about = index, ask_about
        self.options, self.workers = options, workers
        self.budget, self.estimator = budget or Budget(), estimator or Estimator()
        self.new_requests = 0
        self._slots = asyncio.Semaphore(workers)
        self._failures_in_a_row = 0

    async def _ask(self, request: Request) -> Reply:
        """The reply to a request, from the journal where it was received before."""
        key = request_key(self.teacher.identity, request)
        reply = self.journal.get(key)
        if reply is not None:
            return reply
        estimate = self.estimator.estimate(request)
        await self.budget.reserve(estimate)
        try:
            async with self._slots:
                reply = await self.teacher.ask(request)
            self.budget.add(reply.input_tokens, reply.output_tokens)
        finally:
            self.budget.release(estimate)
        self.new_requests += 1
        await self.journal.add(key, reply)
        return reply

    async def judge(self, question: Question) -> Outcome:
        """Ask about one question, and filter. Filters that cost nothing come before the one that asks again."""
        ask_about = self.ask_about
        first = await asyncio.to_thread(ask_about, question) if ask_about.reads_files else ask_about(question)
        reply = await self._ask(first)
        reason = reject(question, reply, self.index[question.scene_id], self.options)
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
        return replace(outcome, reason=reason, think=response.think, answer=response.answer)

    async def _judge_or_fail(self, question: Question) -> Outcome:
        try:
            outcome = await self.judge(question)
        except TeacherUnavailable as error:
            if not isinstance(error, GivenUp):
                self._failures_in_a_row += 1
            _log.warning("%s: no answer: %s.", question.question_id, error)
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise ValueError(
                    f"The teacher failed {FAILURES_IN_A_ROW} times in a row, the last time with: {error}. What was "
                    "answered is kept; run the same command again later to go on."
                ) from None
            return Outcome(question, FAILED)
        self._failures_in_a_row = 0
        return outcome

    async def run(self, questions: Iterable[Question], spool: OutcomeSpool, progress: Progress) -> None:
        """Put every question's outcome into the spool. The first error that no retry mends ends the run.

        Questions that the budget does not reach have no outcome; those that earlier runs paid for have theirs.
        """
        waiting: Iterator[tuple[int, Question]] = enumerate(questions)

        async def work() -> None:
            for position, question in waiting:  # workers share the iterator, so each takes the next question
                try:
                    spool.put(position, await self._judge_or_fail(question))
                    progress.update(spool.tally)
                except BudgetSpent:
                    pass  # the next ones may have been answered by an earlier run
                # gives the others a turn where the teacher never waits
                await asyncio.sleep(0)

        # more questions than requests, so that a slot is not idle while a reply is synced and judged
        workers = [asyncio.create_task(work()) for _ in range(2 * self.workers - 1)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.teacher.close()


def beside(out: Path, ending: str) -> Path:
    """A companion of the output file: `<out>.journal.jsonl` and the like."""
    return out.with_name(out.name + ending)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all, without holding them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)


def journal_of(out: Path) -> Path:
    """The journal beside an output file; ValueError where the file is someone else's."""
    path = beside(out, ".journal.jsonl")
    if out.exists() and not path.exists():
        raise ValueError(f"{out} was not written by this engine (it has no journal beside it); choose another --out.")
    return path


def as_plain(options: FilterOptions | InputOptions) -> dict[str, Any]:
    """Options as they stand in the report: tuples as lists, no functions, and who chose views only where one did."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if name != "views_of" and (name != "views_by" or value)}


def ask_all(engine: Engine, questions: Sequence[Question], spool: OutcomeSpool) -> None:
    """Ask and judge every question, then reject near-duplicates. Ctrl-C loses nothing that was received."""
    with Progress(len(questions), engine.budget) as progress:
        gc.freeze()  # else all that is loaded is searched for garbage every few seconds, a tenth of the run's work
        try:
            asyncio.run(engine.run(questions, spool, progress))
        except KeyboardInterrupt:
            _log.warning(
                "Stopped; %d replies are kept in %s, and the same command goes on.",
                len(engine.journal),
                engine.journal.path,
            )
            raise
        finally:
            gc.unfreeze()
        spool.mark_near_duplicates(questions, engine.options)
        progress.close(spool.tally)


def fill_by_batches(run: BatchRun, questions: Sequence[Question]) -> Teacher:
    """Ask about every question in batches; who answers for what the journal does not hold then."""
    try:
        asyncio.run(run.run(questions))
    except KeyboardInterrupt:
        _log.warning(
            "Stopped; %d replies are kept in %s. %d batches go on at the provider: the same command fetches what they "
            "answer, --cancel-batches ends them.",
            len(run.journal),
            run.journal.path,
            len(run.open),
        )
        raise
    return JournalTeacher(run.service.identity, run.given_up)


def charge(budget: Budget, journal: Journal) -> None:
    """Count what earlier runs took."""
    batched = journal.batched_input_tokens, journal.batched_output_tokens
    budget.add(*batched, batched=True)
    budget.add(journal.input_tokens - batched[0], journal.output_tokens - batched[1])


def cancel_batches(out: Path, batches: Batches, budget: Budget) -> dict[str, Any]:
    """End the batches of an output file that are under way, and keep what they have answered; the counts."""
    with Journal(journal_of(out)) as journal:
        nothing: dict[str, Any] = {"index": {}, "ask_about": Asker(lambda _: ""), "options": FilterOptions()}
        run = BatchRun(batches, journal, budget=budget, estimator=Estimator(), **nothing)
        charge(budget, journal)
        cancelled = asyncio.run(run.cancel())
        cost = round(budget.spent, 6) if budget.price else None
        return {"cancelled": cancelled, "new_requests": run.new_requests, "received": len(journal), "cost": cost}


def require_no_batches(journal: Journal, identity: str) -> None:
    """ValueError where a batch of the same teacher is under way: asking one by one would pay for it twice."""
    count = sum(note.identity == identity for note in journal.open_batches.values())
    if count:
        raise ValueError(
            f"{count} batches of this teacher are under way ({journal.path}); fetch them with --batch, or end them "
            "with --cancel-batches."
        )


def synthesize_with(
    teacher: Teacher | Batches,
    root: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    limit: int = 0,
    workers: int = WORKERS,
    seed: int = 0,
    options: FilterOptions | None = None,
    store: SceneStore | None = None,
    inputs: InputOptions | None = None,
    budget: Budget | None = None,
    estimator: Estimator | None = None,
) -> dict[str, Any]:
    """`synthesize` with a teacher, or with batches, at hand; see there. `store` saves reading the index again."""
    out, options, inputs = Path(out), options or FilterOptions(), inputs or InputOptions()
    budget, estimator = budget or Budget(), estimator or Estimator()
    journal_path = journal_of(out)
    store = store or SceneStore(Path(root) / "prepared")
    questions, left_out = load_questions(root, store, split=split, seed=seed, limit=limit, sources=inputs.sources)
    ask_about = build_asker(root, store, questions, split=split, inputs=inputs)
    with Journal(journal_path) as journal, OutcomeSpool(out.parent) as spool:
        charge(budget, journal)
        shared: dict[str, Any] = {"index": store.index, "ask_about": ask_about, "options": options}
        shared |= {"budget": budget, "estimator": estimator}
        run = None
        if isinstance(teacher, Batches):
            run = BatchRun(teacher, journal, seed=seed, **shared)
            teacher = fill_by_batches(run, questions)
        else:
            require_no_batches(journal, teacher.identity)
        engine = Engine(teacher, journal, workers=workers, **shared)
        ask_all(engine, questions, spool)
        settings = {"root": str(root), "split": split, "seed": seed, "limit": limit}
        settings |= {"identity": teacher.identity, "filters": as_plain(options), "inputs": as_plain(inputs)}
        report = make_report(
            spool.tally, engine.budget, questions=len(questions), left_out=left_out, settings=settings
        )
        report["new_requests"] = engine.new_requests
        if run is not None:
            report["new_requests"] = run.new_requests
            report["batches"] = {"submitted": run.submitted, "failures": dict(sorted(run.failures.items()))}
        rejects = (to_reject(outcome) for outcome in spool.all(questions) if outcome.reason)
        records = (to_record(outcome, teacher.identity) for outcome in spool.all(questions) if not outcome.reason)
        write_lines(beside(out, ".rejects.jsonl"), rejects)
        write_lines(out, records)
        write_whole(beside(out, ".report.json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_datasheet(out, store.index, caption_lists(root, split))
    _warn_of_gaps(report, engine.budget)
    return report


def _warn_of_gaps(report: dict[str, Any], budget: Budget) -> None:
    if report["failed"]:
        _log.warning("%d questions had no answer; run the same command again to ask them.", report["failed"])
    if report["unasked"]:
        _log.warning(
            "The budget of %s is spent, and %d questions were not asked; raise it and run the same command again.",
            budget.describe(),
            report["unasked"],
        )
