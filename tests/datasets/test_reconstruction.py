"""Reconstructions from video: stray points, any frame, any scale; tried on disturbed copies of real clouds."""

import numpy as np
import pytest
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from threedr1.datasets.alignment import CEILING, AlignOptions, flat_directions
from threedr1.datasets.outliers import inliers
from threedr1.datasets.readers import read_scene

from ..data_factory import box_shell, room_vertices


def height_of(points_N3: np.ndarray) -> float:
    return float(np.ptp(np.percentile(points_N3[:, 2], [0.5, 99.5])))


def disturbed(points_N3, colors_N3, seed, *, turn=None, noise=0.015):
    """A copy turned, scaled, moved, with noise and 4 % stray points; and the turn and scale."""
    rng = np.random.default_rng(seed)
    turn = turn or Rotation.random(random_state=seed)
    scale = float(np.exp(rng.uniform(np.log(0.1), np.log(5))))
    low_3, high_3 = points_N3.min(0), points_N3.max(0)
    strays = rng.uniform(low_3 - (high_3 - low_3) / 2, high_3 + (high_3 - low_3) / 2, (len(points_N3) // 25, 3))
    moved = np.concatenate([points_N3 + rng.normal(0, noise, points_N3.shape), strays])
    colors = np.concatenate([colors_N3, np.zeros(strays.shape, np.uint8)])
    return turn.apply(moved) * scale + rng.normal(0, 2, 3), colors, turn.as_matrix() * scale


def read_disturbed(folder, points_N3, colors_N3, seed, *, turn=None, noise=0.015, up="", **options):
    """The scene of a disturbed copy, and its frame against the original's: tilt (degrees), scale, turn [3, 3]."""
    moved, colors, made_33 = disturbed(points_N3, colors_N3, seed, turn=turn, noise=noise)
    np.savez(folder / "cloud.npz", xyz=moved.astype(np.float32), rgb=colors)
    scene = read_scene(folder / "cloud.npz", align=AlignOptions(up=up, from_video=True, **options))
    total_33 = scene.axis_align_44[:3, :3] @ made_33
    scale = float(np.cbrt(np.linalg.det(total_33)))
    tilt = float(np.degrees(np.arccos(np.clip(total_33[2, 2] / scale, -1, 1))))
    return scene, tilt, scale, total_33 / scale


@pytest.mark.real
@pytest.mark.parametrize("seed", range(5))
def test_a_disturbed_real_scan_comes_back(seed, real_data, tmp_path):
    """Up, walls and metres of scene0000_00 in any frame; then its points lie where they did."""
    with np.load(real_data / "scannet" / "scene0000_00_cloud.npz") as cloud:
        points_N3, colors_N3 = cloud["xyz"], cloud["rgb"]
    scene, tilt, scale, turn_33 = read_disturbed(tmp_path, points_N3, colors_N3, seed, height=height_of(points_N3))
    assert tilt < 1.0 and scale == pytest.approx(1.0, abs=0.02)
    original = read_scene(real_data / "scannet" / "scene0000_00_cloud.npz")
    walls = np.degrees(np.arctan2(turn_33[1, 0], turn_33[0, 0])) - np.degrees(
        np.arctan2(original.axis_align_44[1, 0], original.axis_align_44[0, 0])
    )
    assert abs((walls + 45) % 90 - 45) < 1.5, "walls along the same axes, but for quarter turns"
    back_N3 = (scene.points_N3 - scene.origin_3) @ turn_33
    home_N3 = points_N3 - (points_N3.min(0) + points_N3.max(0)) / 2
    back_N3 += np.median(home_N3, axis=0) - np.median(back_N3, axis=0)
    distance_N, _ = KDTree(home_N3).query(back_N3)
    assert np.median(distance_N) < 0.05 and np.percentile(distance_N, 99) < 0.25


@pytest.mark.real
@pytest.mark.parametrize("seed", range(3))
def test_a_disturbed_fusion_of_real_frames_comes_back(seed, real_data, tmp_path):
    """A kitchen without a ceiling, seen from 20 frames."""
    kitchen = read_scene(real_data / "redkitchen")
    points_N3, colors_N3 = kitchen.points_N3[::4], kitchen.colors_N3[::4]
    _, tilt, scale, _ = read_disturbed(tmp_path, points_N3, colors_N3, seed, height=height_of(points_N3))
    assert tilt < 1.5 and scale == pytest.approx(1.0, abs=0.02)


def furnished(spacing=0.04):
    """The miniature room with a second table, so that much lies low."""
    points_N3, _ = room_vertices(spacing)
    return np.concatenate([points_N3, box_shell((1.2, -1.0, 0.3), (0.8, 0.6, 0.6), spacing)]).astype(np.float64)


def test_without_a_height_a_usual_ceiling_is_assumed_and_said(tmp_path):
    points_N3 = furnished()
    colors_N3 = np.full(points_N3.shape, 120, np.uint8)
    scene, tilt, _, _ = read_disturbed(tmp_path, points_N3, colors_N3, 3, noise=0.005)
    assert tilt < 1.0 and height_of(scene.points_N3) == pytest.approx(CEILING, rel=0.02)
    said = "; ".join(scene.notes)
    assert "has no unit" in said and "--height METRES" in said and "stray points removed" in said


def test_up_that_is_given_goes_before_what_is_found(tmp_path):
    """Turned over on purpose: the axis that is called up comes out as up."""
    points_N3 = furnished()
    colors_N3 = np.full(points_N3.shape, 120, np.uint8)
    turn = Rotation.from_euler("x", 20, degrees=True)
    _, tilt, _, turn_33 = read_disturbed(tmp_path, points_N3, colors_N3, 1, turn=turn, noise=0.005, up="-z")
    assert tilt > 179.0 and turn_33[2, 2] < -0.99


def test_stray_points_go_and_others_stay():
    rng = np.random.default_rng(0)
    points_N3 = furnished(0.03)
    strays = rng.uniform([-6, -6, -4], [6, 6, 7], (len(points_N3) // 20, 3))
    far = rng.normal(0, 1, (5, 3)) * 1000
    kept = inliers(np.concatenate([points_N3, strays, far]))
    near, _ = KDTree(points_N3).query(strays)
    assert kept[: len(points_N3)].mean() > 0.98
    assert kept[len(points_N3) : -5][near > 0.3].mean() < 0.02 and not kept[-5:].any()


def test_a_handful_of_points_is_left_alone():
    assert inliers(np.eye(3)).all() and inliers(np.zeros((50, 3))).all()


def test_flat_directions_by_hand():
    """Three walls' normals, the first with the most: found in that order, signs aside, at least 30 degrees apart."""
    rng = np.random.default_rng(0)
    turn = Rotation.from_euler("xyz", [31, -17, 64], degrees=True)
    normals = np.repeat(np.eye(3), [500, 300, 200], axis=0) * rng.choice([-1, 1], (1000, 1))
    normals = normals + rng.normal(0, 0.02, normals.shape)
    found = flat_directions(turn.apply(normals / np.linalg.norm(normals, axis=1, keepdims=True)), 3)
    np.testing.assert_allclose(np.abs(np.array(found) @ turn.as_matrix()), np.eye(3), atol=0.02)


@pytest.mark.parametrize(("axis", "degrees"), [("x", 35), ("y", -35), ("x", 70)])
def test_a_tilted_scan_is_levelled_without_being_told(axis, degrees, tmp_path):
    """`--align auto` finds up off the axes too, and says so."""
    turn = Rotation.from_euler("z", 20, degrees=True) * Rotation.from_euler(axis, degrees, degrees=True)
    np.savez(tmp_path / "a.npz", xyz=turn.apply(furnished(0.03)))
    scene = read_scene(tmp_path / "a.npz")
    total_33 = scene.axis_align_44[:3, :3] @ turn.as_matrix()
    assert total_33[2, 2] > np.cos(np.radians(1.5)), scene.notes


@pytest.mark.parametrize(
    ("options", "words"),
    [({"up": "w"}, "Up is 'w'"), ({"height": 0.0}, "height of 0.0 m is none"), ({"height": 1e9}, "is none")],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        AlignOptions(**options)
