"""Answers to questions and descriptions of known forms, worked out from labelled boxes; CannotTell for all others."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..rooms.words import counted, joined, number_word, plural
from .scene_reading import (
    SIDE_DEGREES,
    CannotTell,
    SceneReading,
    Thing,
    bearing_from,
    clear_winner,
    distance,
    hangs_above,
    is_between,
    list_things,
    stands_on,
)

ON_FLOOR = 0.10  # metres above the floor that a thing's bottom may be
IN_WALLS = frozenset({"door", "doorframe", "window", "curtain", "radiator"})  # reach the floor, yet stand not on it


@dataclass(frozen=True)
class Located:
    """A thing found, and how: what was looked at, and what settled it (parts of sentences)."""

    thing: Thing
    looked: str
    settled: str


@dataclass(frozen=True)
class Solution:
    """Two steps and the answer (a phrase without a full stop)."""

    first: str
    following: str
    answer: str


_LEAD = re.compile(
    r"^(?:it is|this is|there is|find|pick|choose|select|locate|the object to look for is|i am looking for)\s+"
)
_TAIL = re.compile(r"(?<!middle)\s+(?:in|of) the room$")
_SEEN = r" as seen from the middle of the room"
_SIZES: dict[str, tuple[str, Callable[[Thing], float], bool]] = {
    "tallest": ("height", lambda thing: thing.box[5], False),
    "shortest": ("height", lambda thing: thing.box[5], True),
    "biggest": ("longest side", lambda thing: max(thing.box[3:6]), False),
    "largest": ("longest side", lambda thing: max(thing.box[3:6]), False),
    "smallest": ("longest side", lambda thing: max(thing.box[3:6]), True),
}


def _meters(values: Sequence[float]) -> str:
    return joined([f"{value:.2f}" for value in values])


def _single(things: list[Thing], what: str) -> Thing:
    if len(things) != 1:
        raise CannotTell(f"{len(things)} things are {what}")
    return things[0]


def _looked(noun: str, pool: Sequence[Thing]) -> str:
    return f"the scene holds {counted(len(pool), noun)}: {list_things(pool)}"


def _by_distance(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    anchor = locate(scene, match["anchor"]).thing
    pool = [thing for thing in pool if thing is not anchor]
    near = not match["rel"].startswith("farthest")
    lengths = [distance(thing, anchor) for thing in pool]
    if not pool:
        raise CannotTell("there is nothing to compare")
    chosen = pool[clear_winner(lengths, smallest=near)]
    settled = (
        f"the distances from their centers to the {anchor.at} are {_meters(lengths)} meters, of which "
        f"{distance(chosen, anchor):.2f} meters is the {'smallest' if near else 'largest'}"
    )
    return Located(chosen, _looked(noun, pool), settled)


def _by_size(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    measure, value, smallest = _SIZES[match["size"]]
    values = [value(thing) for thing in pool]
    chosen = pool[clear_winner(values, smallest=smallest)]
    settled = (
        f"the {measure} of each of them, taken from the boxes in the same order, is {_meters(values)} meters, so that "
        f"the {match['size']} one measures {value(chosen):.2f} meters"
    )
    return Located(chosen, _looked(noun, pool), settled)


def _by_side(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    anchor = locate(scene, match["anchor"]).thing
    sign = 1 if match["side"] == "left" else -1
    pool = [thing for thing in pool if thing is not anchor]
    angles = [bearing_from(anchor, thing) * sign for thing in pool]
    low, high = SIDE_DEGREES
    if any(abs(angle) < low or abs(angle) > high for angle in angles):
        raise CannotTell("one stands neither left nor right")
    chosen = _single([thing for thing, angle in zip(pool, angles, strict=True) if angle > 0], "on that side")
    settled = (
        f"for someone in the middle of the room who faces the {anchor.at}, only one of them stands on the "
        f"{match['side']} hand, turned away by {bearing_from(anchor, chosen) * sign:.0f} degrees"
    )
    return Located(chosen, _looked(noun, pool), settled)


def _by_support(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    anchor = locate(scene, match["anchor"]).thing
    above = match["rel"].endswith("above")
    relation = hangs_above if above else stands_on
    chosen = _single([thing for thing in pool if relation(thing, anchor)], f"{match['rel']} the {anchor.label}")
    place = "wholly above" if above else "resting on"
    settled = (
        f"the heights and the places of the boxes show that exactly one of them is {place} the {anchor.at}, as its "
        f"bottom is {chosen.bottom:.2f} meters above the floor"
    )
    return Located(chosen, _looked(noun, pool), settled)


def _by_load(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    upper, loads = scene.pool(match["load"])
    carrying = [thing for thing in pool if any(stands_on(load, thing) for load in loads)]
    chosen = _single(carrying, f"under a {upper}")
    load = next(load for load in loads if stands_on(load, chosen))
    settled = f"the boxes show that exactly one of them carries a {upper} on it, which is the {load.at}"
    return Located(chosen, _looked(noun, pool), settled)


def _by_between(scene: SceneReading, match: re.Match[str]) -> Located:
    noun, pool = scene.pool(match["np"])
    start, end = (locate(scene, match[name]).thing for name in ("start", "end"))
    pool = [thing for thing in pool if thing not in (start, end)]
    chosen = _single([thing for thing in pool if is_between(thing, start, end)], "between the two")
    settled = (
        f"exactly one of them stands near the straight line that leads from the {start.at} to the {end.at}, and not "
        "at one of its ends"
    )
    return Located(chosen, _looked(noun, pool), settled)


_FORMS: list[tuple[re.Pattern[str], Callable[[SceneReading, re.Match[str]], Located]]] = [
    (re.compile(rf"(?P<np>.+?) (?:to the )?(?P<side>left|right) of (?P<anchor>.+?){_SEEN}"), _by_side),
    (re.compile(r"(?P<np>.+?) (?:that is )?(?:in )?between (?P<start>.+?) and (?P<end>.+)"), _by_between),
    (re.compile(r"(?P<np>.+?) (?:with|that has) (?P<load>.+?) on it"), _by_load),
    (
        re.compile(
            r"(?P<np>.+?) (?:that is )?(?P<rel>closest to|nearest to|next to|beside|farthest (?:away )?from) "
            r"(?P<anchor>.+)"
        ),
        _by_distance,
    ),
    (re.compile(r"(?P<np>.+?) (?:that )?(?P<rel>hangs above|is above|above|is on|on) (?P<anchor>.+)"), _by_support),
    (re.compile(rf"(?:the )?(?P<size>{'|'.join(_SIZES)}) (?P<np>.+)"), _by_size),
]


def locate(scene: SceneReading, phrase: str) -> Located:
    """The thing that a description means.

    Of several sentences the first one counts that boxes settle; colours and materials in the others they do not show.
    """
    refused: list[CannotTell] = []
    for part in phrase.strip().lower().rstrip(" .?!").split(". "):
        try:
            return _locate_by(scene, part.strip())
        except CannotTell as why:
            refused.append(why)
    raise refused[0]


def _locate_by(scene: SceneReading, words: str) -> Located:
    words = _TAIL.sub("", _LEAD.sub("", words))
    words = re.sub(r"^(?:the )?only ", "", words)
    for pattern, find in _FORMS:
        match = pattern.fullmatch(words)
        if match:
            return find(scene, match)
    thing = scene.only(words)
    settled = f"no other object in the list of this scene has that name, so that only the {thing.at} can be meant"
    return Located(thing, f"the scene holds one {thing.label} among its {len(scene.things)} labelled objects", settled)


def solve_grounding(scene: SceneReading, description: str) -> Solution:
    """Find the object that a sentence describes."""
    found = locate(scene, description)
    return Solution(f"the description asks for one object, and {found.looked}", found.settled, f"the {found.thing.at}")


def _count(scene: SceneReading, match: re.Match[str]) -> Solution:
    modifiers, noun = scene.noun_of(match["np"])
    if modifiers:
        raise CannotTell(f"boxes do not show what is {modifiers}")
    things = scene.named(noun)
    return Solution(
        f"the question asks for a number, so that all objects of the scene which are called {noun} have to be found",
        f"going through the list of labelled objects yields {list_things(things, 12)}, and each of them counts once",
        f"there {'is' if len(things) == 1 else 'are'} {counted(len(things), noun)}",
    )


def _compare_counts(scene: SceneReading, match: re.Match[str]) -> Solution:
    (one, ones), (other, others) = scene.pool(match["a"]), scene.pool(match["b"])
    verdict = "more" if len(ones) > len(others) else "fewer" if len(ones) < len(others) else "the same number of"
    return Solution(
        f"the question compares two numbers, so that both the {plural(one)} and the {plural(other)} are to be counted",
        f"the list of labelled objects holds {counted(len(ones), one)} and {counted(len(others), other)}, and "
        f"{number_word(len(ones))} is to be compared with {number_word(len(others))}",
        f"there are {verdict} {plural(one)} {'as' if verdict.startswith('the') else 'than'} {plural(other)}",
    )


def _closer(scene: SceneReading, match: re.Match[str]) -> Solution:
    anchor, one, other = (locate(scene, match[name]).thing for name in ("anchor", "a", "b"))
    lengths = [distance(one, anchor), distance(other, anchor)]
    chosen = (one, other)[clear_winner(lengths, smallest=True)]
    return Solution(
        f"the question compares two distances from the {anchor.at}, one to the {one.at} and one to the {other.at}",
        f"between the centers it is {lengths[0]:.2f} meters to the {one.label} and {lengths[1]:.2f} meters to the "
        f"{other.label}, and the smaller one decides",
        f"the {chosen.at}",
    )


def _tallest_of(scene: SceneReading, match: re.Match[str]) -> Solution:
    phrases = [part for part in re.split(r", | or ", match["list"]) if part]
    things = [locate(scene, phrase).thing for phrase in phrases]
    measure, value, smallest = _SIZES[match["size"]]
    values = [value(thing) for thing in things]
    chosen = things[clear_winner(values, smallest=smallest)]
    return Solution(
        f"the question compares the {measure} of {counted(len(things), 'object')}, which are the "
        f"{list_things(things)}",
        f"taken from the boxes in the same order, the {measure} of each is {_meters(values)} meters, and one value "
        "clearly stands out from the others",
        f"the {chosen.at}",
    )


def _what_is_on(scene: SceneReading, match: re.Match[str]) -> Solution:
    found = locate(scene, match["np"])
    chosen = _single([thing for thing in scene.things if stands_on(thing, found.thing)], "on it")
    return Solution(
        f"the question is about the {found.thing.at}, and {found.looked}",
        f"of all the labelled objects only one lies over it with its bottom, {chosen.bottom:.2f} meters above the "
        f"floor, where the top of the {found.thing.label} or one of its boards may carry it",
        f"the {chosen.at}",
    )


def _standing_on(scene: SceneReading, match: re.Match[str]) -> Solution:
    found = locate(scene, match["np"])
    chosen = _single([thing for thing in scene.things if stands_on(found.thing, thing)], "under it")
    return Solution(
        f"{found.looked}, and the question is about the {found.thing.at}",
        f"its bottom is {found.thing.bottom:.2f} meters above the floor, and the only labelled object below it that "
        f"may carry it there is the {chosen.at}",
        f"the {chosen.at}",
    )


def _on_floor(scene: SceneReading, *apart_from: Thing) -> list[Thing]:
    return [
        thing
        for thing in scene.things
        if thing not in apart_from and thing.label not in IN_WALLS and abs(thing.bottom) < ON_FLOOR
    ]


def _closest_on_floor(scene: SceneReading, match: re.Match[str]) -> Solution:
    anchor = locate(scene, match["anchor"]).thing
    pool = _on_floor(scene, anchor)
    if not pool:
        raise CannotTell("nothing else stands on the floor")
    flat = [math.dist(thing.box[:2], anchor.box[:2]) for thing in pool]
    chosen = pool[clear_winner(flat, smallest=True)]
    return Solution(
        f"the question asks what stands on the floor close to the {anchor.at}, and {counted(len(pool), 'object')} "
        "of this scene may be it, as their bottoms touch the floor",
        f"measured along the floor between the centers, the smallest distance is {min(flat):.2f} meters and the next "
        f"one is {sorted(flat)[1] if len(flat) > 1 else min(flat):.2f} meters",
        f"the {chosen.at}",
    )


def _between_on_floor(scene: SceneReading, match: re.Match[str]) -> Solution:
    start, end = (locate(scene, match[name]).thing for name in ("start", "end"))
    pool = _on_floor(scene, start, end)
    chosen = _single([thing for thing in pool if is_between(thing, start, end)], "between the two")
    return Solution(
        f"the question is about the floor between the {start.at} and the {end.at}, where one of "
        f"{counted(len(pool), 'object')} whose bottoms touch the floor may stand",
        f"the straight line from the {start.label} to the {end.label} is {distance(start, end):.2f} meters long, and "
        "exactly one object stands near it and not at one of its ends",
        f"the {chosen.at}",
    )


_QUESTIONS: list[tuple[re.Pattern[str], Callable[[SceneReading, re.Match[str]], Solution]]] = [
    (re.compile(r"how many (?P<np>.+?) (?:are|is) (?:there|in the room)(?: in the room)?"), _count),
    (re.compile(r"are there more (?P<a>.+?) than (?P<b>.+?)(?:, fewer, or the same number)?"), _compare_counts),
    (re.compile(r"which is closer to (?P<anchor>.+?), (?P<a>.+?) or (?P<b>.+)"), _closer),
    (re.compile(rf"which is the (?P<size>{'|'.join(_SIZES)}), (?P<list>.+)"), _tallest_of),
    (re.compile(r"what on the floor is closest to (?P<anchor>.+)"), _closest_on_floor),
    (re.compile(r"what on the floor is between (?P<start>.+?) and (?P<end>.+)"), _between_on_floor),
    (re.compile(r"what is on (?P<np>.+)"), _what_is_on),
    (re.compile(r"what is (?P<np>.+) standing on"), _standing_on),
]


def solve_question(scene: SceneReading, question: str) -> Solution:
    """Answer a question of a known form."""
    words = " ".join(question.lower().rstrip(" ?.").split())
    for pattern, solve in _QUESTIONS:
        match = pattern.fullmatch(words)
        if match:
            return solve(scene, match)
    raise CannotTell("no rule reads this form of question")
