"""Files that would be scored as something that they are not: refused, or said."""

import json

import pytest

from threedr1.utils.metrics.files import join
from threedr1.utils.metrics.score import score_file, score_predictions
from threedr1.utils.predictions import Prediction, write_predictions


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def box_row(number, dataset):
    box = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    meta = {"dataset": dataset, "multiple": False, "others": False}
    return Prediction(f"{dataset}-{number}", "grounding", "s", "q", "", boxes=[box], target_boxes=[box], meta=meta)


def test_rows_of_two_data_sets_have_no_mean(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [box_row(0, "scanrefer"), box_row(1, "nr3d")])
    with pytest.raises(ValueError, match=r"2 data sets \(nr3d, scanrefer\).*--data, --dataset and --split"):
        score_file("grounding", "scanrefer", None, path)
    write_predictions(path, [box_row(0, "scanrefer"), box_row(1, "scanrefer")])
    assert score_file("grounding", "scanrefer", None, path)["metrics"]["Acc@0.5"] == 100.0


def test_answers_by_id_need_references(tmp_path):
    path = write(tmp_path / "p.json", {"val-scene0011_00-0": "brown"})
    with pytest.raises(ValueError, match="answers by id and no references; give --references"):
        score_file("qa", "exact", None, path)


def test_a_row_that_answers_twice_is_not_guessed_at(tmp_path):
    references = write(tmp_path / "r.json", [{"question_id": "1", "question": "q", "answers": ["x"]}])
    rows = [{"question_id": "1", "text": "wrong", "answer": "x"}]
    with pytest.raises(ValueError, match="answer: differs from text"):
        score_file("qa", "exact", references, write(tmp_path / "p.json", rows))
    rows = [{"question_id": "1", "text": "x", "answer": "x"}]
    assert score_file("qa", "exact", references, write(tmp_path / "p.json", rows))["metrics"]["EM"] == 100.0


def test_questions_that_are_not_known_are_in_no_group(tmp_path):
    rows = [{"question_id": 7, "scene_id": "s", "answers": [{"answer": "two"}]}]
    references = write(tmp_path / "v1_balanced_sqa_annotations_test_scannetv2.json", {"annotations": rows})
    predictions = write(tmp_path / "p.json", {"7": "two"})
    alone = score_file("situated_qa", "sqa3d", references, predictions)
    assert set(alone["metrics"]) == {"EM", "EM-R"} and "1 of 1 questions are not known" in alone["notes"][0]
    questions = [{"question_id": 7, "scene_id": "s", "situation": "", "question": "How many chairs are there?"}]
    write(tmp_path / "v1_balanced_questions_test_scannetv2.json", {"questions": questions})
    beside = score_file("situated_qa", "sqa3d", references, predictions)
    assert beside["metrics"]["EM/how"] == 100.0 and not beside["notes"]


def test_a_picked_object_is_not_a_box_of_no_overlap():
    row = box_row(0, "nr3d")
    row.boxes, row.meta = [], {"chosen_object_id": 3, "target_object_id": 3}
    result = score_predictions("grounding", [row], "nr3d")
    assert result["metrics"]["Acc"] == 100.0 and result["sample_score"] is None


def test_row_numbers_find_their_rows_where_nothing_else_does(tmp_path):
    rows = [
        {"question": "what?", "scene_id": "s", "answers": ["a"]},
        {"question": "and?", "scene_id": "s", "answers": ["b"]},
    ]
    references = write(tmp_path / "r.json", rows)
    for ids in (("2", "1"), ("dialogue-val-2", "dialogue-val-1")):
        answers = [{"sample_id": ids[0], "answer": "b"}, {"sample_id": ids[1], "answer": "a"}]
        result = score_file("dialogue", "ll3da_per_sample", references, write(tmp_path / "p.json", answers))
        assert result["metrics"]["ROUGE-L"] == 1.0
    # rows that say what was asked go by it, as their numbers may be those of another file
    answers = [
        {"sample_id": "2", "scene_id": "s", "question": "what?", "answer": "a"},
        {"sample_id": "1", "scene_id": "s", "question": "and?", "answer": "b"},
    ]
    result = score_file("dialogue", "ll3da_per_sample", references, write(tmp_path / "p.json", answers))
    assert result["metrics"]["ROUGE-L"] == 1.0


def test_picked_objects_are_an_answer_without_a_box(tmp_path):
    reference = box_row(24, "nr3d")
    reference.meta |= {"target_object_id": 2}
    path = write(tmp_path / "p.json", [{"sample_id": "24", "chosen_object_id": 2}])
    (entry,) = join([reference], path)
    assert entry.meta["chosen_object_id"] == 2 and entry.boxes == []
    assert score_predictions("grounding", [entry], "nr3d")["metrics"]["Acc"] == 100.0
    with pytest.raises(ValueError, match="chosen_object_id: must be a text or a whole number"):
        join([reference], write(tmp_path / "p.json", [{"sample_id": "24", "chosen_object_id": [2]}]))
