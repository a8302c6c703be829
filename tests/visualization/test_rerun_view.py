"""Rerun files: what is in them, read back with Rerun's own command."""

import ast
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.scene import save_scene
from threedr1.utils.camera import Camera, look_at, pinhole
from threedr1.utils.predictions import Prediction, write_predictions
from threedr1.utils.view_cameras import write_camera
from threedr1.visualization.rerun_view import box_archetype, question_text, show
from threedr1.visualization.shown_boxes import ShownBoxes
from threedr1.visualization.shown_scene import ShownScene, load_shown, shown_question

from ..odd_scene import BOX, odd_scene

rerun = pytest.importorskip("rerun")


def command(*words) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rerun", "rrd", *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(file, entity: str) -> list[dict[str, str]]:
    """The rows that a file has of one entity, by column, as text."""
    rows: list[dict[str, str]] = []
    names: list[str] = []
    for line in command("print", "-vvv", "--entity", entity, file).splitlines():
        cells = [cell.strip() for cell in line.strip("│ ").split("┆")]
        if cells[0].startswith("RowId"):
            names = cells
        elif cells[0].startswith("row_"):
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


def prediction(number: int, scene_id: str, **changes) -> Prediction:
    boxes = [BOX, [*BOX[:2], BOX[2] + 1, *BOX[3:]]][: 2 - number % 2]
    values = {"boxes": boxes, "target_boxes": [BOX], "think": "I <look>.", "answer": "At *it*: <obj3>"} | changes
    return Prediction(f"{scene_id}-{number}", "grounding", scene_id, f"Question {number}?", "text", **values)


@pytest.fixture
def answers(tmp_path):
    """Two scenes with two questions each; the first questions have a view, the second none."""
    folder = tmp_path / "answers"
    rows = []
    for name in ("odd", "even"):
        picture = folder / "views" / name / "frame-0.jpg"
        picture.parent.mkdir(parents=True)
        Image.fromarray(np.full((48, 64, 3), 120, np.uint8)).save(picture)
        pose_44 = look_at(np.array([1232.0, -989, 56.5]), np.array(BOX[:3]))
        write_camera(picture, Camera(pose_44, pinhole(64, 48, 60), 64, 48))
        rows += [prediction(0, name, views=[f"views/{name}/frame-0.jpg"]), prediction(1, name)]
        scene = odd_scene()
        scene.scene_id = name
        save_scene(scene, tmp_path / "prepared" / f"{name}.npz")
    write_predictions(folder / "predictions.jsonl", rows)
    return folder


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "taken.rrd").mkdir()
    with pytest.raises(ValueError, match=r"taken\.rrd cannot be written .*; choose another file"):
        show([ShownScene(odd_scene())], save=tmp_path / "taken.rrd")


def test_the_file_holds_scenes_questions_boxes_cameras_and_text(answers, tmp_path):
    file = tmp_path / "new" / "scenes.rrd"
    show(load_shown(answers, data_root=tmp_path), save=file)
    command("verify", file)
    points = rows_of(file, "/world/points")
    assert [row["question"] for row in points] == ["0", "2"], "a scene's points come with its first question"
    answered = rows_of(file, "/world/answered")
    counts = [(int(row["question"]), len(ast.literal_eval(row["Boxes3D:centers"]))) for row in answered]
    # question 0 has two boxes, 1 one, likewise 2 and 3; each begins with none, and none are left for the next scene
    assert [entry for entry in counts if entry[1]] == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2), (3, 1)]
    last = dict(counts)
    assert last == {0: 2, 1: 1, 2: 2, 3: 1}, "on the timeline of questions all boxes of each are shown"
    times = [row["time"] for row in answered if row["Boxes3D:centers"] != "[]" and row["question"] == "0"]
    assert times == ["PT0.5S", "PT1S"], "half a second between two boxes"
    centers = ast.literal_eval(answered[1]["Boxes3D:centers"])
    np.testing.assert_allclose(centers[0], BOX[:3], atol=1e-3)
    true = [row for row in rows_of(file, "/world/true") if row["Boxes3D:centers"] != "[]"]
    assert "trunk" in true[0]["Boxes3D:labels"]
    assert len(rows_of(file, "/world/views/1/picture")) >= 2 and len(rows_of(file, "/dialogue")) == 4


def test_boxes_of_a_file_appear_one_after_the_other(tmp_path):
    boxes = ShownBoxes.from_rows([BOX] * 3, ["a", "b", "c"], [0.5, None, 1.0])
    show([ShownScene(odd_scene(), boxes=boxes)], save=tmp_path / "boxes.rrd")
    rows = rows_of(tmp_path / "boxes.rrd", "/world/boxes")
    assert [len(ast.literal_eval(row["Boxes3D:centers"])) for row in rows] == [0, 1, 2, 3]
    assert [row["time"] for row in rows] == ["P0D", "PT0.5S", "PT1S", "PT1.5S"]
    assert "a 0.50" in rows[-1]["Boxes3D:labels"] and "c 1.00" in rows[-1]["Boxes3D:labels"]


def test_boxes_are_oriented_and_labelled():
    boxes = box_archetype(rerun, ShownBoxes.from_rows([[1, 2, 3, 4, 5, 6, np.pi / 2]], ["a"], [0.25]), (1, 2, 3))
    quaternion = boxes.quaternions.as_arrow_array().to_pylist()[0]
    np.testing.assert_allclose(quaternion, [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-6)
    assert boxes.half_sizes.as_arrow_array().to_pylist()[0] == [2, 2.5, 3]
    assert boxes.labels.as_arrow_array().to_pylist() == ["a 0.25"]


def test_markdown_shows_text_as_it_is(tmp_path):
    asked = shown_question(prediction(0, "odd", references=["a_b"], scores={"iou": 0.5}), None, tmp_path)
    text = question_text(asked)
    assert "**answer** At \\*it\\*: \\<obj3\\>" in text and "**think** I \\<look\\>." in text
    assert "**reference** a\\_b" in text and "iou: 0.5" in text


def test_views_that_are_no_jpeg_or_png_are_refused(answers, tmp_path):
    views = answers / "views" / "odd"
    (views / "frame-0.jpg").rename(views / "frame-0.gif")
    write_predictions(answers / "predictions.jsonl", [prediction(0, "odd", views=["views/odd/frame-0.gif"])])
    with pytest.raises(ValueError, match=r"frame-0\.gif is no JPEG or PNG picture"):
        show(load_shown(answers, data_root=tmp_path), save=tmp_path / "a.rrd")
