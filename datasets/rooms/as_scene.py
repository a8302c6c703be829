"""A generated room as a prepared scene in memory, without going through files.

Shapes: V vertices, N points.
"""

import numpy as np

from ..scene import Scene, floor_centre
from .room import Room


def room_as_scene(room: Room, num_points: int) -> Scene:
    """The room as a scene of `num_points` of its vertices (all where it has fewer), without frames.

    Which ones follows from the room's seed. Object k of the room is row k of the scene's objects.
    """
    count = len(room.vertices_V3)
    pick = np.sort(np.random.default_rng(room.seed).choice(count, min(num_points, count), replace=False))
    return Scene(
        scene_id=room.scene_id,
        points_N3=room.vertices_V3[pick],
        colors_N3=room.colors_V3[pick],
        instance_ids_N=room.instance_V[pick],
        nyu40_N=room.nyu40_V[pick],
        object_ids_K=np.array([thing.object_id for thing in room.objects], dtype=np.int32),
        object_labels=[thing.label for thing in room.objects],
        class_ids_K=np.array([thing.class_id for thing in room.objects], dtype=np.int32),
        boxes_K7=np.stack([thing.box_7 for thing in room.objects]).astype(np.float32),
        axis_align_44=room.axis_align_44,
        origin_3=floor_centre(room.vertices_V3),
    )
