"""What the small dual encoder learns from: rendered views of generated rooms, and phrases that say what they show.

A picture shows many objects, so a phrase is right or wrong for a picture on its own: right where an object that the
phrase names covers at least 0.2 % of the picture (100 of 224 x 224 pixels, counted by the renderer's point index),
wrong where none covers 0.05 %, and not asked in between.

Shapes: V views, S pixels a side, K objects of a room, P phrases, n pictures, A attributes (a noun with a colour, a
material, a size or nothing).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.rooms import Room, generate_room, room_seed, scene_id_of
from ..datasets.rooms.as_scene import room_as_scene
from ..datasets.rooms.questions import hidden_descriptions, room_questions
from ..datasets.rooms.relations import RoomFacts
from ..datasets.rooms.room import RoomObject
from ..datasets.rooms.words import colour_fits, plural
from ..models.view_cameras import place_cameras
from ..utils.labels import DETECTION_CLASSES, NYU40_NAMES, OTHERS
from ..utils.render import splat_batch

SHOWN, HINTED = 0.002, 0.0005  # shares of a picture from which an object is shown, and below which it is not
VIEW_SIZE = 224
_POINTS = 40_000
_VIEWS = 24  # of a room
_SAID_STREAM = 5  # name of a random stream
_NAMED = ("color", "material", "where", "stands on", "color count", "count")  # questions that name their target
_DESCRIPTIONS = 60  # of a room
_TEMPLATES = (
    "{}",
    "the {}",
    "a {}",
    "Where is the {}?",
    "What color is the {}?",
    "What is the {} made of?",
    "How many {s} are there?",
    "What is the {} standing on?",
    "find the {}.",
    "this is the {}.",
    "Is there a {} in the room?",
)

Attribute = tuple[str, str]  # noun and adjective ("" for none)


@dataclass(frozen=True)
class Phrase:
    """A text, and what an object must be for the text to be about it."""

    text: str
    attribute: Attribute


@dataclass(eq=False)
class RoomPictures:
    """Views of one room with the object that each pixel shows (-1 for none), and what has been said of the room."""

    room: Room
    images_VSS3: np.ndarray  # uint8
    owners_VSS: np.ndarray  # int16
    phrases: list[Phrase]  # descriptions and questions of the rooms' annotations


def nouns_of(thing: RoomObject, known: frozenset[str]) -> set[str]:
    """What an object may be called: its label, its class, and the end of its label where that is a `known` noun."""
    words = thing.label.split()
    ends = {" ".join(words[start:]) for start in range(1, len(words))} & known
    names = {thing.label, NYU40_NAMES[thing.nyu40], *ends}
    names |= {DETECTION_CLASSES[thing.class_id]} if thing.class_id != OTHERS else {"furniture"}
    return {name for name in names if not name.startswith("other")}


def fits(thing: RoomObject, attribute: Attribute, known: frozenset[str]) -> bool:
    """Whether an object is what an attribute says."""
    noun, adjective = attribute
    looks = adjective in ("", thing.material, thing.size_word) or colour_fits(adjective, thing.color)
    return looks and noun in nouns_of(thing, known)


def known_nouns(rooms: Sequence[Room]) -> frozenset[str]:
    """Labels and detection classes that rooms use."""
    return frozenset({thing.label for room in rooms for thing in room.objects} | set(DETECTION_CLASSES[:OTHERS]))


def attributes_of(thing: RoomObject, known: frozenset[str]) -> list[Attribute]:
    """Every attribute that fits an object, in a fixed order."""
    adjectives = {"", thing.material, thing.size_word, thing.color, thing.color.split()[-1]}
    return [(noun, adjective) for noun in sorted(nouns_of(thing, known)) for adjective in sorted(adjectives)]


def phrase_about(attribute: Attribute, generator: np.random.Generator) -> Phrase:
    """One wording of an attribute."""
    noun, adjective = attribute
    template = _TEMPLATES[int(generator.integers(len(_TEMPLATES)))]
    text = template.replace("{s}", f"{adjective} {plural(noun)}".strip())
    return Phrase(text.replace("{}", f"{adjective} {noun}".strip()), attribute)


def said_of(room: Room, generator: np.random.Generator) -> list[Phrase]:
    """Questions and descriptions of the rooms' annotations that name the object which they are about."""
    facts = RoomFacts(room)
    known = hidden_descriptions(facts)
    found = [
        (question.question, question.targets[0])
        for question in room_questions(facts, generator, known)
        if question.question_type in _NAMED
    ]
    described = [(text, target) for target in sorted(known) for one in known[target] for text in one.wordings]
    rows = generator.permutation(len(described))[:_DESCRIPTIONS]
    phrases = []
    for text, target in found + [described[row] for row in sorted(rows)]:
        thing = room.by_id(target)
        if thing.label in text or plural(thing.label) in text:
            colored = f"{thing.color} {thing.label}" in text or f"{thing.color} {plural(thing.label)}" in text
            phrases.append(Phrase(text, (thing.label, thing.color if colored else "")))
    return phrases


def picture_room(split: str, index: int, seed: int) -> RoomPictures:
    """Generate and render room `index` of a split ("train" or "val") of the rooms of a seed."""
    room = generate_room(scene_id_of(split, index), room_seed(seed, split, index), points_only=True)
    scene = room_as_scene(room, _POINTS)
    cameras = place_cameras(scene.points_N3, float(scene.origin_3[2]), _VIEWS, (VIEW_SIZE, VIEW_SIZE))
    renders = splat_batch(scene.points_N3, scene.colors_N3, cameras)
    return RoomPictures(
        room,
        images_VSS3=np.stack([render.color_HW3 for render in renders]),
        owners_VSS=np.stack([owner_map(render.index_HW, scene.instance_ids_N) for render in renders]),
        phrases=said_of(room, np.random.default_rng([room.seed, _SAID_STREAM])),
    )


def owner_map(index_HW: np.ndarray, instance_ids_N: np.ndarray) -> np.ndarray:
    """Object that each pixel of a splat shows [H, W] int16, -1 for structure and for nothing."""
    return np.where(index_HW >= 0, instance_ids_N[np.maximum(index_HW, 0)], -1).astype(np.int16)


def shares(owner_HW: np.ndarray, num_objects: int) -> np.ndarray:
    """Share [K] of a picture that each object covers."""
    return np.bincount(owner_HW.ravel().astype(np.int64) + 1, minlength=num_objects + 1)[1:] / owner_HW.size


def random_window(owner_SS: np.ndarray, generator: np.random.Generator) -> tuple[slice, slice]:
    """A square window of a view: at times all of it, else a part, half of these around an object that it shows."""
    size = len(owner_SS)
    if generator.random() < 0.3:
        return slice(0, size), slice(0, size)
    side = int(size * generator.uniform(0.3, 1.0))
    corner_2 = generator.integers(0, size - side + 1, 2)
    present = np.unique(owner_SS[owner_SS >= 0])
    if len(present) and generator.random() < 0.5:
        rows, columns = np.nonzero(owner_SS == present[generator.integers(len(present))])
        pixel = int(generator.integers(len(rows)))
        shift_2 = generator.integers(side // 4, side - side // 4, 2)
        corner_2 = np.clip([rows[pixel], columns[pixel]] - shift_2, 0, size - side)
    return slice(int(corner_2[0]), int(corner_2[0]) + side), slice(int(corner_2[1]), int(corner_2[1]) + side)
