"""Files of predictions and references: accepted forms, and what is said about broken ones."""

import json

import pytest

from threedr1.utils.metrics.files import join, load_scored_pairs
from threedr1.utils.metrics.score import score_file, score_predictions
from threedr1.utils.predictions import Prediction, read_predictions, write_predictions

BOX = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


@pytest.fixture
def questions(write):
    return write("val.json", [{"question_id": key, "question": "q", "answers": ["x", "y"]} for key in ("1", "2")])


def own(index=0, task="grounding", **fields):
    defaults = {"sample_id": f"s{index}", "task": task, "scene_id": "scene", "question": f"q{index}", "text": ""}
    return Prediction(**(defaults | fields))


class TestMappings:
    def test_answers(self, write, questions):
        result = score_file("qa", "exact", questions, write("p.json", {"2": "y", "1": "wrong"}))
        assert result["items"] == 2 and result["metrics"]["EM"] == 50

    def test_ten_answers(self, write, questions):
        ten = ["no"] * 9 + ["x"]
        pairs = load_scored_pairs("qa", questions, write("p.json", {"1": ten, "2": ten}))
        assert [entry.text for entry in pairs] == ["no", "no"]
        assert pairs[0].meta["answer_top10"] == ten

    def test_one_line_of_json_lines(self, write, questions):
        assert score_file("qa", "exact", questions, write("p.jsonl", {"1": "x", "2": "x"}))["metrics"]["EM"] == 100

    def test_boxes(self, write):
        references = write("r.json", [])
        write_predictions(references, [own(index, target_boxes=[[*BOX, 0.0]]) for index in range(3)])
        answers = write("p.json", {"s0": BOX, "s1": [*BOX, 0.1], "s2": []})
        pairs = load_scored_pairs("grounding", references, answers)
        assert [entry.boxes for entry in pairs] == [[[*BOX, 0.0]], [[*BOX, 0.1]], []]

    def test_ids_with_the_name_of_the_data_set(self, write):
        references = [own(0, sample_id="scanrefer-scene-4-0", target_boxes=[[*BOX, 0.0]])]
        for name in ("scene-4-0", "scanrefer-scene-4-0"):
            assert join(references, write("p.json", {name: BOX}))[0].boxes == [[*BOX, 0.0]]

    def test_row_numbers_where_references_have_no_ids(self, write):
        rows = [{"scene_id": "s", "question": "what next?", "answers": [text]} for text in ("go left", "sit down")]
        references = write("r.json", rows)
        for answers in (
            {"1": "go left", "2": "sit down"},
            {"planning-val-2": "sit down", "planning-val-1": "go left"},
        ):
            pairs = load_scored_pairs("planning", references, write("p.json", answers))
            assert [entry.text for entry in pairs] == ["go left", "sit down"]
        with pytest.raises(ValueError, match="lacks 1 of 2 answers, for instance 2"):
            load_scored_pairs("planning", references, write("p.json", {"1": "go left"}))

    @pytest.mark.parametrize(
        "content, message",
        [
            (b'{"1": "x", "2": "y", "1": "z"}', "p.json, 1: occurs twice in one object"),
            ({"1": "x", "2": 5}, r"p.json \(2\): must be a text, not 5"),
            ({"1": "x", "2": ["a", 5]}, r"p.json \(2\): must be a list of texts; one must be a text, not 5"),
            ({"1": "x", "2": []}, r"\(2\): must hold at least one text"),
            ({"1": "x", "2": None}, r"\(2\): must be a text, not None"),
            ({"": "x"}, "an id must not be empty"),
            # one row is not {id: answer}
            ({"question_id": "1", "answer": "x"}, "lacks 1 of 2 answers, for instance 2"),
            ({"sample_id": "1", "task": "qa"}, r"line 1 \(1\), answer: there is no answer"),
            ({}, "holds no predictions of this task"),
        ],
    )
    def test_broken(self, write, questions, content, message):
        with pytest.raises(ValueError, match=message):
            score_file("qa", "exact", questions, write("p.json", content))

    @pytest.mark.parametrize("task, answer", [("planning", ["x", "y"]), ("grounding", "x"), ("grounding", [BOX])])
    def test_answers_of_another_task(self, write, task, answer):
        references = [own(0, task, references=["x"], target_boxes=[[*BOX, 0.0]])]
        with pytest.raises(ValueError, match=r"p.json \(s0\): (must be a text|a box must be 6 or 7)"):
            join(references, write("p.json", {"s0": answer}))


class TestBrokenFiles:
    def test_every_row_is_heard(self, write, questions):
        rows = [{"question_id": str(number), "answer": number} for number in range(7)]
        with pytest.raises(ValueError) as caught:
            score_file("qa", "exact", questions, write("p.json", rows))
        message = str(caught.value)
        assert message.startswith("7 problems, the first 5: ") and "\n" not in message
        assert "p.json, row 1 (0), answer: must be a text, not 0; " in message
        assert "row 5 (4)" in message and "row 6" not in message

    def test_both_files_are_heard(self, write):
        references = write("r.json", [{"question_id": "1", "answers": [5]}, {"question_id": "2", "answers": "x"}])
        answers = write("p.jsonl", b'{"question_id": "1", "answer": null}\n{"question\n[]\n')
        with pytest.raises(ValueError) as caught:
            score_file("qa", "exact", references, answers)
        for words in (
            "5 problems: ",
            "r.json, row 1 (1), answers: must be a list of texts; one must be a text, not 5; ",
            "r.json, row 2 (2), answers: must be a list of texts, not 'x'; ",
            "p.jsonl, line 1 (1), answer: must be a text, not None",
            "p.jsonl, line 2: not JSON (",
            "p.jsonl, line 3: must be a JSON object",
        ):
            assert words in str(caught.value)

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"answer_top10": "abc"}, "answer_top10: must be a list of texts, not 'abc'"),
            ({"answer_top10": ["a", None]}, "answer_top10: .* not None"),
            ({"answer_top10": []}, "answer_top10: must hold at least one text"),
            ({"answer": "x", "boxes": 5}, "boxes: must be a list of boxes, not 5"),
            ({"answer": "x", "scene_id": 5}, "scene_id: must be a text, not 5"),
            ({"answer": "x", "question_id": True}, "question_id: must be a text or a whole number, not True"),
            ({"answer": "x", "question_id": {"a": 1}}, "question_id: must be a text or a whole number"),
            ({"answer": "\ud800"}, "answer: holds half a character"),
        ],
    )
    def test_rows(self, write, questions, row, message):
        rows = [{"question_id": "1", **row}, {"question_id": "2", "answer": "x"}]
        with pytest.raises(ValueError, match=f"p.json, row 1.*, {message}"):
            score_file("qa", "exact", questions, write("p.json", rows))

    @pytest.mark.parametrize(
        "box, message",
        [
            ([float("nan"), *BOX[1:]], "6 or 7 finite numbers"),
            ([float("inf"), *BOX[1:]], "6 or 7 finite numbers"),
            ([10**400, *BOX[1:]], "6 or 7 finite numbers"),
            ([True, *BOX[1:]], "6 or 7 finite numbers"),
            (BOX[:5], "6 or 7 finite numbers"),
            ([*BOX[:3], 1, -1, 1], r"sizes of a box must be positive, not \[1, -1, 1\]"),
            ([*BOX[:3], 1, 0, 1], "sizes of a box must be positive"),
        ],
    )
    @pytest.mark.parametrize("form", ["boxes", "pred_box", "mapping", "own"])
    def test_boxes(self, write, box, message, form):
        references = [own(0, target_boxes=[[*BOX, 0.0]])]
        content = {
            "boxes": [{"sample_id": "s0", "boxes": [box]}],
            "pred_box": [{"sample_id": "s0", "pred_box": box}],
            "mapping": {"s0": box},
            "own": [vars(own(0, boxes=[box]))],
        }[form]
        with pytest.raises(ValueError, match=rf"p.json(, row 1)? \(s0\)(, box(es)?)?: .*{message}"):
            join(references, write("p.json", content))

    def test_grounding_without_a_box(self, write):
        with pytest.raises(ValueError, match=r"row 1 \(s0\), boxes: there is no box"):
            join([own(0, target_boxes=[[*BOX, 0.0]])], write("p.json", [{"sample_id": "s0", "answer": "chair"}]))

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"[" * 100_000, r"p.json is not whole JSON \(nested too deeply\)"),
            (b'[{"question_id": "1",\n "answer"', r"is not whole JSON \(.*line 2 column"),
            (b"[1" + b"0" * 5000 + b"]", "too many digits"),
            (b'[{"question_id": "1", "answer": "x", "answer": "y"}]', "row 1, answer: occurs twice"),
            (b'[{"question_id": "1", "answer": "x", "a": [{"b": 1, "b": 2}]}]', "row 1, b: occurs twice"),
            ([[1]], "row 1: must be a JSON object"),
            (5, "must hold a list of JSON objects"),
            (b"", "is not whole JSON"),
            ("x".encode("utf-16"), "not a text file in UTF-8"),
        ],
    )
    def test_documents(self, write, questions, content, message):
        path = write("p.json", content)
        with pytest.raises(ValueError, match=message):
            score_file("qa", "exact", questions, path)
        with pytest.raises(ValueError):
            score_file("qa", "exact", path, path)
        with pytest.raises(ValueError):
            score_file("qa", "exact", None, path)

    def test_byte_order_mark(self, write, questions):
        answers = write("p.json", b"\xef\xbb\xbf" + json.dumps({"1": "x", "2": "y"}).encode())
        assert score_file("qa", "exact", questions, answers)["metrics"]["EM"] == 100
        lines = write("p.jsonl", b"\xef\xbb\xbf" + json.dumps({"sample_id": "1", "answer": "x"}).encode())
        with pytest.raises(ValueError, match="lacks 1 of 2"):
            score_file("qa", "exact", questions, lines)

    def test_mismatches_are_told_together(self, write, questions):
        rows = [{"question_id": key, "answer": "x"} for key in ("1", "1", "3", "3", "4")]
        with pytest.raises(ValueError) as caught:
            score_file("qa", "exact", questions, write("p.json", rows))
        for words in (
            "1 occurs 2 times among the predictions, and 1 more are repeated",
            "lacks 1 of 2",
            "holds 2 ans",
        ):
            assert words in str(caught.value)


class TestSqa3d:
    ROW = {"question_id": 7, "scene_id": "s", "answers": [{"answer": "two"}]}

    @pytest.mark.parametrize(
        "annotations, message",
        [
            (5, "'annotations' must be a list of objects, not 5"),
            ([5], "annotation 1: must be an object, not 5"),
            ([{**ROW, "answers": [5]}], r"annotation 1 \(7\), answers: must be a list of texts"),
            ([{**ROW, "answers": 5}], r"annotation 1 \(7\), answers: must be a list of texts"),
            ([{**ROW, "answers": ["two"]}], r"annotation 1 \(7\), answers: must be a list of texts"),
            ([{**ROW, "answers": [{"answer": 5}]}], r"annotation 1 \(7\), answers: .* not 5"),
            ([{**ROW, "answers": []}], "answers: must hold at least one text"),
            ([{**ROW, "question_id": None}], "question_id: must be a text or a whole number, not None"),
            ([{}, ROW, []], "annotation 1, question_id: .*annotation 3: must be an object"),
        ],
    )
    def test_annotations(self, write, annotations, message):
        references = write("v1_balanced_sqa_annotations_test.json", {"annotations": annotations})
        with pytest.raises(ValueError, match=message):
            score_file("situated_qa", "sqa3d", references, write("p.json", {"7": "two"}))

    @pytest.mark.parametrize(
        "questions, message",
        [
            ([], "must hold an object with a list of questions"),
            ({"questions": [5]}, "question 1: must be an object"),
            ({"questions": [{"question_id": 7}]}, r"question 1 \(7\), question: must be a text, not None"),
        ],
    )
    def test_questions(self, write, questions, message):
        references = write("v1_balanced_sqa_annotations_test.json", {"annotations": [self.ROW]})
        write("v1_balanced_questions_test.json", questions)
        with pytest.raises(ValueError, match=message):
            score_file("situated_qa", "sqa3d", references, write("p.json", {"7": "two"}))


class TestJoin:
    def test_truth_comes_from_the_references(self, write):
        truth = {"multiple": True, "object_id": 3, "query_box": [*BOX, 0.0], "answer_top10": ["old"], "others": None}
        references = [own(0, "grounding", text="old", target_boxes=[[*BOX, 0.0]], meta=truth)]
        answers = write("p.json", [])
        write_predictions(
            answers, [own(0, text="new", boxes=[[*BOX, 0.0]], meta={"multiple": False, "mode": "think"})]
        )
        (pair,) = join(references, answers)
        assert pair.text == "new" and pair.boxes == [[*BOX, 0.0]]
        # an answer of the references is not scored in place of the prediction's
        assert pair.meta == {k: truth[k] for k in ("multiple", "object_id", "query_box", "others")} | {"mode": "think"}

    def test_one_task(self, write):
        path = write("p.json", {"s0": "x"})
        for references in ([], [own(0, "qa"), own(1, "planning")]):
            with pytest.raises(ValueError, match="exactly one task"):
                join(references, path)
        with pytest.raises(ValueError, match="p.json lacks 1 of 1 answers, for instance s1.*val does not ask"):
            join([own(1, "qa")], path, source="val")


class TestOwnFiles:
    def test_every_line_is_heard(self, write):
        row = vars(own(0, "qa"))
        lines = [row | {"text": 5}, row | {"meta": {"multiple": 1, "query_box": "x"}}, {"task": "qa"}, [1]]
        path = write("p.jsonl", "\n".join(map(json.dumps, lines)).encode())
        with pytest.raises(ValueError) as caught:
            read_predictions(path)
        for words in (
            "5 problems: ",
            "line 1 (s0), text: must be a text, not 5",
            "line 2 (s0), meta.query_box: a box must be",
            "line 2 (s0), meta.multiple: must be true or false, not 1",
            "line 3: missing sample_id, scene_id, question, text",
            "line 4: not a JSON object",
        ):
            assert words in str(caught.value)

    def test_flat_objects_are_real(self, tmp_path):
        flat = [*BOX[:3], 1.0, 0.0, 1.0, 0.0]
        write_predictions(tmp_path / "p.jsonl", [own(0, target_boxes=[flat], meta={"query_box": flat})])
        (entry,) = read_predictions(tmp_path / "p.jsonl")
        assert entry.target_boxes == [flat]
        assert score_predictions("grounding", [entry])["metrics"]["mIoU"] == 0

    def test_a_list_reads_like_lines(self, write):
        path = write("p.json", [vars(own(index, "qa", references=["x"])) for index in range(2)])
        assert [entry.sample_id for entry in read_predictions(path)] == ["s0", "s1"]


class TestOfficialAnnotations:
    @pytest.mark.parametrize(
        "task, scorer, name, items",
        [
            ("qa", "exact", "ScanQA_v1.0_val.json", 4675),
            ("situated_qa", "sqa3d", "v1_balanced_sqa_annotations_test_scannetv2.json", 3519),
            ("dialogue", "ll3da_per_sample", "3d_llm_embodied_dialogue_filtered_val.json", 1222),
            ("planning", "ll3da_per_sample", "3d_llm_embodied_planning_filtered_val.json", 2282),
            ("qa", "exact", "3d_llm_embodied_question_answer_val.json", 1938),
        ],
    )
    def test_an_object_of_right_answers_scores_full(self, write, real_data, task, scorer, name, items):
        path = real_data / "annotations" / name
        rows = json.loads(path.read_text())
        if isinstance(rows, dict):
            answers = {str(row["question_id"]): row["answers"][0]["answer"] for row in rows["annotations"]}
        else:
            answers = {str(row.get("question_id", number)): row["answers"][0] for number, row in enumerate(rows, 1)}
        result = score_file(task, scorer, path, write("p.json", answers), meteor=False)
        assert result["items"] == items
        metrics = result["metrics"]
        # not ROUGE-L: the scorer folds double blanks of answers, as published, and not those of references
        assert metrics["EM"] == 100 if "EM" in metrics else metrics["BLEU-4"] == pytest.approx(1)
