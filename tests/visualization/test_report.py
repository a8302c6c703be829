"""Pictures, the HTML report and the Rerun file."""

import json

import pytest

from threedr1.datasets.scene_store import SceneStore
from threedr1.utils.predictions import Prediction, write_predictions
from threedr1.visualization.palette import ANSWERED
from threedr1.visualization.pictures import overview, save_picture, scene_picture
from threedr1.visualization.report import choose_examples, write_report


@pytest.fixture(scope="module")
def scene(rooms_root):
    store = SceneStore(rooms_root / "prepared")
    return store[store.scene_ids[0]]


def prediction(scene, name="a", **changes):
    values = {
        "sample_id": name,
        "task": "grounding",
        "scene_id": scene.scene_id,
        "question": "Where is <the> chair?",
        "text": "<think>First & last.</think><answer>There</answer>",
        "think": "First & last.",
        "answer": "There",
        "well_formed": True,
        "boxes": [scene.boxes_K7[0].tolist()],
        "target_boxes": [scene.boxes_K7[1].tolist()],
        "references": ["there"],
    }
    return Prediction(**{**values, **changes})


def test_overview_shows_the_room_and_boxes_are_drawn_in_their_colour(scene, tmp_path):
    plain, camera = overview(scene, 320, 240)
    filled = (plain != 255).any(-1).mean()
    assert plain.shape == (240, 320, 3) and 0.15 < filled < 1
    uv_K2, depth_K = camera.project(scene.boxes_K7[:, :3])
    assert (depth_K > 0).all() and (uv_K2 > 0).all() and (uv_K2 < [320, 240]).all()
    drawn = scene_picture(scene, [(scene.boxes_K7[:1].tolist(), ANSWERED)], width=320)
    assert (drawn == ANSWERED).all(-1).sum() > 30
    assert save_picture(drawn, tmp_path / "a" / "b.png").stat().st_size > 1000


def test_examples_come_by_order_from_different_scenes(scene):
    rows = [prediction(scene, "1"), prediction(scene, "2"), prediction(scene, "3", scene_id="other")]
    assert [entry.sample_id for entry in choose_examples(rows, 2)] == ["1", "3"]
    assert [entry.sample_id for entry in choose_examples(rows, 3)] == ["1", "3", "2"]


def test_report_holds_scores_curves_and_escaped_text(scene, rooms_root, tmp_path):
    run = tmp_path / "run"
    folder = run / "eval" / "sft"
    write_predictions(folder / "predictions.jsonl", [prediction(scene)])
    scores = {
        "task": "grounding",
        "scorer": "scanrefer",
        "questions": 1,
        "unit": "percent",
        "metrics": {"mIoU": 12.5, "Acc@0.25": 50.0},
        "intervals": {"Acc@0.25": [10.0, 90.0]},
    }
    (folder / "results.json").write_text(json.dumps({"label": "sft", "results": {"scanrefer": scores}}))
    (run / "sft").mkdir()
    (run / "sft" / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    path = write_report(run, run / "report.html", data_root=rooms_root)
    page = path.read_text()
    assert "50.0" in page and "10–90" in page and "<svg" in page
    assert "Where is &lt;the&gt; chair?" in page and "First &amp; last." in page
    assert page.count("data:image/jpeg;base64") == 1


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_training_run_alone_is_reported_with_its_curves(tmp_path):
    run = tmp_path / "sft"
    common = {"loss/qa": 1.0, "lr": 1e-4, "sequence_tokens": 9}
    rows = [{"step": step, "loss": 2 - step / 9, **common} for step in range(9)]
    evaluated = {"step": 8, "eval/loss": 1.2, "eval/loss/scene_description": 1.4, "eval/scanqa/EM@1": 30.0}
    write_rows(run / "metrics.jsonl", [*rows, evaluated])
    write_rows(run / "speed.jsonl", [{"step": step, "tokens_per_s": 100.0 + step} for step in range(9)])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')  # the run is being killed, or writing
    page = write_report(run, run / "report.html").read_text()
    assert page.count("<svg") == 6
    titles = ("cross-entropy per token", "cross-entropy by task", "held-out cross-entropy", "held-out scores")
    for text in (*titles, "learning rate", "tokens a second"):
        assert f"<!-- SFT: {text}" in page, text
    assert "<!-- scene description -->" in page
    assert "gradient norm" not in page, "nothing is drawn of what is not there"
    assert "Examples" not in page and "Scores" not in page


@pytest.mark.parametrize(
    ("row", "title"), [({"reward": 1.0}, "GRPO: reward"), ({"loss": 1.0, "map50": 0.2}, "Scene encoder: loss")]
)
def test_runs_of_the_other_loops_are_told_apart(tmp_path, row, title):
    write_rows(tmp_path / "metrics.jsonl", [{"step": 0, **row}])
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert f"<!-- {title} -->" in page and "SFT" not in page


def test_a_broken_row_of_metrics_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: not JSON"):
        write_report(tmp_path, tmp_path / "report.html")


def test_nothing_to_report_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is nothing to report on"):
        write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("content", ["{", "[]", '{"results": {}}'])
def test_broken_results_are_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results.json is not what `eval` writes"):
        write_report(tmp_path, tmp_path / "report.html")
