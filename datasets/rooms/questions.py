"""Questions about a room (ScanQA's kind), each with its true answers, its targets and its reasoning.

Every function takes a RoomFacts and a numpy Generator and returns the questions it can ask. A question is asked only
where at most 30 % of the candidate views can show all of its targets (`RoomFacts.hidden`), and never with only two
possible answers, so that no single answer can be right more than a third of the time once `balance` has chosen.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .descriptions import Description, describe
from .relations import RoomFacts, is_between, is_closest
from .words import (
    colour_answers,
    counted,
    joined,
    metres,
    number_word,
    numbered,
    plural,
    pointing,
)


@dataclass(frozen=True)
class Pose:
    """Where someone stands: floor point x, y and heading in degrees counter-clockwise from +x, world frame."""

    x: float
    y: float
    heading: float


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers (the first is the one to learn) and First, Next, Last of the thought.

    The thought has marks behind the objects that it names (`words.pointing`)."""

    scene_id: str
    task: str  # qa, situated_qa, dialogue, planning
    question_type: str
    question: str
    answers: tuple[str, ...]
    targets: tuple[int, ...]
    steps: tuple[str, str, str]
    situation: str = ""
    alternatives: tuple[str, ...] = ()
    pose: Pose | None = None
    mentioned: tuple[int, ...] = field(default=())
    about: tuple[str, ...] = ()  # kinds of things that the words name, which `balance.thin` goes by


Describer = dict[int, list[Description]]


def hidden_descriptions(facts: RoomFacts) -> Describer:
    """All descriptions of every object that few candidate views show."""
    return {i: found for i in facts.ids if facts.hidden(i) and (found := describe(facts, i))}


def choose_description(
    rng: np.random.Generator, options: Sequence[Description], *, without_color: bool = False, avoid: Sequence[int] = ()
) -> Description | None:
    """One description, each kind equally likely; none that leans on the objects of `avoid`."""
    usable = [
        option
        for option in options
        if not (without_color and option.uses_color) and not set(option.anchors) & set(avoid)
    ]
    if not usable:
        return None
    kinds = sorted({option.kind for option in usable})
    kind = kinds[rng.integers(len(kinds))]
    alike = [option for option in usable if option.kind == kind]
    return alike[rng.integers(len(alike))]


def _ask(
    facts: RoomFacts,
    question_type: str,
    question: str,
    answers: Sequence[str],
    targets: Sequence[int],
    steps: tuple[str, str, str],
) -> Question:
    unique = tuple(dict.fromkeys(answers))
    return Question(facts.room.scene_id, "qa", question_type, question, unique, tuple(targets), steps)


def named_groups(facts: RoomFacts) -> dict[str, list[int]]:
    """Nouns that can be counted without doubt: noun -> all objects that it names."""
    groups: dict[str, list[int]] = {}
    for object_id in facts.ids:
        noun = facts.family_noun(object_id)
        members = facts.rivals(object_id)
        if not facts.is_one_kind(object_id):
            continue
        # A noun is in doubt where another object's label ends with it, or its members know other rivals.
        if any(facts.label(i).endswith(noun) and i not in members for i in facts.ids):
            continue
        if any(set(facts.rivals(i)) - set(members) for i in members):
            continue
        if noun not in groups or len(groups[noun]) < len(members):
            groups[noun] = members
    return groups


def colour_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    asked = []
    for target, options in known.items():
        chosen = choose_description(rng, options, without_color=True)
        if chosen is None:
            continue
        color = facts.color(target)
        steps = (*chosen.steps, f"{chosen.this} is {color}")
        asked.append(_ask(facts, "color", f"What color is {chosen.phrase}?", colour_answers(color), (target,), steps))
    return asked


def place_phrases(facts: RoomFacts, target: int) -> list[tuple[str, int | None]]:
    """True short answers to "where is it?", the most telling first, each with the object that it leans on."""
    places: list[tuple[str, int | None]] = []
    support = facts.objects[target].support_id
    if support is not None and facts.stands_on(target, support):
        return [(f"on the {facts.label(support)}", support)]
    if facts.objects[target].on_wall:
        below = [i for i in facts.anchors if facts.on_floor(i) and facts.hangs_above(target, i)]
        below.sort(key=lambda i: facts.planar[i][target])
        return [*((f"above {facts.anchors[i]}", i) for i in below[:1]), ("on the wall", None)]
    near = [i for i in facts.anchors if i not in facts.rivals(target) and facts.on_floor(i)]
    near = sorted((i for i in near if facts.gaps[i][target] <= 0.4), key=lambda i: facts.gaps[i][target])
    places += [(f"next to {facts.anchors[i]}", i) for i in near[:2]]
    middle, half = facts.origin_3, facts.room.size_3 / 2
    box = facts.boxes[target]
    to_walls = [half[a] - abs(box[a] - middle[a]) - box[a + 3] / 2 for a in (0, 1)]
    if max(to_walls) <= 0.3:
        places.append(("in the corner", None))
    return places


def where_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    asked = []
    for target, options in known.items():
        places = place_phrases(facts, target)
        leaning = [anchor for _, anchor in places if anchor is not None]
        chosen = choose_description(rng, options, avoid=leaning)
        if not places or chosen is None:
            continue
        answers = [phrase for phrase, _ in places]
        steps = (*chosen.steps, f"{chosen.this} is {answers[0]}")
        asked.append(_ask(facts, "where", f"Where is {chosen.phrase}?", answers, (target,), steps))
    return asked


def support_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    """What is on a thing, and what a thing is on."""
    asked = []
    for lower, name in facts.anchors.items():
        if len(facts.supported[lower]) != 1 or not facts.hidden(facts.supported[lower][0]):
            continue
        upper = facts.supported[lower][0]
        answers = (facts.label(upper), f"{facts.color(upper)} {facts.label(upper)}")
        found, height = pointing(facts.label(upper), upper), metres(facts.bottom(upper) - facts.origin_3[2])
        steps = (
            f"I look for {facts.pointed(lower)}, it is {metres(facts.from_middle(lower))} meters from the middle of"
            " the room",
            f"the {found} stands on it, alone, at a height of {height} meters",
            f"{facts.pointed(lower)} carries the {facts.color(upper)} {found}",
        )
        asked.append(_ask(facts, "on", f"What is on {name}?", answers, (upper,), steps))
    for upper, options in known.items():
        lower = facts.objects[upper].support_id
        chosen = choose_description(rng, options, avoid=() if lower is None else (lower,))
        if lower is None or chosen is None or not facts.stands_on(upper, lower):
            continue
        answers = (facts.label(lower), f"{facts.color(lower)} {facts.label(lower)}")
        steps = (*chosen.steps, f"{chosen.this} stands on the {pointing(facts.label(lower), lower)}")
        asked.append(_ask(facts, "stands on", f"What is {chosen.phrase} standing on?", answers, (upper,), steps))
    return asked


def count_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:  # noqa: ARG001
    asked = []
    for noun, members in named_groups(facts).items():
        if not facts.hidden(*members):
            continue
        count, colors = len(members), [facts.color(i) for i in members]
        steps = (
            f"I look for every {noun} in the room",
            f"one by one, that is {numbered(noun, members)}",
            f"that makes {counted(count, noun)} in all",
        )
        question = f"How many {plural(noun)} are in the room?"
        asked.append(_ask(facts, "count", question, (number_word(count), str(count)), members, steps))
        for color in sorted(set(colors)):
            alike = facts.coloured(members, color)
            if count < 3 or not facts.hidden(*alike):
                continue
            steps = (
                f"by color, the room has {facts.by_color(noun, members)}",
                f"those that are {color} are {numbered(noun, alike)}",
                f"so {counted(len(alike), f'{color} {noun}')} can be counted",
            )
            question = f"How many {color} {plural(noun)} are there?"
            answers = (number_word(len(alike)), str(len(alike)))
            asked.append(_ask(facts, "color count", question, answers, alike, steps))
    return asked


def closer_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:  # noqa: ARG001
    """Which of three things is closest to a fourth, and what stands closest to a thing."""
    asked = []
    names = list(facts.anchors)
    floor = [i for i in facts.ids if facts.on_floor(i)]
    for anchor in names:
        others = [i for i in names if i != anchor]
        for _ in range(min(3, len(others) // 3)):
            three = [others[k] for k in rng.permutation(len(others))[:3]]
            near, *rest = sorted(three, key=lambda i: facts.planar[i][anchor])
            if not facts.hidden(near) or not is_closest(facts, near, rest, anchor):
                continue
            steps = (
                f"I look for {joined([facts.pointed(i) for i in (anchor, *three)])}",
                f"in meters from {facts.pointed(anchor)}, from the nearest on, "
                + facts.measured({i: facts.planar[i][anchor] for i in (near, *rest)}),
                f"the closest one is {facts.pointed(near)}",
            )
            options = joined([facts.anchors[i] for i in three], "or")
            question = f"Which is closest to {facts.anchors[anchor]}, {options}?"
            asked.append(_ask(facts, "closer", question, _short(facts, near), (near,), steps))
        for target in floor:
            rest = [i for i in floor if i not in (anchor, target)]
            if target == anchor or not facts.hidden(target) or not is_closest(facts, target, rest, anchor):
                continue
            reach = metres(min(facts.planar[i][anchor] for i in rest)) if rest else "more"
            found, away = pointing(facts.label(target), target), metres(facts.planar[target][anchor])
            steps = (
                f"I look for {facts.pointed(anchor)} and for what stands on the floor around it",
                f"the {found} is {away} meters away, all the others {reach} or more",
                f"the closest one is the {facts.color(target)} {found}",
            )
            question = f"What on the floor is closest to {facts.anchors[anchor]}?"
            answers = (facts.label(target), f"{facts.color(target)} {facts.label(target)}")
            asked.append(_ask(facts, "nearest", question, answers, (target,), steps))
    return asked


def _short(facts: RoomFacts, object_id: int) -> tuple[str, ...]:
    """An anchor as an answer: its label, and its phrase where that says more."""
    return (facts.label(object_id), facts.anchors[object_id].removeprefix("the "))


def between_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:  # noqa: ARG001
    asked = []
    floor = [i for i in facts.ids if facts.on_floor(i)]
    names = [i for i in facts.anchors if i in floor]
    for index, start in enumerate(names):
        for end in names[index + 1 :]:
            inside = [i for i in floor if i not in (start, end)]
            for target in inside:
                rest = [i for i in inside if i != target]
                if not facts.hidden(target) or not is_between(facts, target, rest, start, end):
                    continue
                pair = f"{facts.anchors[start]} and {facts.anchors[end]}"
                both, found = joined([facts.pointed(start), facts.pointed(end)]), pointing(facts.label(target), target)
                steps = (
                    f"I look for {both}, they are {metres(facts.planar[start][end])} meters apart",
                    f"of all things on the floor just the {found} is near the line between them",
                    f"between them is the {facts.color(target)} {found}",
                )
                answers = (facts.label(target), f"{facts.color(target)} {facts.label(target)}")
                question = f"What on the floor is between {pair}?"
                asked.append(_ask(facts, "between", question, answers, (target,), steps))
    return asked


def compare_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:  # noqa: ARG001
    """More, fewer or the same number; the tallest of three."""
    asked = []
    groups = {noun: members for noun, members in named_groups(facts).items() if len(members) > 1}
    nouns = sorted(groups)
    for index, first in enumerate(nouns):
        for second in nouns[index + 1 :]:
            if rng.random() < 0.5:
                first, second = second, first
            if set(groups[first]) & set(groups[second]) or not facts.hidden(*groups[first], *groups[second]):
                continue
            counts = len(groups[first]), len(groups[second])
            answer = "more" if counts[0] > counts[1] else "fewer" if counts[0] < counts[1] else "the same"
            steps = (
                f"I count {numbered(first, groups[first])}",
                f"I count {numbered(second, groups[second])}",
                f"comparing {counts[0]} with {counts[1]}, the number of {plural(first)} is {_COMPARED[answer]}",
            )
            question = f"Are there more {plural(first)} than {plural(second)}, fewer, or the same number?"
            asked.append(_ask(facts, "compare", question, (answer,), (*groups[first], *groups[second]), steps))
    floor = [i for i in facts.anchors if facts.on_floor(i)]
    for _ in range(6):
        if len(floor) < 3:
            break
        three = [floor[k] for k in rng.permutation(len(floor))[:3]]
        heights = {i: facts.boxes[i][5] for i in three}
        tall, next_one, low = sorted(three, key=lambda i: -heights[i])
        if heights[tall] < 1.15 * heights[next_one] or not facts.hidden(tall):
            continue
        steps = (
            f"I look for {joined([facts.pointed(i) for i in three])}",
            "in meters of height, from the tallest on, "
            + facts.measured({i: heights[i] for i in (tall, next_one, low)}),
            f"the tallest one is {facts.pointed(tall)}",
        )
        question = f"Which is the tallest, {joined([facts.anchors[i] for i in three], 'or')}?"
        asked.append(_ask(facts, "tallest", question, _short(facts, tall), (tall,), steps))
    return asked


_COMPARED = {"more": "larger", "fewer": "smaller", "the same": "the same"}
_FAMILIES = (
    colour_questions,
    where_questions,
    support_questions,
    count_questions,
    closer_questions,
    between_questions,
    compare_questions,
)


def room_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    """All questions that can be asked about one room, without repeats."""
    asked = [question for family in _FAMILIES for question in family(facts, rng, known)]
    unique = {question.question: question for question in asked}
    kinds = Kinds({facts.label(i) for i in facts.ids} | {facts.family_noun(i) for i in facts.ids})
    return [replace(question, about=kinds.named(text)) for text, question in unique.items()]


class Kinds:
    """Finds nouns in texts, in the singular or the plural; of "desk lamp" and "lamp" the longer one."""

    def __init__(self, nouns: Collection[str]):
        self._noun_of = {form: noun for noun in nouns for form in (noun, plural(noun))}
        forms = "|".join(re.escape(form) for form in sorted(self._noun_of, key=len, reverse=True))
        self._forms = re.compile(rf"\b(?:{forms})\b")

    def named(self, text: str) -> tuple[str, ...]:
        """The nouns in a text, each once, in their order."""
        return tuple(dict.fromkeys(self._noun_of[form] for form in self._forms.findall(text.lower())))
