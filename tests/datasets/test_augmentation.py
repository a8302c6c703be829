"""What augmentation takes out of a scene or changes in it: points, boxes and targets stay of one mind."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.augmentation import (
    SceneAugmentation,
    change_colors,
    cut_objects,
    drop_objects,
    jitter_points,
    random_cuboids,
)
from threedr1.datasets.scene import Scene, floor_centre
from threedr1.datasets.transforms import Augmentation, Transform, object_outlines

STILL = Augmentation(flip_x=False, flip_y=False, quarter_turns=False, max_angle=0.0, scale=(1.0, 1.0))
AROUND = dataclasses.replace(STILL, max_angle=math.pi)


def make_scene(seed: int, *, walls: bool = True) -> Scene:
    """Objects 0, 2, 4 ... of 80 points each whose boxes are their extents; with walls, points of no object as well."""
    rng = np.random.default_rng(seed)
    count = 6
    center_K13, size_K13 = rng.uniform([-3, -3, 0.3], [3, 3, 1.5], (count, 1, 3)), rng.uniform(0.3, 2, (count, 1, 3))
    own_KP3 = (center_K13 + size_K13 * rng.uniform(-0.5, 0.5, (count, 80, 3))).astype(np.float32)
    around_N3 = rng.uniform([-4, -4, 0], [4, 4, 2.5], (300 if walls else 0, 3)).astype(np.float32)
    points_N3 = np.concatenate([own_KP3.reshape(-1, 3), around_N3])
    low_K3, high_K3 = own_KP3.min(1), own_KP3.max(1)
    order_N = rng.permutation(len(points_N3))
    ids_N = np.concatenate([np.repeat(2 * np.arange(count), 80), np.full(len(around_N3), -1)])
    return Scene(
        scene_id="scene0000_00",
        points_N3=points_N3[order_N],
        colors_N3=rng.integers(256, size=points_N3.shape, dtype=np.uint8),
        instance_ids_N=ids_N[order_N].astype(np.int32),
        nyu40_N=np.zeros(len(ids_N), np.uint8),
        object_ids_K=2 * np.arange(count, dtype=np.int32),
        object_labels=["thing"] * count,
        class_ids_K=np.arange(count, dtype=np.int32),
        boxes_K7=np.c_[(low_K3 + high_K3) / 2, high_K3 - low_K3, np.zeros(count)].astype(np.float32),
        axis_align_44=np.eye(4),
        origin_3=floor_centre(points_N3),
    )


def outlines_of(scene: Scene):
    return object_outlines(scene.to_model(scene.points_N3), scene.instance_ids_N, scene.object_ids_K)


# ---- random cuboid


def test_a_cuboid_of_full_sides_keeps_half_the_extent_around_a_point():
    """On a line of 11 points a box as long as the line keeps what is within 5 of its centre, a point."""
    points_N3 = np.c_[np.arange(11.0), np.zeros((11, 2))].astype(np.float32)
    expected = {tuple(np.abs(np.arange(11) - center) <= 5) for center in range(11)}
    masks = [
        tuple(mask_N)
        for seed in range(20)
        for mask_N in random_cuboids(points_N3, np.random.default_rng(seed), min_share=1.0, min_points=1)
    ]
    assert set(masks) == expected and len(masks) == 1000
    large = random_cuboids(points_N3, np.random.default_rng(0), min_share=1.0, min_points=10)
    assert {sum(mask_N) for mask_N in large} == {10, 11}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), min_share=st.floats(0.2, 1), min_points=st.integers(1, 300))
def test_cuboids_are_boxes_of_the_sides_and_points_asked_for(seed, min_share, min_points):
    points_N3 = np.random.default_rng(seed).uniform(-1, 1, (500, 3)).astype(np.float32) * np.float32([4, 3, 1])
    extent_3 = np.ptp(points_N3, axis=0)
    for mask_N in random_cuboids(points_N3, np.random.default_rng(seed), min_share=min_share, min_points=min_points):
        low_3, high_3 = points_N3[mask_N].min(0), points_N3[mask_N].max(0)
        within_N = ((points_N3 >= low_3) & (points_N3 <= high_3)).all(1)
        assert np.array_equal(within_N, mask_N), "nothing between the points kept is left out"
        assert mask_N.sum() >= min_points
        # what is inside the smallest box allowed around some point is inside
        gaps_N3 = np.abs(points_N3[:, None] - points_N3[None]) <= min_share * extent_3 / 2 - 1e-5
        assert (gaps_N3.all(2) <= mask_N).all(1).any()


def test_two_sides_of_a_cuboid_are_alike_at_least():
    points_N3 = np.random.default_rng(0).random((50, 3)).astype(np.float32)

    def count(seed, aspect):
        rng = np.random.default_rng(seed)
        return len(list(random_cuboids(points_N3, rng, min_share=0.1, min_points=1, aspect=aspect)))

    for seed in range(10):
        shares_T3 = 0.1 + np.random.default_rng(seed).random((50, 3)) * 0.9
        pairs_T3 = np.stack([shares_T3[:, [0, 1]], shares_T3[:, [0, 2]], shares_T3[:, [1, 2]]], 1)
        alike_T = (pairs_T3.min(2) / pairs_T3.max(2) >= 0.8).any(1)
        assert count(seed, 0.8) == alike_T.sum()
        assert count(seed, 0.0) == 50 and count(seed, 1.01) == 0


def test_cuboids_draw_the_same_number_of_values_whatever_they_find():
    values = set()
    for points_N3, min_points in ((np.zeros((0, 3)), 1), (np.zeros((9, 3)), 9), (np.eye(3), 4), (np.eye(3), 1)):
        rng = np.random.default_rng(1)
        list(random_cuboids(points_N3.astype(np.float32), rng, min_share=0.5, min_points=min_points))
        values.add(rng.random())
    assert len(values) == 1


# ---- objects of a part


def test_objects_that_are_cut_are_fitted_to_what_remains():
    """A cut at x <= 2.5 through rods along x; boxes reach 0.1 beyond their points on every side."""

    def rod(first, last, y, count=40):
        return np.c_[np.linspace(first, last, count), np.full(count, y), np.linspace(0, 1, count)]

    rods = [rod(0, 2, 0), rod(0, 4, 1), rod(2, 4, 2), rod(3, 4, 3), rod(1, 3, 4, 10), rod(0, 2, 5, 10)]
    points_N3 = np.concatenate(rods).astype(np.float32)
    ids_N = np.repeat([7, 3, 0, 5, 9, 8], [len(own) for own in rods]).astype(np.int32)
    ends = [(0, 2), (0, 4), (2, 4), (3, 4), (1, 3), (0, 2)]
    boxes_K7 = np.array(
        [[(low + high) / 2, y, 0.5, high - low + 0.2, 0.2, 1.2, 0] for y, (low, high) in enumerate(ends)], np.float32
    )
    ids_K, nowhere_17 = np.array([7, 3, 0, 5, 9, 8, 20]), np.array([[1.0, 1, 1, 1, 1, 1, 0]], np.float32)
    left = cut_objects(points_N3, ids_N, ids_K, np.concatenate([boxes_K7, nowhere_17]), points_N3[:, 0] <= 2.5)
    # 7 whole; 3 has 25 of 40 points; 0 has 10 of 40; 5 none; 9 has 7, too few to fit; 8 is whole; 20 has no points
    assert left.rows_M.tolist() == [0, 1, 5]
    assert np.array_equal(left.boxes_M7[[0, 2]], boxes_K7[[0, 5]])
    assert left.points[0] is None and left.points[2] is None
    # the last of the 25 points is at x = 24 * 4/39, z = 24/39; the low sides keep the margin of 0.1
    x, z = 24 * 4 / 39, 24 / 39
    low_3, high_3 = np.array([-0.1, 0.9, -0.1]), np.array([x, 1.1, z])
    np.testing.assert_allclose(left.boxes_M7[1, :3], (low_3 + high_3) / 2, atol=1e-6)
    np.testing.assert_allclose(left.boxes_M7[1, 3:6], high_3 - low_3, atol=1e-6)
    np.testing.assert_array_equal(left.points[1], points_N3[(ids_N == 3) & (points_N3[:, 0] <= 2.5)])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1))
def test_targets_of_a_part_are_the_extents_of_their_points_in_it(seed, share):
    scene = make_scene(seed)
    rng = np.random.default_rng(seed)
    kept_N = (np.abs(scene.points_N3 - rng.uniform(-2, 2, 3)) <= rng.uniform(1, 4, 3)).all(1)
    everything = (scene.points_N3, scene.instance_ids_N, scene.object_ids_K, scene.boxes_K7)
    left = cut_objects(*everything, kept_N, min_share=share)
    for row, object_id in enumerate(scene.object_ids_K):
        own_P3 = scene.points_N3[kept_N & (scene.instance_ids_N == object_id)]
        assert (row in left.rows_M) == (len(own_P3) >= max(share * 80, 20))
    for row, box_7, points_P3 in zip(*left, strict=True):
        own_P3 = scene.points_N3[kept_N & (scene.instance_ids_N == scene.object_ids_K[row])]
        assert (points_P3 is None) == (len(own_P3) == 80)
        np.testing.assert_allclose(box_7[:3] - box_7[3:6] / 2, own_P3.min(0), atol=1e-5)
        np.testing.assert_allclose(box_7[:3] + box_7[3:6] / 2, own_P3.max(0), atol=1e-5)
        if points_P3 is not None:
            np.testing.assert_array_equal(points_P3, own_P3)


def test_a_scene_without_objects_can_be_cut():
    none = np.zeros((0, 7), np.float32)
    kept_N = np.array([True, False])
    left = cut_objects(np.zeros((2, 3), np.float32), np.full(2, -1), np.zeros(0, np.int32), none, kept_N)
    assert left.boxes_M7.shape == (0, 7) and left.points == []


# ---- object dropout


def test_dropped_objects_lose_all_points_and_others_none():
    scene = make_scene(0, walls=False)
    kept_N, stays_K = drop_objects(scene.instance_ids_N, scene.object_ids_K, 0.5, np.random.default_rng(3))
    assert 0 < stays_K.sum() < 6
    assert set(scene.instance_ids_N[kept_N]) == set(scene.object_ids_K[stays_K])
    assert kept_N.sum() == 80 * stays_K.sum()
    structure_N, _ = drop_objects(np.array([0, 1, 1, 5]), np.array([0]), 1.0, np.random.default_rng(0))
    assert structure_N.tolist() == [True] * 4, "instances without a box stay, and so does a last object"


def test_the_share_of_dropped_objects_is_the_one_asked_for():
    rng = np.random.default_rng(0)
    ids_N = ids_K = np.arange(50)
    stays = [drop_objects(ids_N, ids_K, 0.1, rng)[1].mean() for _ in range(200)]
    assert np.mean(stays) == pytest.approx(0.9, abs=0.01)
    assert all(drop_objects(ids_N, ids_K, 1.0, rng)[1].sum() == 1 for _ in range(5))
    assert drop_objects(np.array([4, 4]), np.zeros(0, int), 0.5, rng)[0].all()


def test_objects_of_a_cloud_with_other_points_are_not_dropped():
    with pytest.raises(ValueError, match="set augment.object_dropout to 0"):
        drop_objects(np.array([0, -1]), np.array([0]), 0.1, np.random.default_rng(0))


# ---- colours and jitter


def test_brightness_and_contrast_change_a_scene_as_computed_by_hand():
    colors_N3 = np.array([[0.2, 0.4, 0.6], [0.4, 0.4, 0.4]], np.float32)  # the mean is 0.4
    brightness, contrast = np.random.default_rng(4).uniform(-0.2, 0.2, 2)
    changed_N3 = change_colors(colors_N3, np.random.default_rng(4), change=0.2, noise=0.0, drop=0.0)
    expected_N3 = 0.4 + (colors_N3 - 0.4) * (1 + contrast) + brightness
    np.testing.assert_allclose(changed_N3, expected_N3, atol=1e-6)
    assert changed_N3.dtype == np.float32 and colors_N3[0, 0] == np.float32(0.2)
    still_N3 = change_colors(colors_N3, np.random.default_rng(4), change=0.0, noise=0.0, drop=0.0)
    np.testing.assert_allclose(still_N3, colors_N3, atol=1e-6)


def test_colours_stay_colours_and_are_dropped_as_often_as_asked():
    colors_N3 = np.random.default_rng(0).random((2000, 3)).astype(np.float32)
    changed = [change_colors(colors_N3, np.random.default_rng(i), change=0.5, noise=0.1, drop=0.3) for i in range(200)]
    assert all(scene_N3.min() >= 0 and scene_N3.max() <= 1 for scene_N3 in changed)
    grey = [scene_N3 for scene_N3 in changed if np.ptp(scene_N3) == 0]
    assert 40 <= len(grey) <= 80
    assert all(scene_N3[0, 0] == np.float32(128 / 255) for scene_N3 in grey)
    middle_N3 = np.full((20_000, 3), 0.5, np.float32)
    noisy_N3 = change_colors(middle_N3, np.random.default_rng(0), change=0.0, noise=0.05, drop=0.0)
    np.testing.assert_allclose(noisy_N3.std(0), 0.05, rtol=0.03)
    assert (
        change_colors(np.zeros((0, 3), np.float32), np.random.default_rng(0), change=0.1, noise=0.1, drop=0).size == 0
    )


def test_jitter_is_gaussian_and_bounded():
    points_N3 = np.zeros((40_000, 3), np.float32)
    moved_N3 = jitter_points(points_N3, 0.002, np.random.default_rng(0))
    assert moved_N3.dtype == np.float32
    np.testing.assert_allclose(moved_N3.mean(0), 0, atol=5e-5)
    np.testing.assert_allclose(moved_N3.std(0), 0.002, rtol=0.03)
    assert np.abs(moved_N3).max() == pytest.approx(0.006)
    for deviations, within in ((1, 0.6827), (2, 0.9545)):
        assert np.mean(np.abs(moved_N3) < deviations * 0.002) == pytest.approx(within, abs=0.005)
    assert np.array_equal(moved_N3, jitter_points(points_N3, 0.002, np.random.default_rng(0)))


# ---- all of them


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), dropout=st.sampled_from([0.0, 0.3]), turn=st.booleans())
def test_every_target_of_an_augmented_scene_is_the_extent_of_its_points(seed, dropout, turn):
    scene = make_scene(seed, walls=not dropout)
    augmentation = SceneAugmentation(
        AROUND if turn else Augmentation(), cuboid=1.0, cuboid_min_points=0.1, object_dropout=dropout
    )
    rng = np.random.default_rng(seed)
    part = augmentation.part(scene, outlines_of(scene), rng)
    kept_P = np.arange(len(scene.points_N3)) if part.kept_P is None else part.kept_P
    moved_P3, boxes_M7, _ = augmentation.moved(scene.to_model(scene.points_N3[kept_P]), part, rng)
    assert len(part.rows_M) == len(boxes_M7) == len(part.outlines) > 0
    for row, box_7 in zip(part.rows_M, boxes_M7, strict=True):
        own_P3 = moved_P3[scene.instance_ids_N[kept_P] == scene.object_ids_K[row]]
        np.testing.assert_allclose(box_7[:3] - box_7[3:6] / 2, own_P3.min(0), atol=3e-5)
        np.testing.assert_allclose(box_7[:3] + box_7[3:6] / 2, own_P3.max(0), atol=3e-5)


def test_scenes_are_cut_as_often_as_asked_and_whole_where_no_cuboid_will_do():
    scene = make_scene(1)
    outlines = outlines_of(scene)

    def cut(**settings):
        parts = [
            SceneAugmentation(STILL, **settings).part(scene, outlines, np.random.default_rng(i)) for i in range(99)
        ]
        return np.mean([part.kept_P is not None for part in parts])

    assert cut(cuboid=0.0) == 0 and cut(cuboid=1.0) > 0.95
    assert cut(cuboid=0.5) == pytest.approx(0.5, abs=0.15)
    assert cut(cuboid=1.0, cuboid_min_points=1.0) == 0


def test_one_augmentation_leaves_the_others_as_they_were():
    scene = make_scene(2, walls=False)
    outlines = outlines_of(scene)

    def run(**settings):
        rng = np.random.default_rng(9)
        augmentation = SceneAugmentation(**settings)
        part = augmentation.part(scene, outlines, rng)
        points_N3, boxes_M7, transform = augmentation.moved(scene.to_model(scene.points_N3), part, rng)
        colors_N3 = augmentation.recolored(scene.colors_N3.astype(np.float32) / 255, rng)
        return part, points_N3, boxes_M7, transform, colors_N3

    plain, cut = run(), run(cuboid=1.0)
    everything = run(cuboid=1.0, object_dropout=1e-9, jitter=0.002, color_change=0.2, color_noise=0.02)
    assert plain[0].kept_P is None and plain[3] != Transform()
    assert plain[3] == cut[3] == everything[3]
    assert np.array_equal(cut[0].kept_P, everything[0].kept_P) and np.array_equal(cut[2], everything[2])
    np.testing.assert_allclose(everything[1], plain[1], atol=0.0061)
    assert not np.array_equal(everything[1], plain[1]) and not np.array_equal(everything[4], plain[4])
    recolored = run(color_change=0.2, color_noise=0.02)
    assert np.array_equal(recolored[1], plain[1]) and np.array_equal(recolored[4], everything[4])
