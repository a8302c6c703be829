"""Readers: every format, what they assume, and what broken input is told."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement
from scipy.spatial.transform import Rotation

from threedr1.datasets.ply import read_plain_text, read_ply
from threedr1.datasets.readers import read_scene, unproject, voxel_mean
from threedr1.datasets.scene import Frame, Scene, save_scene

from .. import data_factory as factory


def room() -> np.ndarray:
    return factory.room_vertices(0.05)[0]


def heading(matrix_44: np.ndarray) -> float:
    return float(np.degrees(np.arctan2(matrix_44[1, 0], matrix_44[0, 0])))


def apart(a: float, b: float) -> float:
    """Degrees between two headings modulo 90."""
    return abs((a - b + 45) % 90 - 45)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("colors", [True, False])
def test_ply_clouds(tmp_path, text, colors):
    points_N3 = room()
    factory.write_ply(tmp_path / "room.ply", points_N3, colors=colors, text=text)
    scene = read_scene(tmp_path / "room.ply", align="none")
    np.testing.assert_allclose(scene.points_N3, points_N3, atol=1e-5)
    np.testing.assert_array_equal(scene.axis_align_44, np.eye(4))
    assert scene.scene_id == "room" and scene.boxes_K7.shape == (0, 7)
    assert ("no colours: grey" in scene.notes) is not colors
    assert set(scene.colors_N3[:, 1]) == {128} if not colors else scene.colors_N3[7].tolist() == [7, 14, 21]


@pytest.mark.parametrize("faces", [0, 5])
@pytest.mark.parametrize("colors", [True, False])
def test_plain_text_plys_are_read_as_plyfile_reads_them(tmp_path, faces, colors, monkeypatch):
    factory.write_ply(tmp_path / "a.ply", room(), colors=colors, faces=faces, text=True)
    fast = read_plain_text(tmp_path / "a.ply")
    assert fast is not None
    monkeypatch.setattr("threedr1.datasets.ply.read_plain_text", lambda *_, **__: None)
    slow = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(fast.vertices_V3, slow.vertices_V3)
    np.testing.assert_array_equal(fast.faces_F3, slow.faces_F3)
    assert (fast.colors_V3 is None) == (slow.colors_V3 is None) == (not colors)
    if colors:
        np.testing.assert_array_equal(fast.colors_V3, slow.colors_V3)
    assert [array.dtype for array in (fast.vertices_V3, fast.faces_F3)] == [np.float32, np.int32]


def plain_ply(path: Path, body: str, vertices: int, *, colors: str = "", newline: str = "\n") -> Path:
    """A text PLY with this body; `colors` is the type of red, green and blue."""
    lines = ["ply", "format ascii 1.0", "comment made by hand", f"element vertex {vertices}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"property {colors} {name}" for name in ("red", "green", "blue") if colors]
    path.write_bytes((newline.join([*lines, "end_header", ""]) + body).encode())
    return path


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("0 0 0\n1 1\n", "not a whole PLY.*row 1"),
        ("0 0 0\n1 x 1\n", "not a whole PLY.*row 1"),
        ("0 0 0\n1 true 1\n", "not a whole PLY.*row 1"),
        ('0 0 0\n1 "1" 1\n', "not a whole PLY.*row 1"),
        ("0 0 0\n[1 2] 1\n", "not a whole PLY.*row 1"),
        ("0 0 0\n1,2 1 1\n", "not a whole PLY.*row 1"),
    ],
)
def test_plain_text_plys_that_are_broken(tmp_path, body, words):
    """The row is named, though the fast reader sees blocks of many."""
    assert read_plain_text(plain_ply(tmp_path / "a.ply", body, 2)) is None
    with pytest.raises(ValueError, match=words):
        read_ply(tmp_path / "a.ply")


@pytest.mark.parametrize("newline", ["\n", "\r\n", " \n", "\t\n", "\n\n"])
@pytest.mark.parametrize("between", [" ", "  ", "\t"])
def test_numbers_of_a_text_ply_may_be_written_in_any_way(tmp_path, between, newline):
    words = ["1.5", "-2", "+3", ".5", "1e-3", "-1.5E+2", "7.", "007", "nan", "inf", "-0", "0"]
    rows = [between.join(words[start : start + 3]) for start in range(0, len(words), 3)]
    path = plain_ply(tmp_path / "a.ply", newline.join([*rows, ""]), 4, newline="\r\n" if newline == "\r\n" else "\n")
    mesh = read_plain_text(path)
    assert mesh is not None
    np.testing.assert_array_equal(mesh.vertices_V3.ravel(), np.array([float(word) for word in words], np.float32))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_of_a_text_ply_are_cut_between_numbers(tmp_path, block, monkeypatch):
    factory.write_ply(tmp_path / "a.ply", room()[:200], faces=9, text=True)
    whole = read_plain_text(tmp_path / "a.ply")
    monkeypatch.setattr("threedr1.datasets.ply._BLOCK_BYTES", block)
    for with_faces in (True, False):
        parts = read_plain_text(tmp_path / "a.ply", with_faces=with_faces)
        assert whole is not None and parts is not None
        np.testing.assert_array_equal(parts.vertices_V3, whole.vertices_V3)
        np.testing.assert_array_equal(parts.colors_V3, whole.colors_V3)
        assert len(parts.faces_F3) == (9 if with_faces else 0)


@pytest.mark.parametrize("encoding", ["binary_little_endian", "ascii"])
def test_doubles_of_a_ply_keep_a_survey_exact(tmp_path, encoding):
    surveyed_N3 = room() + [400_000.0, 5_400_000.0, 100.0]
    rows = np.array([tuple(row) for row in surveyed_N3], dtype=[(axis, "f8") for axis in "xyz"])
    PlyData([PlyElement.describe(rows, "vertex")], text=encoding == "ascii").write(str(tmp_path / "a.ply"))
    read = read_ply(tmp_path / "a.ply")
    assert read.vertices_V3.dtype == np.float64
    np.testing.assert_allclose(read.vertices_V3, surveyed_N3, atol=1e-6)
    scene = read_scene(tmp_path / "a.ply")
    assert any("up-axis +z" in note for note in scene.notes)
    np.testing.assert_allclose(np.sort(np.ptp(scene.points_N3, axis=0)), [2.4, 3.0, 4.0], atol=0.15)


@pytest.mark.parametrize("encoding", ["binary", "ascii"])
def test_colours_of_a_plys_faces_are_those_that_trimesh_gives_to_its_vertices(tmp_path, encoding):
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.visual.face_colors = np.random.default_rng(0).integers(0, 256, (len(mesh.faces), 3), dtype=np.uint8)
    (tmp_path / "ball.ply").write_bytes(trimesh.exchange.ply.export_ply(mesh, encoding=encoding))
    read = read_ply(tmp_path / "ball.ply")
    expected_V3 = mesh.visual.vertex_colors[:, :3].astype(int)
    assert np.abs(read.colors_V3.astype(int) - expected_V3).max() <= 1  # trimesh rounds down


def test_colours_of_polygons_go_with_all_their_triangles(tmp_path):
    """A red square and a blue triangle on one of its sides: two vertices are between."""
    header = "ply\nformat ascii 1.0\nelement vertex 5\n" + "".join(f"property float {axis}\n" for axis in "xyz")
    header += "element face 2\nproperty list uchar int vertex_indices\n"
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    rows = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n2 0 0\n4 0 1 2 3 200 0 0\n3 1 4 2 0 0 200\n"
    (tmp_path / "a.ply").write_text(header + rows)
    # the square is cut from its corner 0: two of its triangles meet there and in corner 2
    expected = [[200, 0, 0], [100, 0, 100], [133, 0, 67], [200, 0, 0], [0, 0, 200]]
    assert read_ply(tmp_path / "a.ply").colors_V3.tolist() == expected


@pytest.mark.parametrize(
    ("kind", "written", "color"),
    [("uchar", "255 0 7", [255, 0, 7]), ("ushort", "65535 0 1799", [255, 0, 7]), ("float", "1 0 0.5", [255, 0, 128])],
)
def test_colours_of_a_text_ply_go_by_their_type(tmp_path, kind, written, color):
    mesh = read_plain_text(plain_ply(tmp_path / "a.ply", f"0 0 0 {written}\n", 1, colors=kind))
    assert mesh is not None and mesh.colors_V3 is not None and mesh.colors_V3.tolist() == [color]


@pytest.mark.parametrize("written", ["256 0 0", "-1 0 0", "0 0.5 0"])
def test_a_colour_that_its_type_does_not_hold_is_named(tmp_path, written):
    path = plain_ply(tmp_path / "a.ply", f"0 0 0 1 2 3\n1 1 1 {written}\n", 2, colors="uchar")
    with pytest.raises(ValueError, match="not a whole PLY.*row 1: .* is no uchar"):
        read_ply(path)


def test_a_colour_out_of_range_among_quads_is_no_traceback(tmp_path):
    lines = ["ply", "format ascii 1.0", "element vertex 1", *[f"property float {a}" for a in "xyz"]]
    lines += ["property uchar red", "property uchar green", "property uchar blue", "property list uchar int odd"]
    (tmp_path / "a.ply").write_text("\n".join([*lines, "end_header", "0 0 0 256 0 0 1 1", ""]))
    with pytest.raises(ValueError, match="not a whole PLY"):
        read_ply(tmp_path / "a.ply")


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb", "stl", "off"])
def test_meshes_are_sampled_on_their_faces(tmp_path, suffix):
    box = trimesh.creation.box(extents=(4.0, 2.5, 3.0) if suffix == "glb" else (4.0, 3.0, 2.5))
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.tile([10, 200, 30, 255], (8, 1)))
    box.export(tmp_path / f"room.{suffix}")
    scene = read_scene(tmp_path / f"room.{suffix}")
    assert any("faces sampled" in note for note in scene.notes)
    np.testing.assert_allclose(np.ptp(scene.points_N3, axis=0), [4.0, 3.0, 2.5], atol=1e-2)
    if suffix in ("ply", "glb", "obj"):
        assert scene.colors_N3[0].tolist() == [10, 200, 30]


def test_quads_of_a_ply_mesh_become_triangles(tmp_path):
    lines = ["ply", "format ascii 1.0", "element vertex 4", *[f"property float {a}" for a in "xyz"]]
    lines += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    lines += ["0 0 0", "2 0 0", "2 1 0", "0 1 0", "4 0 1 2 3"]
    (tmp_path / "quad.ply").write_text("\n".join(lines) + "\n")
    scene = read_scene(tmp_path / "quad.ply", align="none")
    np.testing.assert_allclose(scene.points_N3.max(0), [2, 1, 0], atol=0.01)
    assert abs(scene.points_N3[:, 0].mean() - 1.0) < 0.01  # evenly over both triangles


@pytest.mark.parametrize(("points", "colors"), [("xyz", "rgb"), ("points", "colors"), ("coords", None)])
@pytest.mark.parametrize("kind", ["uint8", "float", "uint16"])
def test_npz_clouds(tmp_path, points, colors, kind):
    shades = np.array([[255, 0, 128], [0, 51, 255]] * 50)
    value = {"uint8": shades.astype(np.uint8), "float": shades / 255, "uint16": (shades * 257).astype(np.uint16)}[kind]
    arrays = {points: np.random.default_rng(0).random((100, 3)), **({colors: value} if colors else {})}
    np.savez(tmp_path / "a.npz", **arrays)
    scene = read_scene(tmp_path / "a.npz", align="none")
    assert scene.colors_N3[:2].tolist() == (shades[:2].tolist() if colors else [[128] * 3] * 2)


def test_prepared_scene_and_raw_scan_come_with_objects(tmp_path):
    root = factory.write_root(tmp_path)
    scene = read_scene(root / "scans" / "scene0000_00")
    assert scene.object_labels == ["office chair", "table"] and len(scene.frames) == 2
    assert abs(heading(scene.axis_align_44) - factory.ALIGN_DEGREES) < 1e-4
    save_scene(scene, root / "prepared" / "scene0000_00.npz")
    again = read_scene(root / "prepared" / "scene0000_00.npz")
    assert isinstance(again, Scene) and again.object_labels == scene.object_labels
    (root / "scannetv2-labels.combined.tsv").unlink()
    unlabelled = read_scene(root / "scans" / "scene0000_00")
    assert unlabelled.object_labels == [] and any("unlabelled" in note for note in unlabelled.notes)


@pytest.mark.parametrize(
    ("turn", "scale", "words"),
    [
        (Rotation.identity(), 1.0, ["up-axis +z", "plausible"]),
        (Rotation.from_euler("x", -90, degrees=True), 1.0, ["up-axis +y"]),
        (Rotation.from_euler("x", 90, degrees=True), 100.0, ["up-axis -y", "centimetres"]),
        (Rotation.from_euler("x", 180, degrees=True), 1.0, ["up-axis -z"]),
        (Rotation.from_euler("xy", [12, -7], degrees=True), 1000.0, ["levelled", "millimetres"]),
        (Rotation.from_euler("z", 25, degrees=True), 1.0, ["walls turned", "-25.0 degrees"]),
    ],
)
def test_up_scale_and_walls_are_found_and_told(tmp_path, turn, scale, words):
    points_N3 = room() + [3.0, 4.0, 1.0]
    np.savez(tmp_path / "a.npz", xyz=turn.apply(points_N3) * scale)
    scene = read_scene(tmp_path / "a.npz")
    text = "; ".join(scene.notes)
    assert all(word in text for word in words), text
    total_33 = scene.axis_align_44[:3, :3] @ turn.as_matrix() * scale
    np.testing.assert_allclose(total_33 @ total_33.T, np.eye(3), atol=1e-6)  # metres again
    assert total_33[2, 2] > np.cos(np.radians(1.5))
    assert apart(heading(total_33), 0.0) < 1.0
    np.testing.assert_allclose(np.sort(np.ptp(scene.points_N3, axis=0)), [2.4, 3.0, 4.0], atol=0.15)


@pytest.mark.parametrize("up", ["z", "y"])
def test_without_walls_what_lies_level_is_the_floor_wherever_things_stand(tmp_path, up):
    """A floor with a cube in a corner, whose sides are next to nothing."""
    rng = np.random.default_rng(0)
    floor_N3 = np.concatenate([rng.uniform(0, [5, 4], (20_000, 2)), rng.normal(0, 0.005, (20_000, 1))], axis=1)
    cube_N3, side_N = rng.uniform(0, 1, (4_000, 3)), rng.integers(0, 5, 4_000)
    cube_N3[np.arange(4_000), np.array([0, 0, 1, 1, 2])[side_N]] = np.array([0, 1, 0, 1, 1])[side_N]
    points_N3 = np.concatenate([floor_N3, cube_N3 + [3, 2, 0]])
    np.savez(tmp_path / "a.npz", xyz=points_N3 if up == "z" else points_N3[:, [0, 2, 1]] * [1, 1, -1])
    scene = read_scene(tmp_path / "a.npz")
    assert up == "y" or "up-axis +z" in scene.notes
    np.testing.assert_allclose(np.ptp(scene.points_N3[:, 2]), 1.0, atol=0.05)


def test_heights_that_fit_no_room_are_told_and_left(tmp_path):
    np.savez(tmp_path / "a.npz", xyz=room() * 0.3)
    scene = read_scene(tmp_path / "a.npz")
    assert any("sizes may be wrong" in note for note in scene.notes)
    np.testing.assert_allclose(np.ptp(scene.points_N3, axis=0), [1.2, 0.9, 0.72], atol=0.02)


def test_none_takes_the_frame_as_it_is(tmp_path):
    points_N3 = (room() * 1000).astype(np.float32)
    np.savez(tmp_path / "a.npz", xyz=points_N3)
    scene = read_scene(tmp_path / "a.npz", align="none")
    np.testing.assert_array_equal(scene.points_N3, points_N3)


def test_some_broken_points_are_left_out_and_all_broken_is_an_error(tmp_path):
    points_N3 = room().astype(np.float64)
    points_N3[:3] = [[np.nan, 0, 0], [0, np.inf, 0], [0, 0, -np.inf]]
    np.savez(tmp_path / "a.npz", xyz=points_N3)
    scene = read_scene(tmp_path / "a.npz", align="none")
    assert len(scene.points_N3) == len(points_N3) - 3 and "3 points" in scene.notes[0]
    np.savez(tmp_path / "b.npz", xyz=np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="no point with finite"):
        read_scene(tmp_path / "b.npz")


def test_large_clouds_are_thinned_by_seed(tmp_path):
    np.savez(tmp_path / "a.npz", xyz=room())
    one, two = (read_scene(tmp_path / "a.npz", max_points=500, seed=4) for _ in range(2))
    assert len(one.points_N3) == 500 and f"500 of {len(room())} points kept" in one.notes
    np.testing.assert_array_equal(one.points_N3, two.points_N3)
    np.testing.assert_array_equal(one.origin_3, read_scene(tmp_path / "a.npz", seed=4).origin_3)


def _write_frames(folder, depth_value=2000):
    folder.mkdir()
    np.savetxt(folder / "intrinsics.txt", [[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]])
    for index in range(2):
        color = np.zeros((48, 64, 3), np.uint8)
        color[:, :32] = [200, 10, 10]
        Image.fromarray(color).save(folder / f"{index:06d}.color.png")
        depth = np.full((24, 32), depth_value, np.uint16)
        depth[0], depth[1], depth[2] = 0, 65535, 9000  # nothing, nothing, too far
        Image.fromarray(depth).save(folder / f"{index:06d}.depth.png")
        pose_44 = factory.camera_pose() if index == 0 else np.full((4, 4), np.nan)
        np.savetxt(folder / f"{index:06d}.pose.txt", pose_44)


def test_posed_frames_are_fused(tmp_path):
    _write_frames(tmp_path / "kitchen")
    scene = read_scene(tmp_path / "kitchen", align="none")
    # the camera stands at (0, -1.4, 1.5), looks along +y: a wall 2 m away
    np.testing.assert_allclose(scene.points_N3[:, 1], 0.6, atol=1e-5)
    # depth columns 0 and 31 stand over colour columns 0.5 and 62.5
    np.testing.assert_allclose(scene.points_N3[:, 0].min(), (0.5 - 31.5) / 40 * 2, atol=1e-5)
    np.testing.assert_allclose(scene.points_N3[:, 0].max(), (62.5 - 31.5) / 40 * 2, atol=1e-5)
    # the first row with depth is 3: (6.5 - 23.5) / 40 * 2 below the axis is above the camera
    np.testing.assert_allclose(scene.points_N3[:, 2].max(), 1.5 + 17 / 40 * 2, atol=1e-5)
    left = scene.points_N3[:, 0] < -0.05
    assert (scene.colors_N3[left] == [200, 10, 10]).all() and (
        scene.colors_N3[~left & (scene.points_N3[:, 0] > 0.05)] == 0
    ).all()
    assert len(scene.frames) == 1 and any("1 frames without a finite pose" in note for note in scene.notes)
    np.testing.assert_allclose(scene.frames[0].pose_44, factory.camera_pose(), atol=1e-9)


def test_frames_move_with_the_alignment_and_their_axes_stay_unit(tmp_path):
    _write_frames(tmp_path / "kitchen")
    scene = read_scene(tmp_path / "kitchen")
    pose_44 = scene.frames[0].pose_44
    np.testing.assert_allclose(pose_44[:3, :3] @ pose_44[:3, :3].T, np.eye(3), atol=1e-9)


def test_unproject_in_double_agrees_with_projection(tmp_path):
    _write_frames(tmp_path / "a", depth_value=3456)
    intrinsics_33 = np.array([[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]])
    frame = Frame(str(tmp_path / "a/000000.color.png"), str(tmp_path / "a/000000.depth.png"), np.eye(4), intrinsics_33)
    points_N3, _ = unproject(frame)
    pixels_N3 = points_N3 @ intrinsics_33.T
    columns_N = pixels_N3[:, 0] / pixels_N3[:, 2]
    np.testing.assert_allclose(np.sort(np.unique(columns_N.round(3))), np.arange(32) * 2 + 0.5, atol=1e-3)


def test_voxel_mean_by_hand():
    points_N3 = np.array([[0.001, 0, 0], [0.003, 0, 0], [-0.001, 0, 0], [0.05, 0.05, 0.05]])
    colors_N3 = np.array([[10, 0, 0], [20, 0, 0], [99, 0, 0], [1, 2, 3]], np.uint8)
    points_M3, colors_M3 = voxel_mean(points_N3, colors_N3, 0.02)
    np.testing.assert_allclose(points_M3, [[-0.001, 0, 0], [0.002, 0, 0], [0.05, 0.05, 0.05]], atol=1e-7)
    assert colors_M3.tolist() == [[99, 0, 0], [15, 0, 0], [1, 2, 3]]


def test_unreadable_input_is_one_clear_sentence(tmp_path):
    (tmp_path / "a.xyz").write_text("1 2 3")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    np.savez(tmp_path / "c.npz", wrong=np.zeros(3))
    np.savez(tmp_path / "d.npz", xyz=np.zeros((0, 3)))
    np.savez(tmp_path / "e.npz", xyz=np.zeros((5, 2)))
    np.savez(tmp_path / "f.npz", xyz=np.zeros((5, 3)), rgb=np.zeros((4, 3), np.uint8))
    (tmp_path / "g.glb").write_bytes(b"nothing")
    (tmp_path / "h.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\n")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "i.npz", header=np.frombuffer(orjson.dumps({}), np.uint8), boxes_K7=np.zeros((0, 7)))
    _write_frames(tmp_path / "no_intrinsics")
    (tmp_path / "no_intrinsics" / "intrinsics.txt").unlink()
    _write_frames(tmp_path / "broken_depth")
    (tmp_path / "broken_depth" / "000000.depth.png").write_bytes(b"\x89PNG")
    for name, words in {
        "missing.ply": "no scan",
        "a.xyz": "no format that we read",
        "b.npz": "not a whole .npz",
        "c.npz": "no array xyz or points; it has wrong",
        "d.npz": "empty cloud",
        "e.npz": r"not \[N, 3\]",
        "f.npz": "must agree",
        "g.glb": "not a readable mesh",
        "h.ply": "not a whole PLY",
        "folder": "neither a raw ScanNet scan nor",
        "i.npz": "not a whole prepared scene",
        "no_intrinsics": "no intrinsics.txt",
        "broken_depth": "not a whole picture",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            read_scene(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Unknown alignment"):
        read_scene(tmp_path / "d.npz", align="yes")


@pytest.mark.real
def test_real_scan_recovers_its_axis_alignment(real_data):
    scene = read_scene(real_data / "scannet" / "scene0000_00_cloud.npz")
    known = orjson.loads((real_data / "scannet" / "scene0000_00_boxes.json").read_bytes())["axis_align_matrix"]
    assert apart(heading(scene.axis_align_44), heading(np.array(known))) < 2.0
    np.testing.assert_allclose(scene.axis_align_44[2], [0, 0, 1, 0], atol=1e-9)
    assert "up-axis +z" in scene.notes and any("plausible" in note for note in scene.notes)


@pytest.mark.real
def test_real_frames_are_fused_and_levelled(real_data):
    scene = read_scene(real_data / "redkitchen")
    assert len(scene.frames) == 20 and len(scene.points_N3) > 100_000
    heights_N = scene.points_N3[:, 2] - scene.origin_3[2]
    assert 1.2 < np.percentile(heights_N, 99.5) < 3.0
    # cameras are held upright, above the floor
    for frame in scene.frames:
        assert frame.pose_44[2, 1] < -0.5 and frame.pose_44[2, 3] > scene.origin_3[2]
