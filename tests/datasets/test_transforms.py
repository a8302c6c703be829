"""Augmentation: boxes follow their points, whatever is drawn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.transforms import Augmentation, Transform, object_outlines
from threedr1.utils.boxes import points_in_boxes


def make_objects(seed: int, heading: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, instance ids and boxes (the points' extents, along each box's heading) of three objects."""
    rng = np.random.default_rng(seed)
    points, boxes = [], []
    for _ in range(3):
        centre_3, size_3 = rng.uniform(-3, 3, 3), rng.uniform(0.3, 2, 3)
        own_P3 = rng.uniform(-0.5, 0.5, (60, 3)) * size_3
        low_3, high_3 = own_P3.min(0), own_P3.max(0)
        cos, sin = math.cos(heading), math.sin(heading)
        turn_33 = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        points.append(own_P3 @ turn_33.T + centre_3)
        boxes.append([*(turn_33 @ ((low_3 + high_3) / 2) + centre_3), *(high_3 - low_3), heading])
    return np.concatenate(points).astype(np.float32), np.repeat(np.arange(3), 60), np.array(boxes, np.float32)


transforms = st.builds(
    Transform,
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    quarter_turns=st.integers(0, 3),
    angle=st.floats(-math.pi, math.pi),
    scale=st.floats(0.8, 1.2),
)


@settings(max_examples=40, deadline=None)
@given(transform=transforms, seed=st.integers(0, 100))
def test_refitted_boxes_are_the_extents_of_the_moved_points(transform, seed):
    points_N3, ids_N, boxes_K7 = make_objects(seed)
    moved_N3 = transform.points(points_N3)
    moved_K7 = transform.axis_aligned_boxes(boxes_K7, object_outlines(points_N3, ids_N, np.arange(3)))
    for object_id, box_7 in enumerate(moved_K7):
        own_P3 = moved_N3[ids_N == object_id]
        np.testing.assert_allclose(box_7[:3] - box_7[3:6] / 2, own_P3.min(0), atol=2e-5)
        np.testing.assert_allclose(box_7[:3] + box_7[3:6] / 2, own_P3.max(0), atol=2e-5)
        assert box_7[6] == 0


@settings(max_examples=40, deadline=None)
@given(transform=transforms, seed=st.integers(0, 100), heading=st.floats(-3, 3))
def test_oriented_boxes_keep_their_points_and_volume(transform, seed, heading):
    points_N3, ids_N, boxes_K7 = make_objects(seed, heading)
    moved_K7 = transform.oriented_boxes(boxes_K7)
    grown_K7 = moved_K7 + np.array([0, 0, 0, 1e-4, 1e-4, 1e-4, 0], np.float32)
    inside_NK = points_in_boxes(transform.points(points_N3), grown_K7).numpy()
    assert inside_NK[np.arange(len(ids_N)), ids_N].all()
    volume_K = boxes_K7[:, 3:6].prod(1) * transform.scale**3
    np.testing.assert_allclose(moved_K7[:, 3:6].prod(1), volume_K, rtol=1e-4)


def test_flips_and_quarter_turns_are_exact():
    box_K7 = np.array([[1.0, 2, 3, 0.5, 0.25, 1, 0]], np.float32)
    assert Transform(flip_x=True).axis_aligned_boxes(box_K7, [None]).tolist() == [[-1, 2, 3, 0.5, 0.25, 1, 0]]
    assert Transform(quarter_turns=1).axis_aligned_boxes(box_K7, [None]).tolist() == [[-2, 1, 3, 0.25, 0.5, 1, 0]]
    assert Transform(quarter_turns=2).points(box_K7[:, :3]).tolist() == [[-1, -2, 3]]
    assert np.array_equal(Transform().axis_aligned_boxes(box_K7, [None]), box_K7)


def test_objects_of_few_points_get_the_enclosing_box():
    box_K7 = np.array([[1.0, 0, 0, 1, 1, 1, 0]], np.float32)
    outlines = object_outlines(np.ones((5, 3), np.float32), np.zeros(5, np.int32), np.array([0]))
    assert outlines == [None]
    turned_7 = Transform(angle=math.pi / 4).axis_aligned_boxes(box_K7, outlines)[0]
    np.testing.assert_allclose(turned_7[[0, 1, 3, 4]], [math.sqrt(0.5), math.sqrt(0.5), math.sqrt(2), math.sqrt(2)])
    line_P3 = np.c_[np.linspace(0, 1, 30), np.zeros((30, 2))].astype(np.float32)
    outline_P2 = object_outlines(line_P3, np.zeros(30, np.int32), np.array([0]))[0]
    assert outline_P2 is not None and outline_P2[:, 0].max() == 1, "points on a line have no hull and are kept"


def test_draws_repeat_and_respect_the_switches():
    everything = Augmentation()
    assert everything.draw(np.random.default_rng(5)) == everything.draw(np.random.default_rng(5))
    nothing = Augmentation(flip_x=False, flip_y=False, quarter_turns=False, max_angle=0.0, scale=(1.0, 1.0))
    assert nothing.draw(np.random.default_rng(5)) == Transform()
    draws = [everything.draw(np.random.default_rng(seed)) for seed in range(60)]
    assert {draw.quarter_turns for draw in draws} == {0, 1, 2, 3}
    assert max(abs(draw.angle) for draw in draws) <= math.radians(5.0)
    assert all(0.9 <= draw.scale <= 1.1 for draw in draws)


def test_full_turns_are_drawn_evenly_and_their_quarters_counted():
    around = Augmentation(flip_x=False, flip_y=False, quarter_turns=False, max_angle=math.pi, scale=(1.0, 1.0))
    draws = [around.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert max(abs(draw.angle) for draw in draws) <= math.pi / 4 + 1e-9
    assert {draw.quarter_turns for draw in draws} == {0, 1, 2, 3}
    for seed, draw in enumerate(draws[:20]):
        rng = np.random.default_rng(seed)
        rng.random(2), rng.integers(4)
        angle = rng.uniform(-math.pi, math.pi)
        turned_13 = draw.points(np.array([[1.0, 0, 5]], np.float32))
        np.testing.assert_allclose(turned_13, [[math.cos(angle), math.sin(angle), 5]], atol=1e-6)


def test_a_turn_by_half_takes_a_boxs_margin_to_the_other_side():
    """The box reaches 0.5 beyond its points at the high x side alone."""
    points_N3 = np.stack(np.meshgrid([1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0]), -1).reshape(-1, 3)
    outlines = object_outlines(points_N3.astype(np.float32), np.zeros(24, np.int32), np.array([0]))
    box_K7 = np.array([[2.25, 1.5, 0.5, 2.5, 3, 1, 0]], np.float32)
    around = Augmentation(flip_x=False, flip_y=False, quarter_turns=False, max_angle=math.pi, scale=(1.0, 1.0))
    draws = [around.draw(np.random.default_rng(seed)) for seed in range(2000)]
    nearest = min(draws, key=lambda draw: abs(draw.angle) + 10 * (draw.quarter_turns != 2))
    assert abs(nearest.angle) < 0.01
    turned_7 = nearest.axis_aligned_boxes(box_K7, outlines)[0]
    np.testing.assert_allclose([turned_7[0] - turned_7[3] / 2, turned_7[0] + turned_7[3] / 2], [-3.5, -1], atol=0.06)


def test_no_boxes_stay_no_boxes():
    assert Transform(angle=0.1).axis_aligned_boxes(np.zeros((0, 7), np.float32), []).shape == (0, 7)
    with pytest.raises(ValueError, match="zip"):
        Transform(angle=0.1).axis_aligned_boxes(np.zeros((1, 7), np.float32), [])
