"""Questions about objects of held-out rooms, and how many pixels of each object a view shows.

Shapes: V views, K objects, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.rooms import Room, generate_room, room_seed, scene_id_of
from ..datasets.rooms.annotate import PER_ROOM
from ..datasets.rooms.as_scene import room_as_scene
from ..datasets.rooms.balance import choose
from ..datasets.rooms.questions import hidden_descriptions, room_questions
from ..datasets.rooms.relations import RoomFacts
from ..datasets.scene import Scene
from ..utils.render import Camera, look_at, pinhole, splat_batch

_FIELD_OF_VIEW = 75.0  # degrees, as the pool's


@dataclass(frozen=True)
class Asked:
    """A question and the rows of the objects that it is about; seeing any of them will do."""

    question: str
    targets: tuple[int, ...]


@dataclass(eq=False)
class AskedScene:
    """A scene and its questions by kind: `target`, of the rooms' annotations; `named`, `Where is the red chair?`."""

    scene: Scene
    questions: dict[str, list[Asked]]


def held_out_rooms(count: int, num_points: int, seed: int = 0) -> list[AskedScene]:
    """The first held-out rooms of a seed with their questions.

    `target` questions are those that the rooms' ScanQA annotations would ask (at most 12 a room, balanced over the
    rooms) about exactly one object.
    """
    rooms = [
        generate_room(scene_id_of("val", index), room_seed(seed, "val", index), points_only=True)
        for index in range(count)
    ]
    pools = {}
    for room in rooms:
        facts, generator = RoomFacts(room), np.random.default_rng(room.seed)
        pools[room.scene_id] = room_questions(facts, generator, hidden_descriptions(facts))
    chosen = choose(pools, PER_ROOM["qa"], np.random.default_rng(seed))
    found = []
    for room in rooms:
        own = [entry for entry in chosen if entry.scene_id == room.scene_id and len(entry.targets) == 1]
        questions = {"target": [Asked(entry.question, entry.targets) for entry in own], "named": _named(room)}
        found.append(AskedScene(room_as_scene(room, num_points), questions))
    return found


def _named(room: Room) -> list[Asked]:
    """`Where is the …?` for every colour and label of a room; all objects that are both are its targets."""
    looks = [(thing.color, thing.label) for thing in room.objects]
    return [
        Asked(
            f"Where is the {color} {label}?", tuple(row for row, other in enumerate(looks) if other == (color, label))
        )
        for color, label in sorted(set(looks))
    ]


def labelled_scene(scene: Scene) -> AskedScene:
    """A prepared scan with `Where is the …?` for every label."""
    labels = scene.object_labels
    asked = [
        Asked(f"Where is the {label}?", tuple(row for row, other in enumerate(labels) if other == label))
        for label in sorted(set(labels))
    ]
    return AskedScene(scene, {"named": asked})


def object_pixels(scene: Scene, cameras: Sequence[Camera]) -> np.ndarray:
    """Pixels [V, K] in which the renderer's index says that a point of an object is seen."""
    row_of = np.full(int(max(scene.instance_ids_N.max(), scene.object_ids_K.max())) + 2, -1)
    row_of[scene.object_ids_K] = np.arange(len(scene.object_ids_K))
    owner_N = row_of[scene.instance_ids_N]  # -1 reads the last entry, which is -1
    renders = splat_batch(scene.points_N3, scene.colors_N3, cameras, smooth=False)
    counts = []
    for render in renders:
        owner_L = owner_N[render.index_HW[render.index_HW >= 0]]
        counts.append(np.bincount(owner_L[owner_L >= 0], minlength=len(scene.object_ids_K)))
    return np.stack(counts)


def ring_views(scene: Scene, count: int, size: int) -> list[Camera]:
    """Cameras at eye height on a circle, all looking at the middle of the room: the usual horizontal baseline."""
    lower_3, upper_3 = scene.points_N3.min(0), scene.points_N3.max(0)
    middle_3 = np.array([*(lower_3 + upper_3)[:2] / 2, scene.origin_3[2] + 0.8])
    reach = 0.35 * float((upper_3 - lower_3)[:2].min())
    angles = np.arange(count) * 2 * np.pi / count
    eyes = [middle_3 + [reach * np.cos(angle), reach * np.sin(angle), 0.7] for angle in angles]
    return [Camera(look_at(eye_3, middle_3), pinhole(size, size, _FIELD_OF_VIEW), size, size) for eye_3 in eyes]


def top_down_views(scene: Scene, count: int, size: int) -> list[Camera]:
    """Cameras in two rows below the ceiling, all looking straight down."""
    lower_3, upper_3 = scene.points_N3.min(0).astype(float), scene.points_N3.max(0).astype(float)
    columns = -(-count // 2)
    along, across = (0, 1) if (upper_3 - lower_3)[0] >= (upper_3 - lower_3)[1] else (1, 0)
    cameras = []
    for number in range(count):
        eye_3 = np.array([0.0, 0.0, upper_3[2] - 0.05])
        for axis, share in ((along, (number % columns + 0.5) / columns), (across, (number // columns + 0.5) / 2)):
            eye_3[axis] = lower_3[axis] + share * (upper_3 - lower_3)[axis]
        cameras.append(Camera(look_at(eye_3, eye_3 - [0, 0, 1]), pinhole(size, size, _FIELD_OF_VIEW), size, size))
    return cameras
