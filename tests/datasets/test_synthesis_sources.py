"""Where questions, descriptions and views come from: SceneVerse and 3D-LLM files, what is told, what is shown."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis import InputOptions, synthesize
from threedr1.datasets.synthesis.description import Describer, caption_lists, describe, load_captions, object_list
from threedr1.datasets.synthesis.filters import FilterOptions, check_gold
from threedr1.datasets.synthesis.journal import request_key
from threedr1.datasets.synthesis.prompts import answer_prompt
from threedr1.datasets.synthesis.sources import Question, load_questions
from threedr1.datasets.synthesis.teacher import Request, media_type
from threedr1.datasets.synthesis.views import MOST_BYTES, UniformViews, shrink, within_limits

from .. import data_factory as factory

TRAIN, VAL = "scene0000_00", "scene0001_00"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Without further annotations: these scenes have no captions until a test writes some."""
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A data root of one's own, to break. Its pictures stay where they were."""
    copy = factory.copy_of_root(prepared, tmp_path / "root")
    (copy / "scans").symlink_to(prepared / "scans")
    return copy


def put(root: Path, name: str, rows: object) -> Path:
    path = root / "annotations" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def questions_of(root: Path, *sources: str) -> list[Question]:
    store = SceneStore(root / "prepared")
    return load_questions(root, store, split="train", seed=0, limit=0, sources=sources)[0]


OFFICIAL = {
    "item_id": "scene0000_00_0_1",
    "scan_id": TRAIN,
    "target_id": str(factory.CHAIR),
    "instance_type": "office_chair",
    "utterance": "The chair that is in front of the table.",
}
OWN = {"scene_id": TRAIN, "question": "What is low?", "answers": ["table", "the table"], "object_ids": [factory.TABLE]}


# ---- SceneVerse


def test_sceneverse_rows_are_descriptions_of_objects_or_questions(root):
    put(root, "sceneverse/ssg_ref_rel2.json", [OFFICIAL])
    (root / "annotations" / "sceneverse" / "own.jsonl").write_text(json.dumps(OWN) + "\n")
    asked = {one.task: one for one in questions_of(root, "sceneverse")}
    assert set(asked) == {"grounding", "qa"}
    grounding, qa = asked["grounding"], asked["qa"]
    assert grounding.question_id == "sceneverse-ssg_ref_rel2-scene0000_00_0_1"
    assert grounding.text == OFFICIAL["utterance"] and grounding.object_ids == (factory.CHAIR,)
    assert grounding.target_names == ("office chair",) and len(grounding.target_boxes) == 1
    assert qa.question_id == "sceneverse-own-1" and qa.gold_answers == ("table", "the table")
    assert {one.source for one in asked.values()} == {"sceneverse"}


def test_sceneverse_is_asked_where_it_is_there_and_is_no_missing_file_where_not(root, caplog):
    assert "sceneverse" not in {one.source for one in questions_of(root)}
    assert "absent" not in caplog.text
    put(root, "sceneverse/a.json", [OWN])
    assert "sceneverse" in {one.source for one in questions_of(root)}


def test_sceneverse_rows_of_other_scenes_and_of_structure_are_left_out_and_counted(root):
    wall = {**OFFICIAL, "target_id": factory.WALLS, "item_id": "wall"}
    put(root, "sceneverse/a.json", [OFFICIAL, {**OFFICIAL, "scan_id": VAL}, {**OWN, "scene_id": "scene0999_00"}, wall])
    store = SceneStore(root / "prepared")
    questions, left_out = load_questions(root, store, split="train", seed=0, limit=0, sources=["sceneverse"])
    assert len(questions) == 1 and left_out == {"other_split": 2, "no_box": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**OFFICIAL, "target_id": 77}, "names object 77"),
        ({**OFFICIAL, "utterance": " "}, "'utterance' is empty"),
        ({"scan_id": TRAIN, "target_id": 0}, "'description' is missing"),
        ({**OWN, "answers": []}, "has no answer"),
        ({"question": "What?"}, "'scene_id' is missing"),
    ],
)
def test_broken_sceneverse_rows_are_one_sentence_with_their_place(root, row, said):
    put(root, "sceneverse/a.json", [OFFICIAL, row])
    with pytest.raises(ValueError, match=said) as caught:
        questions_of(root, "sceneverse")
    assert "a.json, row 2" in str(caught.value)


# ---- 3D-LLM descriptions


def test_scene_descriptions_are_asked_for_only_by_name(root):
    assert "scene_description" not in {one.source for one in questions_of(root)}
    (one,) = questions_of(root, "scene_description")
    assert (one.task, one.text) == ("scene_description", "Describe the room.")
    assert one.gold_answers == ("A room with a chair and a table.",)
    assert set(one.target_names) == {"office chair", "table"}  # what the description names of the scene


def test_a_description_agrees_where_it_names_half_of_what_the_gold_one_names():
    names = ("bed", "desk", "lamp", "office chair")
    one = Question("q", "scene_description", "s", "scene_description", "Describe.", (), names, ("gold",), ())
    options = FilterOptions()
    assert check_gold("Two beds stand by a chair.", one, options) == ""
    assert check_gold("A bed.", one, options) == "gold_description"
    assert check_gold("A bed.", one, replace(options, min_named_share=0.25)) == ""
    assert check_gold("A void.", replace(one, target_names=()), options) == ""


def test_repeated_questions_keep_every_answer(root):
    rows = json.loads((root / "annotations" / "3d_llm_scene_description_train.json").read_text())
    put(root, "3d_llm_scene_description_train.json", [*rows, {**rows[0], "answers": ["A small office."]}])
    (one,) = questions_of(root, "scene_description")
    assert one.gold_answers == ("A room with a chair and a table.", "A small office.")


def test_captions_come_first_and_3d_llm_fills_the_gaps(root):
    assert load_captions(root) == {}
    assert load_captions(root, "train") == {TRAIN: "A room with a chair and a table."}
    put(root, "scene_caption.json", {TRAIN: {"captions": ["One.", " Two. "]}, "other": {"captions": []}})
    assert caption_lists(root, "train") == {TRAIN: ["One.", "Two."], "other": []}
    put(root, "scene_caption.json", {"other": {"captions": []}})
    assert caption_lists(root, "train")[TRAIN] == ["A room with a chair and a table."]
    put(root, "3d_llm_scene_description_train.json", [{"answers": ["x"]}])
    with pytest.raises(ValueError, match="scene_id"):
        caption_lists(root, "train")


def test_the_real_scene_descriptions_are_read(real_data):
    # 912 rows, several a scene
    folder = real_data / "annotations"
    rows = json.loads((folder / "3d_llm_scene_description_train.json").read_text())
    captions = caption_lists(real_data, "train")
    assert set(captions) == {row["scene_id"] for row in rows}
    assert sum(map(len, captions.values())) == len(rows) == 912


# ---- named sources


@pytest.mark.parametrize(
    ("sources", "said"),
    [(["scanqa", "vqa"], "Unknown source 'vqa'"), (["sceneverse"], "needs .*sceneverse; put it there")],
)
def test_sources_that_are_not_there_are_one_sentence(root, sources, said):
    with pytest.raises(ValueError, match=said):
        questions_of(root, *sources)


def test_named_sources_are_the_only_ones(root):
    assert {one.source for one in questions_of(root, "nr3d", "nr3d")} == {"nr3d"}


def test_an_empty_source_file_is_one_sentence(root):
    put(root, "ScanQA_v1.0_train.json", [])
    with pytest.raises(ValueError, match="hold no question"):
        questions_of(root, "scanqa")


# ---- what the teacher is told


def test_descriptions_are_full_boxes_alone_or_none_and_never_hold_the_answer(root):
    index = SceneStore(root / "prepared").index
    captions = {TRAIN: "An office."}
    qa = Question("q", "scanqa", TRAIN, "qa", "What?", (), (), ("table",), ())
    asked_to_describe = replace(qa, task="scene_description")
    full = Describer(index, captions)
    assert full(qa) == describe(index[TRAIN], captions) and full(qa).startswith("An office. Objects")
    assert "An office." not in full(asked_to_describe) and full(asked_to_describe).startswith("This scene holds")
    assert Describer(index, captions, "objects")(qa) == object_list(index[TRAIN])
    assert Describer(index, captions, "none")(qa) == ""
    with pytest.raises(ValueError, match="full, objects, none"):
        Describer(index, captions, "some")


def test_prompts_without_a_description_do_not_speak_of_one():
    one = Question("q", "scanqa", "s", "qa", "What?", (), (), ("table",), ())
    told = answer_prompt(one, "A room.")
    assert told.startswith("A room. Following the scene description, think step by step and answer the following")
    untold = answer_prompt(one, "", 3)
    assert "description" not in untold and "Think step by step and answer the following question" in untold
    assert untold.startswith("The 3 pictures show") and answer_prompt(one, "", 1).startswith("The picture shows")


# ---- what it is shown


def size_of(view: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(view)).size


def test_views_are_shrunk_to_their_longest_side_and_never_grown():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
    assert size_of(shrink(picture, 300)) == (300, 200)
    assert size_of(shrink(picture.rotate(90, expand=True), 300)) == (200, 300)
    assert size_of(shrink(picture, 2000)) == (900, 600)
    assert media_type(shrink(picture.convert("RGBA"), 300)) == "image/jpeg"


def test_uniform_views_are_the_scenes_own_frames(root):
    store = SceneStore(root / "prepared")
    views = UniformViews(store, 5, 64)
    views.require([TRAIN])
    shown = views(TRAIN, "any question")
    assert len(shown) == 2 and {size_of(view) for view in shown} == {(64, 48)}  # the third frame has no pose
    first = np.asarray(Image.open(io.BytesIO(shown[0])).convert("RGB"), np.float32)
    own = np.asarray(Image.open(store[TRAIN].frames[0].color_path).convert("RGB"), np.float32)
    assert np.abs(first - own).mean() < 12  # compressed anew, the same picture
    assert views(TRAIN, "another") == shown
    assert len(UniformViews(store, 1, 64)(TRAIN, "")) == 1


def test_too_many_views_for_a_request_are_one_sentence(root):
    store = SceneStore(root / "prepared")
    with pytest.raises(ValueError, match="1 to 16 views, not 17"):
        UniformViews(store, 17)
    with pytest.raises(ValueError, match="64 to 2048 pixels"):
        UniformViews(store, 4, 9000)
    assert within_limits([b"a", b"b"], "s") == (b"a", b"b")
    with pytest.raises(ValueError, match="17 views of scene s"):
        within_limits([b"a"] * 17, "s")
    with pytest.raises(ValueError, match=r"take 14\.0 MB"):
        within_limits([bytes(MOST_BYTES + 1)], "s")
    with pytest.raises(ValueError, match="no pictures"):
        within_limits([], "s")


def test_a_scene_without_frames_is_said_before_anything_is_asked(tmp_path):
    root = factory.write_root(tmp_path / "root")
    for scan in (root / "scans").iterdir():
        for name in ("color", "depth", "pose"):
            shutil.rmtree(scan / name)
    assert prepare_scans(root, workers=1) == []
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=f"Scene {TRAIN} has no pictures"):
        synthesize(root, out, inputs=InputOptions(views=2))
    assert not out.exists()


def test_views_change_what_is_asked_and_text_alone_keeps_its_key():
    one = Question("q", "scanqa", "s", "qa", "What?", (), (), ("table",), ())
    keys = [request_key("t", Request(one, "p", images=images)) for images in ((), (b"a",), (b"b",), (b"a", b"b"))]
    assert len(set(keys)) == 4
    assert request_key("t", Request(one, "p", images=(b"a",))) == keys[1]
    with pytest.raises(ValueError, match="PNG or JPEG"):
        media_type(b"GIF89a")


def test_the_rule_teacher_runs_with_views_and_without_a_description(root, tmp_path):
    inputs = InputOptions(sources=("scanqa", "scanrefer"), description="none", views=2, view_size=64)
    report = synthesize(root, tmp_path / "out.jsonl", inputs=inputs)
    assert report["settings"]["inputs"] == {
        "sources": ["scanqa", "scanrefer"],
        "description": "none",
        "views": 2,
        "view_size": 64,
    }
    plain = synthesize(root, tmp_path / "plain.jsonl", inputs=InputOptions(sources=("scanqa", "scanrefer")))
    assert report["questions"] == plain["questions"] == 3 and report["kept"] == plain["kept"]
