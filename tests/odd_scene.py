"""A scene far from the origin with one turned object: what a viewer that moves points and boxes apart gets wrong."""

import numpy as np

from threedr1.datasets.scene import Scene, floor_centre

MAGENTA = (255, 0, 255)
# centre, size, heading; world frame, metres. The room around it is 6 x 4 x 2.4 m.
BOX = [1235.5, -988.1, 55.6, 1.6, 0.7, 0.9, 0.6]
_ROOM = (np.array([1231.5, -990.1, 55.0]), np.array([1237.5, -986.1, 57.4]))


def raw_to_world() -> np.ndarray:
    """From a scan in centimetres, turned by 33 degrees about z and moved, to the world."""
    turn, scale = np.radians(33.0), 0.01
    matrix_44 = np.eye(4)
    matrix_44[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    matrix_44[:3, :3] *= scale
    matrix_44[:3, 3] = [1200.0, -1000.0, 55.0]
    return matrix_44


def on_box(box: list[float], step: float) -> np.ndarray:
    """Points [N, 3] on the surface of a box, its corners among them, written without the code under test."""
    sides = [np.linspace(-size / 2, size / 2, max(2, round(size / step) + 1)) for size in box[3:6]]
    grid_N3 = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
    skin_N3 = grid_N3[np.isclose(np.abs(grid_N3), np.array(box[3:6]) / 2, atol=1e-9).any(1)]
    x_N, y_N, z_N = skin_N3.T
    cos, sin = np.cos(box[6]), np.sin(box[6])
    return np.stack([cos * x_N - sin * y_N + box[0], sin * x_N + cos * y_N + box[1], z_N + box[2]], axis=1)


def odd_scene() -> Scene:
    """A grey floor and two grey walls, and a magenta box."""
    low_3, high_3 = _ROOM
    x, y, z = (np.linspace(low_3[axis], high_3[axis], 80) for axis in range(3))
    floor_N3 = np.stack(np.meshgrid(x, y, low_3[2:], indexing="ij"), axis=-1).reshape(-1, 3)
    wall_N3 = np.stack(np.meshgrid(x, high_3[1:2], z, indexing="ij"), axis=-1).reshape(-1, 3)
    side_N3 = np.stack(np.meshgrid(high_3[:1], y, z, indexing="ij"), axis=-1).reshape(-1, 3)
    object_N3 = on_box(BOX, 0.05)
    points_N3 = np.concatenate([floor_N3, wall_N3, side_N3, object_N3]).astype(np.float32)
    instance_ids_N = np.full(len(points_N3), -1, np.int32)
    instance_ids_N[-len(object_N3) :] = 4
    colors_N3 = np.full(points_N3.shape, 170, np.uint8)
    colors_N3[instance_ids_N == 4] = MAGENTA
    return Scene(
        scene_id="odd",
        points_N3=points_N3,
        colors_N3=colors_N3,
        instance_ids_N=instance_ids_N,
        nyu40_N=np.zeros(len(points_N3), np.uint8),
        object_ids_K=np.array([4], np.int32),
        object_labels=["trunk"],
        class_ids_K=np.array([17], np.int32),
        boxes_K7=np.array([BOX], np.float32),
        axis_align_44=raw_to_world(),
        origin_3=floor_centre(points_N3),
    )
