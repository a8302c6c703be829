"""References made from a data set, joined with prediction files of every form, and scored by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import threedr1
from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.tasks import load_samples
from threedr1.engine.references import object_rows, reference_of, score_dataset
from threedr1.utils.metrics.answer_rows import read_answers

from .. import data_factory as factory

SCENE, TRAIN = "scene0001_00", "scene0000_00"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    assert prepare_scans(root, workers=1) == []
    factory.write_more_annotations(root)
    return root


@pytest.fixture
def score(root, tmp_path):
    def run(task, scorer, dataset, content, split="val"):
        path = tmp_path / "predictions.json"
        path.write_text(json.dumps(content))
        return score_dataset(task, scorer, path, root=root, dataset=dataset, split=split)

    return run


def world_box(root, object_id):
    info = SceneStore(root / "prepared").index[SCENE]
    return info.boxes_K7[info.row_of(object_id)].tolist()


def test_a_reference_carries_what_scorers_need(root):
    store = SceneStore(root / "prepared")
    refer, *_ = load_samples(root, "val", ["scanrefer"], scenes=store)
    reference = reference_of(refer)
    assert reference.target_boxes == refer.target_boxes_K7.tolist() and reference.text == ""
    assert reference.meta["multiple"] is False and reference.meta["others"] is False
    (caption,) = load_samples(root, "val", ["scan2cap"], scenes=store)
    assert reference_of(caption).meta["query_box"] == caption.target_boxes_K7[0].tolist()
    assert reference_of(caption).meta["object_id"] == factory.CHAIR
    assert "query_box" not in caption.meta, "the sample's own meta stays as it is"
    rows = object_rows([caption], store.index)
    assert [(row.meta["object_id"], len(row.references)) for row in rows] == [(factory.CHAIR, 2), (factory.TABLE, 0)]


@pytest.mark.parametrize("prefix", ["", "scanrefer-"])
def test_scanrefer_from_an_object_of_ids(root, score, prefix):
    box = world_box(root, factory.CHAIR)
    half = [*box[:5], box[5] / 2, 0.0]
    half[2] -= box[5] / 4  # the lower half of the chair: an IoU of a half, less the official epsilon
    answers = {f"{prefix}{SCENE}-0-0": box, f"{prefix}{SCENE}-0-1": half}
    result = score("grounding", "scanrefer", "scanrefer", answers)
    assert (result["dataset"], result["split"], result["items"]) == ("scanrefer", "val", 2)
    assert result["metrics"]["Acc@0.25"] == 100 and result["metrics"]["Acc@0.5"] == 50
    assert result["metrics"]["Acc@0.5/unique"] == 50 and result["counts"]["multiple"] == 0


def test_nr3d_by_iou_by_id_and_by_the_nearest_object_are_three_numbers(root, score):
    chair, table = world_box(root, factory.CHAIR), world_box(root, factory.TABLE)
    assert score("grounding", "nr3d", "nr3d", {"nr3d-2": chair})["metrics"]["Acc@0.5"] == 100
    near = [chair[0] + 0.3, *chair[1:]]  # IoU of a quarter with the chair, none with the table
    result = score("grounding", "nr3d_nearest", "nr3d", {"2": near})
    assert result["metrics"]["Acc-nearest"] == 100 and "Acc@0.5" not in result["metrics"]
    by_iou = score("grounding", "nr3d", "nr3d", {"2": near})["metrics"]
    assert by_iou["Acc@0.5"] == 0 and "Acc" not in by_iou
    assert score("grounding", "nr3d_nearest", "nr3d", {"2": table})["metrics"]["Acc-nearest"] == 0
    row = {"sample_id": "2", "task": "grounding", "scene_id": SCENE, "question": "q", "text": ""}
    chosen = score("grounding", "nr3d", "nr3d", [{**row, "meta": {"chosen_object_id": factory.CHAIR}}])["metrics"]
    assert chosen["Acc"] == 100 and "Acc@0.5" not in chosen
    assert by_iou["Acc@0.25/easy"] is not None and by_iou["Acc@0.25/hard"] is None


TEXTS = {
    "scanqa": ("qa", "exact", {f"val-{SCENE[:9]}-0": "table"}, "EM"),
    "sqa3d": ("situated_qa", "sqa3d", {"220602000000": "table"}, "EM"),
    "dialogue": ("dialogue", "ll3da", {"dialogue-val-1": "hello, here is a table."}, "ROUGE-L"),
    "planning": ("planning", "ll3da", {"planning-val-1": "sit down on the chair"}, "ROUGE-L"),
    "scene_description": (
        "scene_description",
        "ll3da_per_sample",
        {"scene_description-val-1": "A room with a chair and a table."},
        "ROUGE-L",
    ),
    "object_caption": (
        "object_caption",
        "ngram",
        {f"object_caption-{SCENE}-0": "the chair right of the table."},
        "ROUGE-L",
    ),
}


def test_row_numbers_name_the_answers_of_files_without_ids(score):
    result = score("dialogue", "ll3da", "dialogue", {"1": "hello, here is a table."})
    assert result["metrics"]["ROUGE-L"] == pytest.approx(1)
    with pytest.raises(ValueError, match="lacks 1 of 1 answers, for instance 1; .* for instance 2"):
        score("dialogue", "ll3da", "dialogue", {"2": "hello, here is a table."})


@pytest.mark.parametrize("dataset", TEXTS)
def test_the_readers_ids_name_the_answers(score, dataset):
    task, scorer, answers, metric = TEXTS[dataset]
    result = score(task, scorer, dataset, answers)
    assert result["metrics"][metric] == pytest.approx(100 if result["unit"] == "percent" else 1)
    with pytest.raises(ValueError, match="lacks 1 of 1 answers"):
        score(task, scorer, dataset, {"another": "x"})


def test_embodied_qa_and_cap3d(score):
    result = score("qa", "exact", "embodied_qa", {"embodied_qa-train-1": "table"}, "train")
    assert result["metrics"]["EM"] == 100
    caption = {f"cap3d-{TRAIN}": "a chair, tall"}
    assert score("object_caption", "ngram", "cap3d", caption, "train")["metrics"]["ROUGE-L"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("dataset", "text"),
    [("scan2cap", "the chair right of the table ."), ("scan2cap_nr3d", "the chair left of the table")],
)
def test_captions_of_proposals_are_matched_with_all_objects(root, score, dataset, text):
    chair, table = world_box(root, factory.CHAIR), world_box(root, factory.TABLE)
    rows = [
        {"sample_id": "a", "scene_id": SCENE, "prediction": text, "boxes": [chair]},
        {"sample_id": "b", "scene_id": SCENE, "prediction": "a table", "boxes": [table]},  # not annotated: ignored
    ]
    result = score("dense_caption", "detect", dataset, rows)
    assert result["scorer"] == "scan2cap_ll3da" and result["items"] == 1
    assert result["metrics"]["ROUGE-L@0.5"] == pytest.approx(1)
    elsewhere = [{**rows[0], "scene_id": "scene0777_00"}, {**rows[0], "sample_id": "c", "boxes": [table]}]
    result = score("dense_caption", "detect", dataset, elsewhere)
    assert result["metrics"]["ROUGE-L@0.5"] < 0.8, "only sos and eos are right"
    assert "1 captions are about scenes" in result["notes"][0]
    with pytest.raises(ValueError, match=r"\(b\): a caption of a proposal needs scene_id and a box"):
        score("dense_caption", "detect", dataset, [rows[0], {"sample_id": "b", "scene_id": SCENE, "text": "x"}])


def test_captions_of_given_objects(root, score):
    name, forms = f"scan2cap-{SCENE}-0", {"detect": "the chair right of the table ."}
    forms["oracle_leo"] = "the chair right of the table."  # this form compares with whole descriptions
    for scorer, text in forms.items():
        result = score("dense_caption", scorer, "scan2cap", {name: text})
        assert result["metrics"]["ROUGE-L@0.5"] == pytest.approx(1)
        assert result["notes"][0].startswith("1 of 1 captions name no box")
        row = {"sample_id": name, "scene_id": SCENE, "text": text, "boxes": [world_box(root, factory.TABLE)]}
        result = score("dense_caption", scorer, "scan2cap", [row])
        assert result["metrics"]["ROUGE-L@0.5"] < 0.8, "the box that the answer names is another object's"
        assert not any("name no box" in note for note in result["notes"])


def test_what_does_not_fit_is_one_sentence(root, score):
    with pytest.raises(ValueError, match="scanqa is of task qa, not grounding; give --task qa"):
        score("grounding", None, "scanqa", {"a": []})
    with pytest.raises(ValueError, match="Unknown data set 'scanrefr'; did you mean 'scanrefer'"):
        score("grounding", None, "scanrefr", {"a": []})
    with pytest.raises(ValueError, match="There is no annotation file"):
        score("qa", None, "scanqa", {"a": "b"}, "tset")
    with pytest.raises(ValueError, match="has no scorer 'best'"):
        score("qa", "best", "scanqa", {"a": "b"})


def test_the_boxes_of_a_reference_are_in_the_world_frame(root):
    store = SceneStore(root / "prepared")
    sample = load_samples(root, "val", ["scanrefer"], scenes=store)[0]
    (box,) = reference_of(sample).target_boxes
    np.testing.assert_allclose(box[:6], np.concatenate(factory.OBJECTS[factory.CHAIR]), atol=1e-5)


def test_the_command_scores_from_a_data_root(root, tmp_path, capsys):
    from threedr1.main import main

    path = tmp_path / "p.json"
    path.write_text(json.dumps({f"val-{SCENE[:9]}-0": ["a chair", "table"]}))
    place = ["--data", str(root), "--dataset", "scanqa", "--split", "val"]
    assert main(["score", "--task", "qa", "--scorer", "exact", *place, "--predictions", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dataset"], result["split"], result["scorer"]) == ("scanqa", "val", "exact")
    assert result["metrics"]["EM"] == 0, "the first answer counts"


def test_the_documented_forms_are_read(tmp_path):
    text = (Path(threedr1.__file__).parent / "docs" / "predictions.md").read_text(encoding="utf-8")
    examples = [line for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    tasks = ["qa", "grounding", "qa", "grounding", "qa", "dense_caption", "dense_caption"]
    for task, example in zip(tasks, examples, strict=True):
        (tmp_path / "p.json").write_text(example)
        problems = []
        entries = read_answers(task, tmp_path / "p.json", problems).entries
        assert problems == [] and entries, example
        assert all(entry.boxes or entry.text or entry.sample_id.endswith("12-1") for entry in entries)
