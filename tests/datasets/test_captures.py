"""Exports of phone scanners, written as their formats are documented: each gives the room that its cameras saw."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from threedr1.datasets.captures import read_capture
from threedr1.datasets.readers import MOST_FUSED, read_scene
from threedr1.utils.camera import Camera, pinhole
from threedr1.utils.splat import splat

from ..data_factory import FLOOR, room_vertices

WIDTH, HEIGHT = 96, 72
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
TO_Y_UP = Rotation.from_euler("x", -90, degrees=True)  # z up to y up


def cameras(count: int = 8) -> list[Camera]:
    """Cameras in the middle of the miniature room, looking around and slightly down; world frame, OpenCV axes."""
    found = []
    for turn in np.arange(count) * 2 * np.pi / count:
        forward_3 = np.array([np.cos(turn), np.sin(turn), -0.5])
        forward_3 /= np.linalg.norm(forward_3)
        right_3 = np.cross(forward_3, [0, 0, 1.0])
        right_3 /= np.linalg.norm(right_3)
        pose_44 = np.eye(4)
        pose_44[:3, :3] = np.stack([right_3, np.cross(forward_3, right_3), forward_3], axis=1)
        pose_44[:3, 3] = [0.3, 0.2, 1.4]
        found.append(Camera(pose_44, pinhole(WIDTH, HEIGHT, 80.0), WIDTH, HEIGHT))
    return found


@pytest.fixture(scope="module")
def shots() -> list[tuple[Camera, np.ndarray, np.ndarray]]:
    """Camera, picture and depth in millimetres, half as large, of each of the room's views."""
    points_N3, objects_N = room_vertices(0.02)
    colors_N3 = np.stack([60 + 50 * objects_N, 200 - 40 * objects_N, 90 + 0 * objects_N], axis=1).astype(np.uint8)
    found = []
    for camera in cameras():
        seen = splat(points_N3, colors_N3, camera)
        small = Camera(camera.pose_44, pinhole(WIDTH // 2, HEIGHT // 2, 80.0), WIDTH // 2, HEIGHT // 2)
        depth_HW = splat(points_N3, colors_N3, small).depth_HW
        depth_HW = np.where(np.isfinite(depth_HW), depth_HW, 0)
        found.append((camera, seen.color_HW3, np.rint(depth_HW * 1000).astype(np.uint16)))
    return found


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def y_up(pose_44: np.ndarray) -> np.ndarray:
    turned_44 = pose_44.copy()
    turned_44[:3] = TO_Y_UP.as_matrix() @ pose_44[:3]
    return turned_44


def write_polycam(folder, shots, *, corrected=True, confidence=None, portrait=False):
    """Polycam's raw data; `portrait`: the phone was held upright, so that its pictures lie on their side."""
    roll_44 = np.eye(4)
    kind = "corrected_" if corrected else ""
    for number, (camera, color_HW3, depth_HW) in enumerate(shots):
        color, depth, intrinsics = color_HW3, depth_HW, camera.intrinsics_33
        if portrait:  # rows become columns: the new x axis is the old y axis, the new y the old -x
            color, depth = np.rot90(color_HW3), np.rot90(depth_HW)
            roll_44[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
            fx, fy, cx, cy = (intrinsics[index] for index in ((0, 0), (1, 1), (0, 2), (1, 2)))
            intrinsics = np.array([[fy, 0, cy], [0, fx, WIDTH - 1 - cx], [0, 0, 1]])
        pose_44 = y_up(camera.pose_44 @ roll_44) @ OPENGL
        values = {f"t_{row}{column}": pose_44[row, column] for row in range(3) for column in range(4)}
        values |= {"fx": intrinsics[0, 0], "fy": intrinsics[1, 1], "cx": intrinsics[0, 2], "cy": intrinsics[1, 2]}
        values |= {"width": color.shape[1], "height": color.shape[0], "blur_score": 12.0}
        stamp = str(14420085 + number)
        path = folder / "keyframes" / f"{kind}cameras" / f"{stamp}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        save(folder / "keyframes" / f"{kind}images" / f"{stamp}.jpg", np.ascontiguousarray(color))
        save(folder / "keyframes" / "depth" / f"{stamp}.png", np.ascontiguousarray(depth))
        if confidence is not None:
            save(folder / "keyframes" / "confidence" / f"{stamp}.png", np.full(depth.shape, confidence, np.uint8))


def write_arkit_scenes(folder, shots):
    lines = []
    for number, (camera, color_HW3, depth_HW) in enumerate(shots):
        seconds = 100 + number / 10
        name = f"47333462_{seconds:.3f}"
        world_to_camera_44 = np.linalg.inv(camera.pose_44)
        vector_3 = Rotation.from_matrix(world_to_camera_44[:3, :3]).as_rotvec()
        numbers = [seconds + 0.001, *vector_3, *world_to_camera_44[:3, 3]]
        lines.append(" ".join(f"{value:.9f}" for value in numbers))
        save(folder / "lowres_wide" / f"{name}.png", color_HW3)
        save(folder / "lowres_depth" / f"{name}.png", depth_HW)
        fx, fy, cx, cy = (camera.intrinsics_33[index] for index in ((0, 0), (1, 1), (0, 2), (1, 2)))
        # the intrinsics' time is rounded otherwise than the picture's
        pincam = folder / "lowres_wide_intrinsics" / f"47333462_{seconds - 0.001:.3f}.pincam"
        pincam.parent.mkdir(parents=True, exist_ok=True)
        pincam.write_text(f"{WIDTH} {HEIGHT} {fx} {fy} {cx} {cy}")
    (folder / "lowres_wide.traj").write_text("\n".join(lines) + "\n")


def write_transforms(folder, shots, **more):
    frames = []
    for number, (camera, color_HW3, depth_HW) in enumerate(shots):
        save(folder / "images" / f"{number}.png", color_HW3)
        save(folder / "depth" / f"{number}.png", depth_HW)
        names = {"file_path": f"images/{number}.png", "depth_file_path": f"depth/{number}.png"}
        frames.append({**names, "transform_matrix": (camera.pose_44 @ OPENGL).tolist()})
    fx, fy, cx, cy = (shots[0][0].intrinsics_33[index] for index in ((0, 0), (1, 1), (0, 2), (1, 2)))
    content = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": WIDTH, "h": HEIGHT, "frames": frames, **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps(content))


def check_room(scene, portrait=False):
    """The cloud lies on the miniature room's surfaces, seen from its cameras; up is up, the floor is low."""
    assert len(scene.frames) == 8 and len(scene.points_N3) > 2000
    for frame in scene.frames:
        assert frame.pose_44[2, 3] - scene.origin_3[2] == pytest.approx(1.4, abs=0.06)
        assert frame.pose_44[2, 2] == pytest.approx(-0.447, abs=0.03), "cameras look down by 26.6 degrees"
    roll_33 = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) if portrait else np.eye(3)
    camera, pose_44 = cameras()[0], scene.frames[0].pose_44
    in_camera_N3 = (scene.points_N3 - pose_44[:3, 3]) @ pose_44[:3, :3] @ roll_33.T
    home_N3 = in_camera_N3 @ camera.pose_44[:3, :3].T + camera.pose_44[:3, 3]
    distance_N, nearest_N = KDTree(room_vertices(0.02)[0]).query(home_N3)
    assert np.median(distance_N) < 0.03 and np.percentile(distance_N, 95) < 0.1
    floor_N = room_vertices(0.02)[1][nearest_N] == FLOOR
    assert 0.1 < floor_N.mean() < 0.9
    painted_N3 = scene.colors_N3[floor_N].astype(int)
    assert (np.abs(painted_N3 - [60 + 50 * FLOOR, 200 - 40 * FLOOR, 90]).max(axis=1) < 40).mean() > 0.8


@pytest.mark.parametrize("write", [write_polycam, write_arkit_scenes, write_transforms])
def test_a_room_comes_out_of_each_export(write, shots, tmp_path):
    write(tmp_path / "scan", shots)
    scene = read_scene(tmp_path / "scan")
    check_room(scene)
    assert any("8 depth frames fused" in note for note in scene.notes)


def test_a_phone_held_upright_says_up_by_its_format(shots, tmp_path):
    """Pictures then lie on their side, and what their rows say of up is wrong."""
    write_polycam(tmp_path / "scan", shots, portrait=True)
    check_room(read_scene(tmp_path / "scan"), portrait=True)


def test_all_exports_say_the_same_poses(shots, tmp_path):
    for write in (write_polycam, write_arkit_scenes, write_transforms):
        write(tmp_path / write.__name__, shots)
        capture = read_capture(tmp_path / write.__name__)
        expected = [y_up(camera.pose_44) if write is write_polycam else camera.pose_44 for camera, _, _ in shots]
        np.testing.assert_allclose([frame.pose_44 for frame in capture.frames], expected, atol=1e-6)
        np.testing.assert_allclose(capture.frames[0].intrinsics_33, shots[0][0].intrinsics_33)
        assert capture.left_out == 0 and all(frame.depth_path for frame in capture.frames)


def test_polycam_without_corrections_and_with_low_confidence(shots, tmp_path):
    write_polycam(tmp_path / "raw", shots, corrected=False, confidence=127)
    check_room(read_scene(tmp_path / "raw"))
    write_polycam(tmp_path / "unsure", shots, confidence=0)
    with pytest.raises(ValueError, match="is an empty cloud"):
        read_scene(tmp_path / "unsure")


def test_pictures_without_a_pose_are_left_out_and_counted(shots, tmp_path):
    write_arkit_scenes(tmp_path / "scan", shots)
    lines = (tmp_path / "scan" / "lowres_wide.traj").read_text().splitlines()
    (tmp_path / "scan" / "lowres_wide.traj").write_text("\n".join(lines[2:]) + "\n")
    capture = read_capture(tmp_path / "scan")
    assert (len(capture.frames), capture.left_out) == (6, 2)
    assert any("2 frames without a finite pose" in note for note in read_scene(tmp_path / "scan").notes)


def test_long_captures_are_thinned_and_say_so(shots, tmp_path):
    repeats = MOST_FUSED // len(shots) + 1
    write_transforms(tmp_path / "scan", shots)
    path = tmp_path / "scan" / "transforms.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "frames": content["frames"] * repeats}))
    notes = read_scene(tmp_path / "scan").notes
    assert any(f"{MOST_FUSED} of {repeats * len(shots)} depth frames fused" in note for note in notes)


def change(name, **values):
    def harm(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return harm


@pytest.mark.parametrize(
    ("write", "harm", "words"),
    [
        (write_transforms, change("transforms.json", frames=3), "has no list of frames"),
        (write_transforms, change("transforms.json", frames=[{"file_path": "a.png"}]), "without a 4x4"),
        (write_transforms, change("transforms.json", depth_unit_scale_factor=1.0), "is not read; export it in milli"),
        (write_transforms, change("transforms.json", fl_x="wide"), "has no number 'fl_x'"),
        (
            write_transforms,
            change("transforms.json", frames=[{"file_path": "/etc/passwd", "transform_matrix": np.eye(4).tolist()}]),
            "which is not in its folder",
        ),
        (write_transforms, lambda folder: (folder / "transforms.json").write_text("{"), "is not one JSON object"),
        (write_polycam, change("keyframes/corrected_cameras/14420085.json", t_00=None), "has no number 't_00'"),
        (write_arkit_scenes, lambda folder: (folder / "lowres_wide.traj").write_text("1 2 3\n"), "not seven numbers"),
    ],
)
def test_broken_exports_are_named(write, harm, words, shots, tmp_path):
    write(tmp_path / "scan", shots)
    harm(tmp_path / "scan")
    with pytest.raises(ValueError, match=words):
        read_scene(tmp_path / "scan")
