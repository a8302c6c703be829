"""Scene-30K records: questions with a true chain of thought and an answer that carries the target's box.

A thought has three steps, `First`, `Next`, `Last`; the last one names the target. It points at each object that it
names, right behind the object's own name, so that what it says next (a distance, a colour) is said of a thing that has
been found. Boxes are in the model frame (world frame minus the floor centre), written by the answer grammar
(utils/text.py).
"""

from collections.abc import Sequence
from typing import Any

from ...utils.text import format_box, format_response
from .descriptions import Description
from .questions import Question
from .relations import RoomFacts
from .words import POINTING, pointing


def render_thought(facts: RoomFacts, steps: Sequence[str]) -> str:
    """The three steps as sentences with their cues, marks as boxes."""
    first, following, last = (POINTING.sub(lambda mark: model_box(facts, int(mark[1])), step) for step in steps)
    return f"First, {first}. Next, {following}. Last, {last}."


def model_box(facts: RoomFacts, object_id: int) -> str:
    """An object's box as an answer writes it, model frame."""
    box = facts.boxes[object_id]
    return format_box([box[a] - facts.origin_3[a] for a in range(3)] + list(box[3:6]))


def grounding_record(facts: RoomFacts, chosen: Description, question: str) -> dict[str, Any]:
    """A record for finding one object: the question is the description, the answer the object with its box.

    The box stands right behind the object's own name. Behind a whole phrase, as in "the book nearest to the cabinet",
    it would stand behind another object's, and a model that goes from a kind to its name would point at that one.
    """
    color, label = facts.color(chosen.target), facts.label(chosen.target)
    words = f"The {color} {label}"
    thought = render_thought(
        facts, (*chosen.steps, f"{pointing(f'this {color} {label}', chosen.target)} is the target")
    )
    return {
        "scene_id": facts.room.scene_id,
        "question": question,
        "cot": format_response(thought, f"{words} {model_box(facts, chosen.target)}."),
        "task": "grounding",
        "object_ids": [chosen.target],
        "gold_answer": f"{words}.",
        "question_type": "grounding",
        "relation": chosen.kind,
    }


def question_record(facts: RoomFacts, question: Question) -> dict[str, Any]:
    """A record for any other question: a short answer, with the box where it ends with its one target's name.

    Behind other words (`gray`, `on the desk`) a box would say that another thing, or none, is the one.
    """
    answer = question.answers[0]
    # A sentence keeps its full stop at the end, after the box.
    stem, stop = (answer[:-1], ".") if answer.endswith(".") else (answer, "")
    named = len(question.targets) == 1 and f" {stem}".endswith(f" {facts.label(question.targets[0])}")
    box = f" {model_box(facts, question.targets[0])}" if named else ""
    return {
        "scene_id": facts.room.scene_id,
        "question": f"{question.situation} {question.question}".strip(),
        "cot": format_response(render_thought(facts, question.steps), f"{stem}{box}{stop}"),
        "task": question.task,
        "object_ids": list(question.targets),
        "gold_answer": answer,
        "question_type": question.question_type,
    }
