"""Situated questions (SQA3D's kind): someone stands in the room, facing a thing; the answers follow from that pose.

Directions are told apart with a margin: front within 35 degrees of the heading, left and right within 35 degrees of
a right angle, behind beyond 145 degrees; what lies between them is never asked about.
"""

import math
from collections.abc import Sequence

import numpy as np

from .questions import Pose, Question, named_groups
from .relations import RoomFacts, bearing
from .words import colour_answers, counted, joined, metres, number_word, numbered, plural, pointing, with_article

DIRECTIONS = ("front", "left", "right", "behind")
_CENTRES = {"front": 0.0, "left": 90.0, "right": -90.0, "behind": 180.0}
_SURE, _POSSIBLE = 35.0, 55.0  # degrees from a direction's centre: inside it for sure, perhaps inside it

_PLACE = {"front": "in front of me", "left": "on my left", "right": "on my right", "behind": "behind me"}
_MOVE = {"front": "forward", "left": "left", "right": "right", "behind": "backward"}


class Situation:
    """A pose in a room and where everything is from there."""

    def __init__(self, facts: RoomFacts, pose: Pose, faced: int):
        self.facts, self.pose, self.faced = facts, pose, faced
        origin_2 = (pose.x, pose.y)
        self.angles = {i: bearing(origin_2, pose.heading, facts.boxes[i]) for i in facts.ids}
        self.distances = {i: math.dist(origin_2, facts.boxes[i][:2]) for i in facts.ids}
        self.mentioned: tuple[int, ...] = (faced,)
        self.text = ""
        self.alternatives: tuple[str, str] = ("", "")

    def off(self, object_id: int, direction: str) -> float:
        """Degrees between an object and the middle of a direction."""
        return abs((self.angles[object_id] - _CENTRES[direction] + 180) % 360 - 180)

    def is_at(self, object_id: int, direction: str) -> bool:
        return self.off(object_id, direction) <= _SURE

    def may_be_at(self, object_id: int, direction: str) -> bool:
        """Whether an object, big as it is, could be said to be in a direction."""
        half = max(self.facts.boxes[object_id][3:5]) / 2
        spread = math.degrees(math.atan2(half, max(self.distances[object_id], 0.1)))
        return self.off(object_id, direction) <= max(_POSSIBLE, _SURE + spread)

    def direction_of(self, object_id: int) -> str | None:
        """The direction of an object, where there is no doubt and it is not right beside the viewer."""
        if self.distances[object_id] < 0.5:
            return None
        return next((name for name in DIRECTIONS if self.is_at(object_id, name)), None)


def _is_free(facts: RoomFacts, x: float, y: float) -> bool:
    """Whether someone can stand there: 0.25 m away from everything that is not hanging high."""
    return not any(
        abs(x - box[0]) <= box[3] / 2 + 0.25 and abs(y - box[1]) <= box[4] / 2 + 0.25 and facts.bottom(i) < 1.6
        for i, box in facts.boxes.items()
    )


def find_situation(facts: RoomFacts, rng: np.random.Generator) -> Situation | None:
    """A free place from which one named thing is straight ahead and another to a side; None after 40 tries."""
    anchors = list(facts.anchors)
    if not anchors:
        return None
    half = facts.room.size_3[:2] / 2 - 0.35
    for _ in range(40):
        x, y = (float(facts.origin_3[a] + rng.uniform(-half[a], half[a])) for a in (0, 1))
        faced = anchors[rng.integers(len(anchors))]
        if not _is_free(facts, x, y) or not 0.6 <= math.dist((x, y), facts.boxes[faced][:2]) <= 4.0:
            continue
        situation = Situation(facts, Pose(x, y, bearing((x, y), 0.0, facts.boxes[faced])), faced)
        sides = [
            i
            for i in anchors
            if i != faced
            and situation.direction_of(i) in ("left", "right", "behind")
            and situation.distances[i] <= 3.5
        ]
        if sides:
            _word(situation, sides[rng.integers(len(sides))])
            return situation
    return None


def _word(situation: Situation, side: int) -> None:
    """Write the situation: what is faced, and what is to a side; two more wordings of the same."""
    facts = situation.facts
    faced, other = facts.anchors[situation.faced], with_article(facts.anchors[side].removeprefix("the "))
    where = _PLACE[situation.direction_of(side) or ""]
    away = metres(situation.distances[situation.faced])
    situation.mentioned = (situation.faced, side)
    situation.text = f"I am facing {faced} and there is {other} {where}."
    situation.alternatives = (
        f"I am standing {away} meters from {faced}, looking straight at it, with {other} {where}.",
        f"{other.capitalize()} is {where} while I look at {faced} in front of me.",
    )


def _ask(
    situation: Situation,
    question_type: str,
    question: str,
    answers: Sequence[str],
    targets: Sequence[int],
    reason: tuple[str, str],
) -> Question:
    faced = situation.facts.pointed(situation.faced)
    return Question(
        scene_id=situation.facts.room.scene_id,
        task="situated_qa",
        question_type=question_type,
        question=question,
        answers=tuple(dict.fromkeys(answers)),
        targets=tuple(targets),
        steps=(f"I stand facing {faced}, {metres(situation.distances[situation.faced])} meters from it", *reason),
        situation=situation.text,
        alternatives=situation.alternatives,
        pose=situation.pose,
        mentioned=situation.mentioned,
    )


def _turned(situation: Situation, object_id: int) -> str:
    """Where an object is, in degrees and metres, for the reasoning."""
    angle = situation.angles[object_id]
    turn = f"{abs(round(angle))} degrees to the {'left' if angle > 0 else 'right'}"
    return f"{turn} and {metres(situation.distances[object_id])} meters away"


def direction_questions(situation: Situation) -> list[Question]:
    """Where a named thing is: asked as is, which, where and can, with four possible answers each."""
    asked = []
    facts = situation.facts
    for target, name in facts.anchors.items():
        direction = situation.direction_of(target)
        if direction is None or target in situation.mentioned or not facts.hidden(target):
            continue
        pointed = facts.pointed(target)
        reason = (f"{pointed} is {_turned(situation, target)}", f"so {pointed} is {_PLACE[direction]}")
        forms = (
            ("is side", f"Is {name} in front of me, on my left, on my right or behind me?", direction),
            ("which way", f"Which direction should I go to reach {name}?", _MOVE[direction]),
            ("where side", f"Where is {name} from here?", _PLACE[direction]),
            ("can reach", f"Can I get to {name} by going forward, left, right or backward?", _MOVE[direction]),
        )
        for question_type, question, answer in forms:
            asked.append(_ask(situation, question_type, question, (answer,), (target,), reason))
    return asked


def what_questions(situation: Situation) -> list[Question]:
    """What stands nearest in a direction, and what colour it is."""
    asked = []
    facts = situation.facts
    floor = [i for i in facts.ids if facts.on_floor(i)]
    for direction in DIRECTIONS:
        near = sorted((i for i in floor if situation.may_be_at(i, direction)), key=situation.distances.__getitem__)
        if not near or not situation.is_at(near[0], direction) or near[0] in situation.mentioned:
            continue
        target, place = near[0], _PLACE[direction]
        alone = len(near) == 1
        if not alone and situation.distances[near[1]] < situation.distances[target] + 0.3:
            continue
        if not facts.hidden(target):
            continue
        label, color = facts.label(target), facts.color(target)
        found = pointing(label, target)
        further = "nothing else stands there" if alone else f"the next one is {metres(situation.distances[near[1]])}"
        reason = (
            f"{place} the {found} is {metres(situation.distances[target])} meters away and {further}",
            f"the nearest thing {place} is the {color} {found}",
        )
        question = f"What is the nearest thing standing on the floor {place}?"
        asked.append(_ask(situation, "what", question, (label, f"{color} {label}"), (target,), reason))
        question = f"What color is the nearest thing standing on the floor {place}?"
        asked.append(_ask(situation, "what color", question, colour_answers(color), (target,), reason))
    return asked


def count_questions(situation: Situation) -> list[Question]:
    """How many of a kind are in a direction, and on which side there are more."""
    asked = []
    facts = situation.facts
    for noun, members in named_groups(facts).items():
        if len(members) < 2 or not facts.hidden(*members):
            continue
        plain = {name: _plainly_at(situation, members, name) for name in DIRECTIONS}
        for direction, there in plain.items():
            if there is None:
                continue
            place = _PLACE[direction]
            reason = (
                f"one by one, the room has {numbered(noun, members)}, I look at the direction of each",
                f"{pointing(counted(len(there), noun), *there)} can be found {place}",
            )
            question = f"How many {plural(noun)} are {place}?"
            answers = (number_word(len(there)), str(len(there)))
            asked.append(_ask(situation, "how many", question, answers, members, reason))
        left, right = plain["left"], plain["right"]
        if left is None or right is None or not (left or right):
            continue
        answer = "left" if len(left) > len(right) else "right" if len(left) < len(right) else "same"
        said = f"the numbers of {plural(noun)} are the same"
        if answer != "same":
            said = f"there are more {plural(noun)} on my {answer}"
        reason = (
            f"looking at every {pointing(noun, *members)}, there are {number_word(len(left))} on my left and"
            f" {number_word(len(right))} on my right",
            f"so {said}",
        )
        question = f"Are there more {plural(noun)} on my left, on my right, or the same number on both sides?"
        asked.append(_ask(situation, "are more", question, (answer,), members, reason))
    return asked


def _plainly_at(situation: Situation, members: Sequence[int], direction: str) -> list[int] | None:
    """Those of the members in a direction; None where one of them may or may not be."""
    there = [i for i in members if situation.is_at(i, direction)]
    doubtful = [i for i in members if situation.may_be_at(i, direction) and i not in there]
    return None if doubtful else there


def closest_questions(situation: Situation, rng: np.random.Generator) -> list[Question]:
    """Which of three named things is closest to me."""
    asked = []
    facts = situation.facts
    names = [i for i in facts.anchors if i not in situation.mentioned]
    for _ in range(4):
        if len(names) < 3:
            break
        three = [names[k] for k in rng.permutation(len(names))[:3]]
        near, second, far = sorted(three, key=situation.distances.__getitem__)
        if situation.distances[second] < situation.distances[near] + 0.4 or not facts.hidden(near):
            continue
        reason = (
            "in meters from me, from the nearest on, "
            + facts.measured({i: situation.distances[i] for i in (near, second, far)}),
            f"the closest one to me is {facts.pointed(near)}",
        )
        question = f"Which is closest to me, {joined([facts.anchors[i] for i in three], 'or')}?"
        answers = (facts.label(near), facts.anchors[near].removeprefix("the "))
        asked.append(_ask(situation, "which closest", question, answers, (near,), reason))
    return asked


def situated_questions(facts: RoomFacts, rng: np.random.Generator, num_situations: int = 8) -> list[Question]:
    """Questions from several poses of one room; a room without free floor or named things has none."""
    asked: list[Question] = []
    for _ in range(num_situations):
        situation = find_situation(facts, rng)
        if situation is None:
            continue
        asked += direction_questions(situation)
        asked += what_questions(situation)
        asked += count_questions(situation)
        asked += closest_questions(situation, rng)
    return asked
