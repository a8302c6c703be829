"""`view` of a scan: a model's answers and detections, boxes of a file; as page, plan, Rerun file and boxes again."""

import base64
import json

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from threedr1 import main as cli
from threedr1.datasets.alignment import AlignOptions
from threedr1.datasets.readers import read_scene
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine.detections import detected_boxes
from threedr1.models.dual_encoder import DualEncoder
from threedr1.utils.predictions import Prediction, read_predictions, write_predictions
from threedr1.utils.view_cameras import read_camera
from threedr1.visualization.box_files import read_boxes, to_world, write_boxes
from threedr1.visualization.shown_boxes import ShownBoxes

from ..odd_scene import BOX, MAGENTA, odd_scene, raw_to_world

ENCODER = (
    "num_tokens=32 num_neighbors=8 radius=0.4 width=16 encoder_layers=1 decoder_layers=1 num_heads=2 num_queries=9"
)


@pytest.fixture(scope="module")
def run(rooms_root, tmp_path_factory):
    """An untrained model that takes two views."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("viewer")
    encoder = base / "small"
    DualEncoder(text_width=8, text_heads=2, num_buckets=64, image_width=8, image_size=16).save_pretrained(encoder)
    settings = [f"run.dir={base / 'sft'}", "run.steps=0", f"data.root={rooms_root}", "data.num_points=512"]
    settings += ["data.datasets=scanqa", f"model.language.model={rooms_root}/tiny", "model.language.dtype=float32"]
    settings += ["model.language.train=full", "model.language.num_proposals=8", "model.language.num_layout_tokens=2"]
    settings += [f"model.encoder.{setting}" for setting in ENCODER.split()]
    settings += ["model.views.source=inside", "model.views.num_candidates=4", "model.views.num_views=2"]
    settings += ["model.views.image_size=56", f"model.views.encoder={encoder}"]
    assert cli.main(["sft", "--set", *settings]) == 0
    return base / "sft"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """The odd scene as a user has it: a PLY in centimetres, turned, far from the origin."""
    scene = odd_scene()
    inverse_44 = np.linalg.inv(raw_to_world())
    raw_N3 = scene.points_N3.astype(np.float64) @ inverse_44[:3, :3].T + inverse_44[:3, 3]
    path = tmp_path_factory.mktemp("scan") / "odd.ply"
    names = ["x", "y", "z", "red", "green", "blue"]
    vertices = np.empty(len(raw_N3), dtype=list(zip(names, ["f4"] * 3 + ["u1"] * 3, strict=True)))
    for name, column in zip(names, [*raw_N3.T, *scene.colors_N3.T], strict=True):
        vertices[name] = column
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(path))
    return path


def page_of(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def magenta_points(data: dict) -> np.ndarray:
    """The object's points, in the page's frame."""
    points = data["points"]
    places_N3 = np.frombuffer(base64.b64decode(points["positions"]), "<u2").reshape(-1, 3)
    colors_N3 = np.frombuffer(base64.b64decode(points["colors"]), np.uint8).reshape(-1, 3)
    return (points["low"] + places_N3 * np.array(points["step"]))[(colors_N3 == MAGENTA).all(1)]


@pytest.mark.parametrize("align", ["auto", "none"])
@pytest.mark.parametrize("name", ["odd.npz", "odd.json"])
def test_boxes_in_the_scan_s_frame_stay_on_the_points_however_it_is_aligned(scan, tmp_path, align, name):
    raw = ShownBoxes.from_rows([BOX], ["trunk"], [0.75]).moved(np.linalg.inv(raw_to_world()))
    file = write_boxes(tmp_path / name, raw)
    words = ["view", str(file), "--scene", str(scan), "--align", align]
    assert cli.main([*words, "--room", str(tmp_path / "room.html"), "--export", str(tmp_path / "again.json")]) == 0
    data = page_of(tmp_path / "room.html")
    (box,) = data["layers"]["boxes"]
    object_N3, corners_83 = magenta_points(data), np.array(box["corners"])
    size = 1.0 if align == "auto" else 100.0  # centimetres, taken as metres
    edges_33 = corners_83[[1, 3, 4]] - corners_83[0]
    np.testing.assert_allclose(np.linalg.norm(edges_33, axis=1), size * np.array([1.6, 0.7, 0.9]), rtol=1e-3)
    share_N3 = (object_N3 - corners_83[0]) @ edges_33.T / (edges_33**2).sum(1)
    np.testing.assert_allclose(share_N3.min(0), 0, atol=3e-3)
    np.testing.assert_allclose(share_N3.max(0), 1, atol=3e-3)
    assert box["label"] == "trunk 0.75"
    np.testing.assert_allclose(read_boxes(tmp_path / "again.json").corners_K83, raw.corners_K83, atol=0.05)


def test_answers_of_infer_are_shown_on_the_scan_that_was_asked_about(run, scan, tmp_path, capsys):
    pytest.importorskip("rerun")
    answers = tmp_path / "answers"
    asked = ["--ask", "Where is the trunk?", "--ask", "What is it?"]
    assert cli.main(["infer", "--scene", str(scan), "--model", str(run), "--out", str(answers), *asked]) == 0
    predictions = read_predictions(answers / "predictions.jsonl")
    cameras = [read_camera(answers / name) for name in predictions[0].views]
    assert len(cameras) == 2 and all(camera is not None and camera.width == 56 for camera in cameras)
    predictions[0].boxes = [BOX]
    write_predictions(answers / "predictions.jsonl", predictions)
    capsys.readouterr()
    outputs = {name: tmp_path / f"out.{name}" for name in ("html", "png", "json", "rrd")}
    words = ["--room", outputs["html"], "--top", outputs["png"], "--export", outputs["json"], "--save", outputs["rrd"]]
    assert cli.main(["view", str(answers), "--scene", str(scan), *map(str, words)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"wrote {path}" for path in outputs.values()]
    assert "assumed: " in said.err
    data = page_of(outputs["html"])
    assert [question["question"] for question in data["questions"]] == ["Where is the trunk?", "What is it?"]
    assert all(view["frustum"] for question in data["questions"] for view in question["views"])
    assert len(read_boxes(outputs["json"])) == 1 and outputs["rrd"].stat().st_size > 10_000


def test_answers_are_shown_in_the_frame_that_infer_read_the_scan_in(run, scan, tmp_path, capsys):
    answers, room = tmp_path / "answers", tmp_path / "room.html"
    frame = ["--from-video", "--height", "2.9"]
    asked = ["--model", str(run), "--out", str(answers), "--ask", "What is it?"]
    assert cli.main(["infer", "--scene", str(scan), *frame, *asked]) == 0
    (prediction,) = read_predictions(answers / "predictions.jsonl")
    scene = read_scene(scan, align=AlignOptions(height=2.9, from_video=True))
    np.testing.assert_array_equal(np.float32(prediction.meta["axis_align"]), np.float32(scene.axis_align_44))
    words = ["view", str(answers), "--scene", str(scan), "--room", str(room)]
    assert cli.main([*words, *frame]) == 0 and room.exists()
    report = ["view", str(answers), "--scene", str(scan), "--html", str(room)]
    room.unlink()
    assert cli.main([*report, *frame]) == 0 and "scene with boxes" in room.read_text()
    room.unlink()
    capsys.readouterr()
    others = ([], ["--align", "none"], ["--from-video", "--height", "2.6"], ["--height", "2.95"])
    for command, other in [(command, other) for command in (words, report) for other in others]:
        assert cli.main([*command, *other]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "The answers were made in another frame of this scan; give view the --align, --up, --height, " in said
        assert "--from-video that infer had." in said
    assert not room.exists()
    del prediction.meta["axis_align"]
    write_predictions(answers / "predictions.jsonl", [prediction])
    assert cli.main(words) == 0 and room.exists()


def test_a_file_of_boxes_and_a_model_are_not_both_shown(run, scan, tmp_path, capsys):
    file = write_boxes(tmp_path / "boxes.json", ShownBoxes.from_rows([BOX]))
    words = ["view", str(file), "--scene", str(scan), "--model", str(run), "--top", str(tmp_path / "plan.png")]
    assert cli.main(words) == 1 and not (tmp_path / "plan.png").exists()
    assert f"--model detects boxes, and {file} holds some; leave one of them out." in capsys.readouterr().err


def test_detections_are_exported_and_opened_again(run, scan, tmp_path):
    export = tmp_path / "out" / "odd.npz"
    assert cli.main(["view", "--scene", str(scan), "--model", str(run), "--export", str(export)]) == 0
    scene = read_scene(scan)
    found, expected = to_world(read_boxes(export), scene, "scan"), detected_boxes(scene, run)
    assert len(found) == len(expected) > 0 and found.labels == expected.labels
    np.testing.assert_allclose(found.centers_K3, expected.centers_K3, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    assert all(0 <= score <= 1 for score in expected.scores if score is not None)
    assert cli.main(["view", str(export), "--scene", str(scan), "--top", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_a_prepared_scene_and_several(rooms_root, tmp_path, capsys):
    ids = SceneStore(rooms_root / "prepared").scene_ids[:2]
    rows = [Prediction(f"{name}-0", "qa", name, "Where?", "Here.", answer="Here.") for name in ids]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    words = ["view", str(tmp_path), "--data", str(rooms_root), "--room", str(tmp_path / "room.html")]
    assert cli.main(words) == 1
    assert f"This shows one scene, and there are 2; choose with --scene one of {ids[0]}, {ids[1]}." in (
        capsys.readouterr().err
    )
    assert cli.main([*words, "--scene", ids[1]]) == 0
    assert page_of(tmp_path / "room.html")["title"] == ids[1]
    assert cli.main(["view", "--scene", ids[0], "--data", str(rooms_root), "--top", str(tmp_path / "plan.png")]) == 0


def count_inside(boxes: ShownBoxes, points_N3: np.ndarray) -> list[int]:
    """How many points each box holds, from its corners alone."""
    counts = []
    for corners_83 in boxes.corners_K83:
        edges_33 = corners_83[[1, 3, 4]] - corners_83[0]
        share_N3 = (points_N3 - corners_83[0]) @ edges_33.T / (edges_33**2).sum(1)
        counts.append(int(((share_N3 >= -1e-4) & (share_N3 <= 1 + 1e-4)).all(1).sum()))
    return counts


@pytest.mark.real
def test_boxes_of_a_real_scan_hold_the_same_points_after_alignment(real_data, tmp_path):
    """ScanNet's aligned boxes and the raw cloud of scene0000_00, which our reader aligns a little differently."""
    official = json.loads((real_data / "scannet" / "scene0000_00_boxes.json").read_text())
    matrix_44 = np.array(official["axis_align_matrix"]).reshape(4, 4)
    aligned = ShownBoxes.from_rows([row["box_aligned"] for row in official["instances"]])
    with np.load(real_data / "scannet" / "scene0000_00_cloud.npz") as arrays:
        raw_N3 = arrays["xyz"].astype(np.float64)
    expected = count_inside(aligned, raw_N3 @ matrix_44[:3, :3].T + matrix_44[:3, 3])
    assert len(expected) == 27 and min(expected) > 5
    file = write_boxes(tmp_path / "raw.npz", aligned.moved(np.linalg.inv(matrix_44)))
    scene = read_scene(real_data / "scannet" / "scene0000_00_cloud.npz")
    assert np.abs(scene.axis_align_44[:2, :2] - matrix_44[:2, :2]).max() > 1e-3, "the alignments are not the same"
    found = count_inside(to_world(read_boxes(file), scene, "scan"), scene.points_N3.astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1, rtol=0.002)
