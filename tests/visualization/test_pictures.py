"""Pictures of rooms: what is on a wall is seen there."""

import numpy as np

from threedr1.datasets.scene import Scene, floor_centre
from threedr1.visualization.pictures import overview


def test_a_thing_on_a_surface_keeps_its_colour():
    """A red poster flat on a grey floor is as deep as the floor, and is not mixed with it."""
    across = np.linspace(-3, 3, 301)
    points_N3 = np.stack([*np.meshgrid(across, across), np.zeros((301, 301))], axis=-1).reshape(-1, 3)
    points_N3 = np.concatenate([points_N3, [[3, 3, 2.6]]]).astype(np.float32)
    red_N = (np.abs(points_N3[:, :2]) < 0.2).all(1)
    colors_N3 = np.where(red_N[:, None], [200, 0, 0], [120, 120, 120]).astype(np.uint8)
    nothing = np.zeros(0, dtype=np.int32)
    scene = Scene(
        scene_id="poster",
        points_N3=points_N3,
        colors_N3=colors_N3,
        instance_ids_N=np.full(len(points_N3), -1, np.int32),
        nyu40_N=np.zeros(len(points_N3), np.uint8),
        object_ids_K=nothing,
        object_labels=[],
        class_ids_K=nothing,
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=np.eye(4),
        origin_3=floor_centre(points_N3),
    )
    image_HW3, _ = overview(scene)
    shown = {tuple(color) for color in image_HW3.reshape(-1, 3).tolist()}
    assert shown == {(200, 0, 0), (120, 120, 120), tuple(image_HW3[0, 0].tolist())}
