"""What became of every question, on the disk rather than in memory, and what near-duplicates there are among them."""

import hashlib
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ...utils.text import format_response
from .filters import FilterOptions, near_duplicates
from .sources import Question

FAILED = "failed"  # the teacher gave no answer: no verdict about the question


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


@dataclass
class Tally:
    """Counts over outcomes."""

    judged: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    kept_by_source: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Outcomes that were not rejected."""
        return self.kept_by_source.total()

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.judged += 1
        self.requests += outcome.asked
        self.input_tokens += outcome.input_tokens
        self.output_tokens += outcome.output_tokens
        if outcome.reason:
            self.reasons[outcome.reason] += 1
        else:
            self.kept_by_source[outcome.question.source] += 1

    def reject(self, source: str, reason: str) -> None:
        """Count a kept outcome as rejected after all."""
        self.kept_by_source[source] -= 1
        self.reasons[reason] += 1


class OutcomeSpool:
    """Outcomes by the question's position, in a nameless file that goes with the process. Memory: 20 bytes a question.

    Args:
        folder: where the file lies, which needs room for the replies once more.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed on exit
        self._size = 0
        self._starts, self._lengths, self._groups = array("q"), array("i"), array("Q")
        self._repeated: set[int] = set()
        self.tally = Tally()

    def put(self, position: int, outcome: Outcome) -> None:
        """Store the outcome of the question at `position`."""
        while len(self._starts) <= position:
            self._starts.append(-1)
            self._lengths.append(0)
            self._groups.append(0)
        row = [outcome.reason, outcome.think, outcome.answer, outcome.reply, outcome.asked]
        line = orjson.dumps([*row, outcome.input_tokens, outcome.output_tokens])
        self._starts[position], self._lengths[position] = self._size, len(line)
        self._groups[position] = 0 if outcome.reason else _group(outcome.question)
        self._file.write(line)
        self._size += len(line)
        self.tally.add(outcome)

    def get(self, position: int, question: Question) -> Outcome | None:
        """The outcome of a question; None where it was not asked."""
        if position >= len(self._starts) or self._starts[position] < 0:
            return None
        row = orjson.loads(os.pread(self._file.fileno(), self._lengths[position], self._starts[position]))
        if position in self._repeated:
            row[0] = "near_duplicate"
        return Outcome(question, *row)

    def all(self, questions: Sequence[Question]) -> Iterator[Outcome]:
        """Outcomes in the questions' order, one at a time, without those that were not asked."""
        self._file.flush()
        for position in range(len(self._starts)):
            outcome = self.get(position, questions[position])
            if outcome is not None:
                yield outcome

    def mark_near_duplicates(self, questions: Sequence[Question], options: FilterOptions) -> None:
        """Reject what repeats an earlier accepted outcome. Holds the outcomes of one scene and target at a time."""
        self._file.flush()
        groups_Q = np.array(self._groups, np.uint64)
        order_Q = np.argsort(groups_Q, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(groups_Q[order_Q]) != 0]) if len(order_Q) else []
        for positions in np.split(order_Q, starts[1:]) if len(order_Q) else []:
            if len(positions) < 2 or groups_Q[positions[0]] == 0:
                continue
            outcomes = [self.get(int(position), questions[position]) for position in positions]
            pairs = [(outcome.question, outcome.answer) for outcome in outcomes if outcome is not None]
            for number in near_duplicates(pairs, options):
                self._repeated.add(int(positions[number]))
                self.tally.reject(pairs[number][0].source, "near_duplicate")

    def __enter__(self) -> "OutcomeSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _group(question: Question) -> int:
    """A number for scene, task and target, never 0; those of a group may be near-duplicates of each other."""
    parts = orjson.dumps([question.scene_id, question.task, sorted(question.object_ids)])
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big") or 1


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
