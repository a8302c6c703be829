"""What the small dual encoder learns from: rendered views of generated rooms, and texts about their objects.

The renderer's point index says which object every pixel shows, so that each cell of a picture has a name and a colour
to learn. An object counts as shown by a picture from 0.2 % of it on (100 of 224 x 224 pixels), as not shown below
0.05 %.

Shapes: V views, S pixels a side, K objects of a room, L cells of a picture.
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
_DESCRIPTIONS = 60  # of a room
_WHOLE, _CROPPED = 0.4, 0.3  # shares of pictures that are all of a view, and those around one object
_CROP_PIXELS = 300  # an object must show so many, of 224 x 224, for a picture around it
_MARGIN = 0.15  # of a crop's side, around the object
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
    """A text, and the object that it is about."""

    text: str
    label: str
    color: str


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


def phrase_about(thing: RoomObject, known: frozenset[str], generator: np.random.Generator) -> Phrase:
    """One wording of an object, with or without something said of its looks."""
    nouns = sorted(nouns_of(thing, known))
    noun = nouns[int(generator.integers(len(nouns)))]
    looks = ("", "", thing.color, thing.color, thing.color.split()[-1], thing.material, thing.size_word)
    adjective = looks[int(generator.integers(len(looks)))]
    template = _TEMPLATES[int(generator.integers(len(_TEMPLATES)))]
    text = template.replace("{s}", f"{adjective} {plural(noun)}".strip())
    return Phrase(text.replace("{}", f"{adjective} {noun}".strip()), thing.label, thing.color)


def said_of(room: Room, generator: np.random.Generator) -> list[Phrase]:
    """Questions and descriptions of the rooms' annotations, with the object that each is about."""
    facts = RoomFacts(room)
    known = hidden_descriptions(facts)
    asked = room_questions(facts, generator, known)
    found = [(question.question, question.targets) for question in asked if question.targets]
    described = [(text, (target,)) for target in sorted(known) for one in known[target] for text in one.wordings]
    rows = generator.permutation(len(described))[:_DESCRIPTIONS]
    phrases = []
    for text, targets in found + [described[row] for row in sorted(rows)]:
        thing = meant(text, [room.by_id(target) for target in targets], room.objects)
        phrases.append(Phrase(text, thing.label, thing.color))
    return phrases


def meant(text: str, targets: Sequence[RoomObject], others: Sequence[RoomObject]) -> RoomObject:
    """The object that a picture for a text should show: the target that it names.

    Where it names none ("What is on the desk?"), what it does name stands by the target; else the first target.
    """
    for things in (targets, others):
        named = [thing for thing in things if thing.label in text or plural(thing.label) in text]
        if named:
            return max(named, key=lambda thing: (f"{thing.color} {thing.label}" in text, len(thing.label)))
    return targets[0]


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


def cell_owners(owner_SS: np.ndarray, cells: int) -> np.ndarray:
    """Object in the middle of each of `cells` x `cells` cells of a picture, [cells * cells], -1 for none."""
    rows, columns = (((np.arange(cells) + 0.5) * side / cells).astype(np.int64) for side in owner_SS.shape)
    return owner_SS[rows[:, None], columns].ravel()


def cell_weights(owner_L: np.ndarray) -> np.ndarray:
    """Weight [L] of cells, in which an object of n cells counts as root n ones, as does all that is no object."""
    count = np.bincount(owner_L.astype(np.int64) + 1)
    return (1 / np.sqrt(np.maximum(count, 1)))[owner_L + 1].astype(np.float32)


def random_window(owner_SS: np.ndarray, generator: np.random.Generator) -> tuple[slice, slice]:
    """A window of a view: all of it, the surroundings of one object that it shows, or a square anywhere."""
    size, kind = len(owner_SS), generator.random()
    present, count = np.unique(owner_SS[owner_SS >= 0], return_counts=True)
    large = present[count >= _CROP_PIXELS * (size / VIEW_SIZE) ** 2]
    if kind < _WHOLE:
        return slice(0, size), slice(0, size)
    if kind < _WHOLE + _CROPPED and len(large):
        return crop_window(owner_SS == large[generator.integers(len(large))])
    side = int(size * generator.uniform(0.3, 1.0))
    top, left = (int(corner) for corner in generator.integers(0, size - side + 1, 2))
    return slice(top, top + side), slice(left, left + side)


def crop_window(mask_HW: np.ndarray) -> tuple[slice, slice]:
    """The square (cut at the picture's border) around the set pixels of a mask, with some margin."""
    rows, columns = np.nonzero(mask_HW)
    low_2, high_2 = np.array([rows.min(), columns.min()]), np.array([rows.max(), columns.max()]) + 1
    half = (high_2 - low_2).max() * (0.5 + _MARGIN)
    middle_2 = (low_2 + high_2) / 2
    first_2 = np.maximum(np.floor(middle_2 - half).astype(int), 0)
    last_2 = np.minimum(np.ceil(middle_2 + half).astype(int), mask_HW.shape)
    return slice(int(first_2[0]), int(last_2[0])), slice(int(first_2[1]), int(last_2[1]))
