"""Reads the generated English back and evaluates it on a room, independently of the code that wrote it.

Only the Room contract is used: labels, colours, boxes, support, visibility. Geometry is written again in numpy, with
the plain definitions (nearest surface, sign of a cross product) and no margins: a sentence that holds with the
generator's margins must hold here too, and for exactly one object.
"""

import re

import numpy as np

from threedr1.datasets.scene import floor_centre
from threedr1.utils.labels import DETECTION_CLASSES

NUMBERS = {
    word: number
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    )
}
MIDDLE = "as seen from the middle of the room"


def named(room, noun):
    """Ids of all objects that the noun may mean: its own label, labels ending in it, or its detection class."""
    return {
        thing.object_id
        for thing in room.objects
        if (" " + thing.label).endswith(" " + noun)
        or (noun in DETECTION_CLASSES[:-1] and DETECTION_CLASSES[thing.class_id] == noun)
    }


def head(room, words):
    """Ids that "red chair", "wooden chair" or "chair" may mean."""
    labels = sorted({thing.label for thing in room.objects}, key=len, reverse=True)
    noun = next((label for label in labels if words == label or words.endswith(" " + label)), None)
    assert noun is not None, f"no object is called {words!r}"
    ids, adjective = named(room, noun), words[: -len(noun)].strip()
    if not adjective:
        return ids
    return {
        i
        for i in ids
        if (thing := room.by_id(i)).material == adjective or (" " + thing.color).endswith(" " + adjective)
    }


def one(room, phrase):
    """The one object that "the red chair" means."""
    ids = head(room, phrase.removeprefix("the "))
    assert len(ids) == 1, f"{phrase!r} means {ids}"
    return room.by_id(next(iter(ids)))


def surface_distance(a, b):
    return np.linalg.norm(np.maximum(np.abs(a[:3] - b[:3]) - (a[3:6] + b[3:6]) / 2, 0))


def ground_distance(a, b):
    return np.linalg.norm(a[:2] - b[:2])


_MIDDLES = {}


def _middles(room):
    """(middle of the floor in the world frame, middle of the raw bounding box), from the vertices, cached."""
    key = room.scene_id, room.seed
    if key not in _MIDDLES:
        to_world = room.axis_align_44
        raw_V3 = (room.vertices_V3 - to_world[:3, 3]) @ np.linalg.inv(to_world[:3, :3]).T
        _MIDDLES[key] = np.asarray(floor_centre(room.vertices_V3))[:2], (raw_V3.min(0) + raw_V3.max(0)) / 2
    return _MIDDLES[key]


def middle(room):
    return _middles(room)[0]


def raw_middle(room):
    return _middles(room)[1]


def turn(room, thing, anchor):
    """Signed angle in degrees from the anchor to the thing, seen from the middle of the room; left is positive."""
    a, b = anchor.box_7[:2] - middle(room), thing.box_7[:2] - middle(room)
    return np.degrees(np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b))


def _extreme(room, ids, value, *, largest):
    ranked = sorted(ids, key=lambda i: value(room.by_id(i)), reverse=largest)
    return {ranked[0]}


def _size(word):
    if word in ("biggest", "smallest"):
        return lambda thing: float(np.prod(thing.box_7[3:6]))
    return lambda thing: float(thing.box_7[5])


def _superlative(room, word, words):
    return _extreme(room, head(room, words), _size(word), largest=word in ("biggest", "tallest"))


def _near(room, words, how, phrase):
    anchor = one(room, phrase)
    ids = head(room, words)
    if how in ("next to", "beside"):
        return {i for i in ids if surface_distance(room.by_id(i).box_7, anchor.box_7) < 0.6}
    far = "farthest" in how
    by_surface = _extreme(room, ids, lambda thing: surface_distance(thing.box_7, anchor.box_7), largest=far)
    by_centre = _extreme(room, ids, lambda thing: ground_distance(thing.box_7, anchor.box_7), largest=far)
    return by_surface | by_centre  # both senses of distance must agree on one object


def _side(room, words, word, phrase):
    sign = 1 if word == "left" else -1
    anchor = one(room, phrase)
    return {i for i in head(room, words) if 0 < sign * turn(room, room.by_id(i), anchor) < 100}


def _between(room, words, first, second):
    a, b = one(room, first).box_7[:2], one(room, second).box_7[:2]
    inside = set()
    for i in head(room, words):
        p = room.by_id(i).box_7[:2]
        share = (p - a) @ (b - a) / ((b - a) @ (b - a))
        beside = np.linalg.norm(p - a - share * (b - a))
        if 0.1 < share < 0.9 and beside < 0.6:
            inside.add(i)
    return inside


def _on(room, words, phrase):
    base = one(room, phrase)
    return {i for i in head(room, words) if room.by_id(i).support_id == base.object_id}


def _above(room, words, phrase):
    base = one(room, phrase).box_7
    over = set()
    for i in head(room, words):
        box = room.by_id(i).box_7
        beside = np.linalg.norm(np.maximum(np.abs(box[:2] - base[:2]) - (box[3:5] + base[3:5]) / 2, 0))
        if beside < 0.5 and box[2] - box[5] / 2 > base[2] + base[5] / 2 - 0.1:
            over.add(i)
    return over


def _carries(room, words, noun):
    carried = {room.by_id(i).support_id for i in named(room, noun) if not room.by_id(i).on_wall}
    return head(room, words) & carried


def _in_row(room, words, rank, side, phrase):
    anchor = one(room, phrase)
    order = sorted(head(room, words), key=lambda i: turn(room, room.by_id(i), anchor), reverse=side == "left")
    return {order[rank]}


_RANKS = {"first": 0, "second": 1, "third": 2}
_VIEW = r"when facing (?P<a>the .+) from the middle of the room"
_RULES = [
    (r"the only (?P<x>.+) in the room", lambda r, m: named(r, m["x"])),
    (r"the (?P<w>left|right)most (?P<x>.+) " + _VIEW, lambda r, m: _in_row(r, m["x"], 0, m["w"], m["a"])),
    (r"the (?P<x>.+) on the far (?P<w>left|right) " + _VIEW, lambda r, m: _in_row(r, m["x"], 0, m["w"], m["a"])),
    (
        r"the (?P<k>first|second|third) (?P<x>.+) from the (?P<w>left|right) " + _VIEW,
        lambda r, m: _in_row(r, m["x"], _RANKS[m["k"]], m["w"], m["a"]),
    ),
    (
        r"the (?P<w>biggest|smallest|tallest|shortest) (?P<x>.+?)(?: in the room)?",
        lambda r, m: _superlative(r, m["w"], m["x"]),
    ),
    (
        r"the (?P<x>.+?) (?:to the )?(?P<w>left|right) of (?P<a>the .+) " + MIDDLE,
        lambda r, m: _side(r, m["x"], m["w"], m["a"]),
    ),
    (
        r"the (?P<x>.+?) (?P<w>closest to|nearest to|farthest from|that is farthest away from|next to|beside)"
        r" (?P<a>the .+)",
        lambda r, m: _near(r, m["x"], m["w"], m["a"]),
    ),
    (
        r"the (?P<x>.+?) (?:in )?between (?P<a>the .+) and (?P<b>the .+)",
        lambda r, m: _between(r, m["x"], m["a"], m["b"]),
    ),
    (r"the (?P<x>.+?) (?:with|that has) an? (?P<y>.+) on it", lambda r, m: _carries(r, m["x"], m["y"])),
    (r"the (?P<x>.+?) (?:that hangs )?above (?P<a>the .+)", lambda r, m: _above(r, m["x"], m["a"])),
    (r"the (?P<x>.+?) (?:that is )?on (?P<a>the .+)", lambda r, m: _on(r, m["x"], m["a"])),
    (r"the (?P<x>.+) that is (?P<c>[a-z ]+)", lambda r, m: head(r, f"{m['c']} {m['x']}")),
    (r"the (?P<x>.+)", lambda r, m: head(r, m["x"])),
]


def meant(room, phrase):
    """Ids of all objects that a noun phrase may mean."""
    for pattern, rule in _RULES:
        match = re.fullmatch(pattern, phrase)
        if match:
            return rule(room, match)
    raise AssertionError(f"cannot read {phrase!r}")


_LEADS = r"(?:this is|find|it is|the object to look for is|choose|pick|select) "


def phrase_of(text):
    """The noun phrase of a description: the first sentence that, without its lead, begins with "the"."""
    for part in text.rstrip(".").split(". "):
        rest = re.sub("^" + _LEADS, "", part)
        if rest.startswith("the "):
            return rest
    raise AssertionError(f"no noun phrase in {text!r}")
