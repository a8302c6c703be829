"""Reading a scene by its labelled boxes: which things a phrase may mean, and what is true of where they stand.

Everything is in the model frame, metres: the origin is the middle of the floor, "the middle of the room". A
superlative holds only with a margin, so that another sensible definition of distance would give the same thing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...utils.text import format_box
from ..rooms.words import counted, joined, plural
from ..scene_store import SceneInfo

MARGIN_SHARE, MARGIN = 0.10, 0.10  # a winner leads by a tenth and by 10 cm
TOUCH = 0.12  # metres between surfaces that still count as touching
SIDE_DEGREES = (8.0, 172.0)
# no words of a plain name: a phrase that holds one says where a thing is, in a way that no rule read
_RELATIONS = re.compile(
    r"\b(?:the|to|of|from|that|with|on|in|at|by|under|above|below|behind|beside|near|between|when)\b"
)
_ARTICLES = re.compile(r"^(?:(?:the|a|an|this|that|any|all|of|its)\s+)+")


@dataclass(frozen=True)
class Thing:
    """A labelled object. `box` is centre and size and heading, model frame."""

    object_id: int
    label: str
    box: tuple[float, ...]

    @property
    def at(self) -> str:
        """Its label and its box, as an answer writes them."""
        return f"{self.label} {format_box(self.box)}"

    @property
    def bottom(self) -> float:
        return self.box[2] - self.box[5] / 2

    @property
    def top(self) -> float:
        return self.box[2] + self.box[5] / 2


class CannotTell(Exception):
    """The labelled boxes do not settle the question."""


def distance(first: Thing, second: Thing) -> float:
    """Between centres."""
    return math.dist(first.box[:3], second.box[:3])


def clear_winner(values: Sequence[float], *, smallest: bool) -> int:
    """Index of the smallest or largest value; CannotTell where the runner-up comes close."""
    order = sorted(range(len(values)), key=lambda index: values[index], reverse=not smallest)
    if len(order) > 1:
        lead = abs(values[order[0]] - values[order[1]])
        if lead < max(MARGIN, MARGIN_SHARE * max(abs(values[order[0]]), abs(values[order[1]]))):
            raise CannotTell("two are almost equal")
    return order[0]


def overlap_flat(first: Thing, second: Thing) -> bool:
    """Whether the first one's centre lies over the second one's footprint."""
    return all(abs(first.box[a] - second.box[a]) <= second.box[a + 3] / 2 for a in (0, 1))


def stands_on(upper: Thing, lower: Thing) -> bool:
    """Whether one thing rests on another: over its footprint, its bottom at the other's top or inside (a shelf)."""
    rests = lower.bottom + 0.2 * lower.box[5] < upper.bottom <= lower.top + TOUCH
    return upper is not lower and rests and overlap_flat(upper, lower)


def hangs_above(upper: Thing, lower: Thing) -> bool:
    """Whether one thing is wholly above another, and beside it by 30 cm at most on the floor plane."""
    gaps = [abs(upper.box[a] - lower.box[a]) - (upper.box[a + 3] + lower.box[a + 3]) / 2 for a in (0, 1)]
    return upper.bottom >= lower.top - 0.02 and max(gaps) < 0.3


def bearing_from(anchor: Thing, thing: Thing) -> float:
    """Degrees from the anchor to the thing seen from the middle of the room; positive is left."""
    if min(math.hypot(*one.box[:2]) for one in (anchor, thing)) < 0.3:
        raise CannotTell("too close to the middle of the room for a side")
    angle = math.atan2(thing.box[1], thing.box[0]) - math.atan2(anchor.box[1], anchor.box[0])
    return math.degrees(math.remainder(angle, 2 * math.pi))


def is_between(thing: Thing, start: Thing, end: Thing) -> bool:
    """Whether a thing stands near the line from one thing to another, away from its ends (floor plane)."""
    ax, ay = (end.box[a] - start.box[a] for a in (0, 1))
    bx, by = (thing.box[a] - start.box[a] for a in (0, 1))
    length = math.hypot(ax, ay)
    if length < 0.5:
        return False
    along, aside = (ax * bx + ay * by) / length**2, abs(ax * by - ay * bx) / length
    return 0.15 < along < 0.85 and aside < min(0.5, 0.35 * length)


class SceneReading:
    """A scene's things by the words that people use for them."""

    def __init__(self, info: SceneInfo):
        boxes_K7 = info.to_model(info.boxes_K7).tolist()
        self.things = [
            Thing(int(object_id), label, tuple(box_7))
            for object_id, label, box_7 in zip(info.object_ids_K, info.object_labels, boxes_K7, strict=True)
        ]
        # "chair" means office chairs as well; "office chair" is the longer name and is tried first
        nouns = {thing.label for thing in self.things} | {thing.label.split()[-1] for thing in self.things}
        self._forms = {form: noun for noun in nouns for form in (noun, plural(noun))}

    def noun_of(self, phrase: str) -> tuple[str, str]:
        """A phrase taken apart into modifiers and the noun it ends with; CannotTell for an unknown noun."""
        words = _ARTICLES.sub("", phrase.strip().lower().rstrip(".?!,"))
        found = [form for form in self._forms if words == form or words.endswith(" " + form)]
        if not found:
            raise CannotTell(f"nothing is labelled like {words!r}")
        form = max(found, key=len)
        modifiers = words[: len(words) - len(form)].strip()
        if _RELATIONS.search(modifiers):
            raise CannotTell(f"no rule reads {words!r}")
        return modifiers, self._forms[form]

    def named(self, noun: str) -> list[Thing]:
        """Things with a label, or with a longer label that ends with it."""
        return [thing for thing in self.things if thing.label == noun or thing.label.endswith(" " + noun)]

    def pool(self, phrase: str) -> tuple[str, list[Thing]]:
        """Noun and things of a phrase; CannotTell where it has a colour or the like, which boxes do not show."""
        modifiers, noun = self.noun_of(phrase)
        things = self.named(noun)
        if modifiers and len(things) > 1:
            raise CannotTell(f"boxes do not show what is {modifiers}")
        return noun, things

    def only(self, phrase: str) -> Thing:
        """The one thing that a phrase means; CannotTell where several answer to it."""
        noun, things = self.pool(phrase)
        if len(things) != 1:
            raise CannotTell(f"there are {counted(len(things), noun)}")
        return things[0]


def list_things(things: Sequence[Thing], shown: int = 6) -> str:
    """Such as "chair <box>…</box> and chair <box>…</box>"; the first few of many."""
    listed = [thing.at for thing in things[:shown]]
    if len(things) > shown:
        listed.append(f"{len(things) - shown} more")
    return joined(listed)
