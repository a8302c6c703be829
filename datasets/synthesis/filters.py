"""The filters of Scene-30K, in the paper's order, and two of our own. Pure functions that return a reason or "".

Order: format, think_short, answer_short, few_steps, target_unnamed, inconsistent; ours: gold_answer or gold_box, then
near_duplicate over all that is left.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from ...utils.boxes import box3d_iou
from ...utils.metrics.qa import clean_answer
from ...utils.text import parse_response, resolve_boxes, strip_pointers
from ..rooms.words import plural
from .sources import Question

# A cue opens a sentence, a line or a list item. "Next to the bed …" is no step.
_CUE = re.compile(
    r"(?:^|(?<=[.!?:;\n*#>-]))[\s*#>-]*"
    r"(step\s+\d+|first(?:ly)?|second(?:ly)?|third(?:ly)?|next(?!\s+to\b)|then|last(?:ly)?|finally|conclusion)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FilterOptions:
    """Thresholds of the filters; 0 switches a length filter off.

    The paper also asks for 20 words of answer, which its own examples break ("The sofa in the scene is black."), so
    that this one is off by default.
    """

    min_think_words: int = 30
    min_answer_words: int = 0
    min_steps: int = 3
    min_consistency: float = 0.8
    min_box_iou: float = 0.5
    duplicate_similarity: float = 0.9


def count_words(text: str) -> int:
    """Words without the boxes among them."""
    return len(re.findall(r"\w[\w'’.-]*", strip_pointers(text)))


def similarity(first: str, second: str) -> float:
    """1 - Levenshtein distance over characters / length of the longer text: the paper's measure, in [0, 1]."""
    return Levenshtein.normalized_similarity(first, second)


def step_starts(think: str) -> list[int]:
    """Where the steps of a thought begin. A cue is one step however its line repeats it ("Step 1: First, …")."""
    starts: list[int] = []
    end = -1
    for match in _CUE.finditer(think):
        if not starts or re.search(r"\w", think[end : match.start(1)]):
            starts.append(match.start(1))
        end = match.end(1)
    return starts


def last_step(think: str) -> str:
    """The text from the last cue on; the whole thought where there is none."""
    starts = step_starts(think)
    return think[starts[-1] :] if starts else think


def contains_words(text: str, phrase: str) -> bool:
    """Whether a phrase occurs in a text as whole words; case does not matter."""
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()) is not None


def names_target(step: str, names: Iterable[str]) -> bool:
    """Whether a step names the target by one of its names, a plural, or a name's last word ("chair" of two)."""
    words = strip_pointers(step)
    for name in names:
        head = name.split()[-1] if name.split() else ""
        if any(contains_words(words, form) for noun in (name, head) if noun for form in (noun, plural(noun))):
            return True
    return False


def check_response(text: str, question: Question, options: FilterOptions) -> str:
    """The filters that need nothing but the reply: format, lengths, steps, target. The first reason, or ""."""
    response = parse_response(text)
    if not (response.well_formed and response.think and response.answer):
        return "format"
    if count_words(response.think) < options.min_think_words:
        return "think_short"
    if count_words(response.answer) < options.min_answer_words:
        return "answer_short"
    if len(step_starts(response.think)) < options.min_steps:
        return "few_steps"
    if question.target_names and not names_target(last_step(response.think), question.target_names):
        return "target_unnamed"
    return ""


def check_consistency(answer: str, again: str, options: FilterOptions) -> str:
    """Whether the answer given again, from the thought alone, is close enough to the first one."""
    return "" if similarity(answer.strip(), again.strip()) >= options.min_consistency else "inconsistent"


def check_gold(answer: str, question: Question, options: FilterOptions) -> str:
    """Whether an answer agrees with the benchmark's own.

    Grounding: the first box covers the target's box (IoU). Questions: an accepted answer occurs in it as whole words,
    after the cleaning that question-answering metrics apply (numbers as words, no articles).
    """
    if question.task == "grounding":
        boxes = resolve_boxes(answer, [])
        if not boxes or not question.target_boxes:
            return "gold_box"
        iou = float(box3d_iou([boxes[0]], [list(question.target_boxes[0])])[0, 0])
        return "" if iou >= options.min_box_iou else "gold_box"
    cleaned = clean_answer(strip_pointers(answer))
    agrees = any(contains_words(cleaned, clean_answer(gold)) for gold in question.gold_answers)
    return "" if agrees else "gold_answer"


def is_near_duplicate(first: tuple[Question, str], second: tuple[Question, str], options: FilterOptions) -> bool:
    """Whether two accepted (question, answer) say the same of the same objects of a scene."""
    (question, answer), (other, other_answer) = first, second
    same_things = (question.scene_id, question.task, sorted(question.object_ids)) == (
        other.scene_id,
        other.task,
        sorted(other.object_ids),
    )
    return (
        same_things
        and similarity(question.text.lower(), other.text.lower()) >= options.duplicate_similarity
        and similarity(answer.lower(), other_answer.lower()) >= options.duplicate_similarity
    )


def near_duplicates(accepted: Sequence[tuple[Question, str]], options: FilterOptions) -> list[int]:
    """Indices of those that repeat an earlier one which is kept. Compared within a scene and target only."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    repeated = []
    for index, (question, _) in enumerate(accepted):
        group = groups.setdefault((question.scene_id, question.task, tuple(sorted(question.object_ids))), [])
        if any(is_near_duplicate(accepted[earlier], accepted[index], options) for earlier in group):
            repeated.append(index)
        else:
            group.append(index)
    return repeated
