"""Generated rooms as prepared scenes of as many points as asked for, for benchmarks that need no data.

Shapes: V vertices of a room, N points, K objects.
"""

from pathlib import Path

import numpy as np

from ..datasets.rooms import generate_room
from ..datasets.scene import Scene, floor_centre, save_scene


def room_scene(number: int, num_points: int, rng: np.random.Generator) -> Scene:
    """Room `number` as a scene of exactly `num_points` points, as `prepare` keeps of a real scan, without frames.

    They are vertices at random, every one before any comes again, moved by a millimetre, so that no two are equal.
    """
    room = generate_room(f"scene{number:04d}_00", number)
    pick_N = rng.permutation(len(room.vertices_V3))[np.arange(num_points) % len(room.vertices_V3)]
    points_N3 = (room.vertices_V3[pick_N] + rng.normal(0, 0.001, (num_points, 3))).astype(np.float32)
    return Scene(
        scene_id=room.scene_id,
        points_N3=points_N3,
        colors_N3=room.colors_V3[pick_N],
        instance_ids_N=room.instance_V[pick_N].astype(np.int32),
        nyu40_N=room.nyu40_V[pick_N],
        object_ids_K=np.array([thing.object_id for thing in room.objects], np.int32),
        object_labels=[thing.label for thing in room.objects],
        class_ids_K=np.array([thing.class_id for thing in room.objects], np.int32),
        boxes_K7=np.stack([thing.box_7 for thing in room.objects]),
        axis_align_44=room.axis_align_44,
        origin_3=floor_centre(points_N3),
    )


def write_rooms(root: Path, count: int, num_points: int) -> None:
    """A data root of prepared rooms, all in split `train`."""
    scenes = [room_scene(number, num_points, np.random.default_rng(number)) for number in range(count)]
    for scene in scenes:
        save_scene(scene, root / "prepared" / f"{scene.scene_id}.npz")
    names = "".join(f"{scene.scene_id}\n" for scene in scenes)
    (root / "scannetv2_train.txt").write_text(names, encoding="utf-8")
