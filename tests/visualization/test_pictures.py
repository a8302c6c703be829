"""Pictures of rooms: all of a room is in them, and what lies on a surface is seen there."""

import itertools

import numpy as np
import pytest

from threedr1.datasets.scene import Scene, floor_centre
from threedr1.utils.camera import Camera, look_at, pinhole
from threedr1.visualization.palette import ANSWERED
from threedr1.visualization.pictures import fitting_distance, overview, scene_picture


def floor_with_a_poster() -> Scene:
    """Six metres by six, grey, with red in the middle, and a point 2.6 m above it."""
    across = np.linspace(-3, 3, 301)
    points_N3 = np.stack([*np.meshgrid(across, across), np.zeros((301, 301))], axis=-1).reshape(-1, 3)
    points_N3 = np.concatenate([points_N3, [[3, 3, 2.6]]]).astype(np.float32)
    red_N = (np.abs(points_N3[:, :2]) < 0.2).all(1)
    colors_N3 = np.where(red_N[:, None], [200, 0, 0], [120, 120, 120]).astype(np.uint8)
    nothing = np.zeros(0, dtype=np.int32)
    return Scene(
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


@pytest.mark.parametrize("size_3", [(4, 4, 2.6), (12, 2, 2.5), (3, 9, 2.5), (2, 2, 6), (40, 30, 4), (0.2, 0.3, 0.1)])
def test_the_room_fits_into_the_picture_and_fills_it(size_3):
    corners_83 = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * size_3
    forward_3 = np.array([0.6, 0.0, -0.8])
    distance = fitting_distance(corners_83, forward_3, 500.0, 640, 480)
    camera = Camera(look_at(-forward_3 * distance, np.zeros(3)), pinhole(640, 480, 65.24), 640, 480)
    assert camera.intrinsics_33[0, 0] == pytest.approx(500, abs=0.1)
    uv_82, depth_8 = camera.project(corners_83)
    assert (depth_8 > 0).all() and (uv_82 > 0).all() and (uv_82 < [639, 479]).all()
    margin = np.minimum(uv_82, [639, 479] - uv_82) / [640, 480]
    assert margin.min() < 0.03, "and no farther away than needs be"


def test_a_box_at_the_edge_of_the_room_or_beyond_is_in_the_picture():
    scene = floor_with_a_poster()
    for centre in ([-2.7, -2.7, 0.2], [3.8, 0, 0.5]):
        image_HW3 = scene_picture(scene, [([[*centre, 0.6, 0.6, 0.4, 0]], ANSWERED)])
        rows, columns = np.nonzero((image_HW3 == ANSWERED).all(-1))
        assert len(rows) > 50
        assert rows.min() > 1 and rows.max() < 478 and columns.min() > 1 and columns.max() < 638


@pytest.mark.parametrize("boxes", [[], [[-4, -4, 0.2, 0.6, 0.6, 0.4, 0]]], ids=["alone", "with a box outside"])
def test_near_walls_are_cut_away(boxes):
    scene = floor_with_a_poster()
    near = scene.points_N3[:, 0] < -2.9
    scene.colors_N3[near] = [0, 0, 200]
    shown = scene_picture(scene, [(boxes, ANSWERED)]).reshape(-1, 3)
    assert not (shown == [0, 0, 200]).all(-1).any() and (shown == [200, 0, 0]).all(-1).any()


def test_a_thing_on_a_surface_keeps_its_colour():
    """A red poster flat on a grey floor is as deep as the floor, and is not mixed with it."""
    scene = floor_with_a_poster()
    image_HW3, _ = overview(scene)
    shown = {tuple(color) for color in image_HW3.reshape(-1, 3).tolist()}
    assert shown == {(200, 0, 0), (120, 120, 120), tuple(image_HW3[0, 0].tolist())}
