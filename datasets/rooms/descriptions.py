"""Descriptions that single out one object of a room, each with the reasoning that finds it.

`describe(facts, target)` lists every description that holds. The candidates are all objects that someone may call by
the target's label (`RoomFacts.rivals`); an adjective narrows them, a relation picks one of those that remain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .relations import (
    RoomFacts,
    is_above,
    is_beside,
    is_between,
    is_biggest,
    is_closest,
    is_farthest,
    is_on,
    is_on_side,
    is_shortest,
    is_smallest,
    is_tallest,
    order_from_left,
)
from .words import (
    colours_overlap,
    counted,
    joined,
    metres,
    ordinal_word,
    pointing,
    with_article,
)

FROM_MIDDLE = "as seen from the middle of the room"


@dataclass(frozen=True)
class Description:
    """One way to name exactly one object. `wordings` say the same; `steps` are First and Next of the reasoning, with
    marks behind the objects that they name (`words.pointing`)."""

    target: int
    label: str
    kind: str
    wordings: tuple[str, ...]  # noun phrases: "the red chair closest to the bed"
    candidates: tuple[int, ...]  # objects of the target's name, itself included
    distractors: int  # other objects with exactly the target's label
    steps: tuple[str, str]
    anchors: tuple[int, ...] = ()
    uses_color: bool = False
    uses_size: bool = False

    @property
    def this(self) -> str:
        """What the reasoning calls the target once it is found: "this chair", with its mark."""
        return pointing(f"this {self.label}", self.target)

    @property
    def phrase(self) -> str:
        return self.wordings[0]


@dataclass(frozen=True)
class _Pool:
    """Candidates after the adjective: the head noun phrase, who remains, and the reasoning so far."""

    target: int
    head: str  # "red chair"
    noun: str  # "chair"
    members: tuple[int, ...]
    candidates: tuple[int, ...]
    first: str
    narrowed: str = ""  # "two of them are red"
    adjective: str = ""

    @cached_property
    def rest(self) -> tuple[int, ...]:
        return tuple(i for i in self.members if i != self.target)


def candidate_step(facts: RoomFacts, target: int) -> str:
    """The reasoning's first step: who may be meant, in numbers and colours."""
    rivals = facts.rivals(target)
    noun = facts.family_noun(target)
    if len(rivals) == 1:
        return f"the room has only one {pointing(noun, target)}, {with_article(facts.color(target))} one"
    if not facts.is_one_kind(target):
        kinds: dict[str, list[int]] = {}
        for i in sorted(rivals, key=facts.label):
            kinds.setdefault(facts.label(i), []).append(i)
        return f"the room has {joined([pointing(counted(len(its), label), *its) for label, its in kinds.items()])}"
    return f"by color, the room has {facts.by_color(noun, rivals)}"


def describe(facts: RoomFacts, target: int) -> list[Description]:
    """Every description of one object that holds, in a fixed order."""
    rivals = facts.rivals(target)
    label, color = facts.label(target), facts.color(target)
    everyone = _Pool(target, label, label, tuple(rivals), tuple(rivals), candidate_step(facts, target))
    if len(rivals) == 1:
        return list(_unique(facts, everyone))
    found = [*_attributes(facts, everyone), *_relations(facts, everyone)]
    alike = facts.coloured(rivals, color)
    # A colour that leaves everyone or only the target adds nothing to a relation.
    if 1 < len(alike) < len(rivals):
        narrowed = f"those that are {color} are {joined([pointing(facts.label(i), i) for i in alike])}"
        pool = _Pool(target, f"{color} {label}", label, tuple(alike), tuple(rivals), everyone.first, narrowed, color)
        found += _relations(facts, pool)
    return found


def _make(
    facts: RoomFacts,
    pool: _Pool,
    kind: str,
    wordings: Sequence[str],
    reason: str,
    *,
    anchors: tuple[int, ...] = (),
    uses_color: bool = False,
    uses_size: bool = False,
) -> Description:
    return Description(
        target=pool.target,
        label=facts.label(pool.target),
        kind=f"color+{kind}" if pool.adjective else kind,
        wordings=tuple(wordings),
        candidates=pool.candidates,
        distractors=len(facts.same_label(pool.target)) - 1,
        steps=(pool.first, f"{pool.narrowed} and {reason}" if pool.narrowed else reason),
        anchors=anchors,
        uses_color=uses_color or bool(pool.adjective),
        uses_size=uses_size,
    )


def _unique(facts: RoomFacts, pool: _Pool) -> Iterator[Description]:
    away = metres(facts.from_middle(pool.target))
    reason = f"it is {away} meters from the middle of the room and no other object has this name"
    yield _make(facts, pool, "unique", (f"the {pool.noun}", f"the only {pool.noun} in the room"), reason)
    colored = f"the {facts.color(pool.target)} {pool.noun}"
    yield _make(facts, pool, "unique", (colored,), reason, uses_color=True)


def _attributes(facts: RoomFacts, pool: _Pool) -> Iterator[Description]:
    """The only one of its colour. Nothing in a scan tells what a thing is made of, so no description goes by that."""
    thing = facts.objects[pool.target]
    if not any(colours_overlap(thing.color, facts.color(i)) for i in pool.rest):
        reason = f"only one of them is {thing.color}, it is {metres(facts.from_middle(pool.target))} meters"
        reason += " from the middle of the room"
        wordings = (f"the {thing.color} {pool.noun}", f"the {pool.noun} that is {thing.color}")
        yield _make(facts, pool, "color", wordings, reason, uses_color=True)


def _relations(facts: RoomFacts, pool: _Pool) -> list[Description]:
    found = [*_sizes(facts, pool), *_supports(facts, pool)]
    outside = [i for i in facts.anchors if i not in pool.candidates]
    for anchor in outside:
        found += _near(facts, pool, anchor)
        found += _sides(facts, pool, anchor)
        found += _vertical(facts, pool, anchor)
        found += _ordinal(facts, pool, anchor)
    for index, start in enumerate(outside):
        for end in outside[index + 1 :]:
            if is_between(facts, pool.target, pool.rest, start, end):
                found.append(_between(facts, pool, start, end))
    return found


_SUPERLATIVES: tuple[tuple[str, Callable[[RoomFacts, int, Sequence[int]], bool]], ...] = (
    ("biggest", is_biggest),
    ("smallest", is_smallest),
    ("tallest", is_tallest),
    ("shortest", is_shortest),
)


def _sizes(facts: RoomFacts, pool: _Pool) -> Iterator[Description]:
    for word, is_extreme in _SUPERLATIVES:
        if not is_extreme(facts, pool.target, pool.rest):
            continue
        if word in ("biggest", "smallest"):
            reason = f"comparing the space that each takes up, one is clearly the {word}"
        else:
            heights = sorted((facts.boxes[i][5] for i in pool.members), reverse=word == "tallest")
            reason = f"comparing their heights, one is {heights[0]:.2f} meters high and the next {heights[1]:.2f}"
        wordings = (f"the {word} {pool.head}", f"the {word} {pool.head} in the room")
        yield _make(facts, pool, word, wordings, reason, uses_size=True)


def _supports(facts: RoomFacts, pool: _Pool) -> Iterator[Description]:
    """The one that carries something: "the desk with a lamp on it"."""
    for label in sorted({facts.label(i) for i in facts.supported[pool.target]}):
        if any(facts.label(j).endswith(label) for i in pool.rest for j in facts.supported[i]):
            continue
        thing = with_article(label)
        wordings = (f"the {pool.head} with {thing} on it", f"the {pool.head} that has {thing} on it")
        carried = next(i for i in facts.supported[pool.target] if facts.label(i) == label)
        reason = f"looking at what stands on them, {pointing(thing, carried)} is on one and on none of the others"
        yield _make(facts, pool, "carries", wordings, reason, anchors=(carried,))


def _near(facts: RoomFacts, pool: _Pool, anchor: int) -> Iterator[Description]:
    """Closest to, farthest from, next to an anchor."""
    name, pointed = facts.anchors[anchor], facts.pointed(anchor)
    away = {i: facts.planar[i][anchor] for i in sorted(pool.members, key=lambda i: facts.planar[i][anchor])}
    listed = [f"{pointing(f'the {facts.label(i)}', i)} {metres(value)}" for i, value in away.items()]
    if is_closest(facts, pool.target, pool.rest, anchor):
        wordings = (f"the {pool.head} closest to {name}", f"the {pool.head} nearest to {name}")
        shown = joined([*listed[:4], *(["the others more"] if len(listed) > 4 else [])])
        reason = f"in meters from {pointed}, from the nearest on, {shown}"
        yield _make(facts, pool, "closest", wordings, reason, anchors=(anchor,))
    if is_farthest(facts, pool.target, pool.rest, anchor):
        wordings = (f"the {pool.head} farthest from {name}", f"the {pool.head} that is farthest away from {name}")
        shown = joined([*listed[:-5:-1], *(["the others less"] if len(listed) > 4 else [])])
        reason = f"in meters from {pointed}, from the farthest on, {shown}"
        yield _make(facts, pool, "farthest", wordings, reason, anchors=(anchor,))
    if is_beside(facts, pool.target, pool.rest, anchor):
        wordings = (f"the {pool.head} next to {name}", f"the {pool.head} beside {name}")
        others = metres([*away.values()][1])
        reason = f"one is right beside {pointed}, the others are {others} meters or more away from it"
        yield _make(facts, pool, "next to", wordings, reason, anchors=(anchor,))


def _sides(facts: RoomFacts, pool: _Pool, anchor: int) -> Iterator[Description]:
    name = facts.anchors[anchor]
    for word, sign in (("left", 1), ("right", -1)):
        if is_on_side(facts, pool.target, pool.rest, anchor, sign):
            wordings = (
                f"the {pool.head} {word} of {name} {FROM_MIDDLE}",
                f"the {pool.head} to the {word} of {name} {FROM_MIDDLE}",
            )
            reason = f"facing {facts.pointed(anchor)} from the middle of the room, just one is on its {word} side"
            yield _make(facts, pool, f"{word} of", wordings, reason, anchors=(anchor,))


def _vertical(facts: RoomFacts, pool: _Pool, anchor: int) -> Iterator[Description]:
    name = facts.anchors[anchor]
    if is_on(facts, pool.target, pool.rest, anchor):
        wordings = (f"the {pool.head} on {name}", f"the {pool.head} that is on {name}")
        reason = f"looking at {facts.pointed(anchor)}, one of them is on it and the others are elsewhere"
        yield _make(facts, pool, "on", wordings, reason, anchors=(anchor,))
    if is_above(facts, pool.target, pool.rest, anchor):
        wordings = (f"the {pool.head} above {name}", f"the {pool.head} that hangs above {name}")
        reason = f"looking up from {facts.pointed(anchor)}, one of them is above it and the others are elsewhere"
        yield _make(facts, pool, "above", wordings, reason, anchors=(anchor,))


def _between(facts: RoomFacts, pool: _Pool, start: int, end: int) -> Description:
    names = f"{facts.anchors[start]} and {facts.anchors[end]}"
    wordings = (f"the {pool.head} between {names}", f"the {pool.head} in between {names}")
    reason = f"on the line from {facts.pointed(start)} to {facts.pointed(end)} there is just one of them"
    return _make(facts, pool, "between", wordings, reason, anchors=(start, end))


def _ordinal(facts: RoomFacts, pool: _Pool, anchor: int) -> Iterator[Description]:
    if not 3 <= len(pool.members) <= 6:
        return
    order = order_from_left(facts, pool.members, anchor)
    if order is None:
        return
    name = facts.anchors[anchor]
    rank = order.index(pool.target)
    from_right = len(order) - 1 - rank
    view = f"when facing {name} from the middle of the room"
    if rank == 0 or from_right == 0:
        word = "left" if rank == 0 else "right"
        wordings = (f"the {word}most {pool.head} {view}", f"the {pool.head} on the far {word} {view}")
    else:
        word, place = ("left", rank) if rank <= from_right else ("right", from_right)
        wordings = (f"the {ordinal_word(place)} {pool.head} from the {word} {view}",)
    shown = joined([pointing(f"{facts.color(i)} {facts.label(i)}", i) for i in order])
    reason = f"facing {facts.pointed(anchor)} from the middle of the room, they stand from left to right: {shown}"
    yield _make(facts, pool, "ordinal", wordings, reason, anchors=(anchor,))
