"""The registry of scorers, per-sample scores, and prediction files of ours and of other models."""

import json

import pytest

from threedr1 import main as cli
from threedr1.datasets.scene import TASKS
from threedr1.utils.metrics import caption, java
from threedr1.utils.metrics.score import (
    ALIASES,
    DEFAULT_SCORERS,
    SCORERS,
    answer_text,
    sample_score,
    score_file,
    score_predictions,
    scorer_name,
)
from threedr1.utils.predictions import Prediction, write_predictions

BOX = [1.0, 2, 0.5, 1, 1, 1, 0]
FAR = [9.0, 2, 0.5, 1, 1, 1, 0]


def prediction(index=0, task="qa", **fields):
    defaults = {
        "sample_id": f"sample{index}",
        "task": task,
        "scene_id": f"scene{index // 2:04d}_00",
        "question": f"question {index}?",
        "text": "",
        "answer": "a chair",
        "references": ["a chair", "the red chair"],
        "boxes": [BOX],
        "target_boxes": [BOX],
        "meta": {"query_box": BOX, "object_id": index},
    }
    return Prediction(**(defaults | fields))


class TestRegistry:
    def test_covers_all_tasks(self):
        # no sample asks for a detection: it is a task of the scorers alone
        assert set(SCORERS) == set(DEFAULT_SCORERS) == {*TASKS, "detection"}

    def test_short_names_lead_to_scorers(self):
        for task, aliases in ALIASES.items():
            assert set(aliases.values()) <= set(SCORERS[task]), task
            assert not set(aliases) & set(SCORERS[task]), "an alias would hide a scorer of its name"
        assert scorer_name("qa", "official") == "scanqa" and scorer_name("qa", "ll3da") == "scanqa_ll3da"
        assert scorer_name("qa", "leo") == "scanqa_leo" and scorer_name("qa", "video3dllm") == "scanqa_video3dllm"
        assert scorer_name("dense_caption", "detect") == scorer_name("dense_caption", None) == "scan2cap_ll3da"
        # of the tasks that have a scorer of that name it stays what it is
        assert scorer_name("dialogue", "ll3da") == "ll3da"

    def test_results_carry_the_canonical_name(self):
        result = score_predictions("qa", [prediction()], "ll3da", meteor=False)
        assert result["scorer"] == "scanqa_ll3da"

    @pytest.mark.parametrize("task", TASKS)
    def test_defaults_need_no_java_and_reward_perfection(self, task, monkeypatch):
        for module in (java, caption):
            monkeypatch.setattr(module, "java_available", lambda: False)
        perfect = [
            prediction(index, task, references=[f"{word} chair stands here"]) for index, word in enumerate("abcd")
        ]
        for entry in perfect:
            entry.answer = entry.references[0]
        result = score_predictions(task, perfect)
        assert result["scorer"] == DEFAULT_SCORERS[task] and result["items"] == 4
        assert result["sample_score"] == {"mean": 1, "low": 1, "high": 1}
        assert result["unit"] in ("percent", "fraction")
        json.dumps(result)
        wrong = [prediction(index, task, answer="nothing", boxes=[FAR]) for index in range(4)]
        worse = score_predictions(task, wrong)
        assert worse["sample_score"]["mean"] == 0
        for name, value in result["metrics"].items():
            if name.split("@")[0] == "METEOR":
                assert value is None and "Java" in result["notes"][0]
            else:
                assert value > worse["metrics"][name], name

    def test_intervals(self):
        entries = [prediction(index, answer="a chair" if index % 2 else "no") for index in range(40)]
        result = score_predictions("qa", entries, per_item=True)
        low, high = result["intervals"]["EM"]
        assert low < result["metrics"]["EM"] == 50 < high
        assert len(result["per_item"]["EM"]) == 40

    def test_bad_requests(self):
        with pytest.raises(ValueError, match="no scorer 'x'; its scorers are exact, scanqa"):
            score_predictions("qa", [prediction()], "x")
        with pytest.raises(ValueError, match="Unknown task 'quiz'"):
            score_predictions("quiz", [prediction()])
        with pytest.raises(ValueError, match="nothing to score"):
            score_predictions("qa", [])
        with pytest.raises(ValueError, match="score each task alone"):
            score_predictions("qa", [prediction(task="planning")])
        with pytest.raises(ValueError, match="occurs twice"):
            score_predictions("qa", [prediction(), prediction()])


class TestSampleScore:
    def test_answers(self):
        assert sample_score("qa", prediction(answer="The red chair <obj3>.")) == 1
        assert sample_score("situated_qa", prediction(answer="chair chair")) == 0
        assert 0 < sample_score("dialogue", prediction(answer="one chair")) < 1
        with pytest.raises(ValueError, match="no reference"):
            sample_score("qa", prediction(references=[]))

    def test_grounding(self):
        assert sample_score("grounding", prediction()) == 1
        assert sample_score("grounding", prediction(boxes=[BOX, FAR])) == 0.5
        assert sample_score("grounding", prediction(boxes=[])) == 0
        with pytest.raises(ValueError, match="no target box"):
            sample_score("grounding", prediction(target_boxes=[]))

    def test_answer_text(self):
        assert answer_text(prediction(answer="It is <obj12> .")) == "It is."
        assert answer_text(prediction(answer=" kept  as it is ")) == " kept  as it is "
        assert answer_text(prediction(answer="", text="<think>t</think><answer>x</answer>")) == "x"
        assert answer_text(prediction(answer="", text=" raw")) == " raw"


class TestGroundingScorers:
    def test_scanrefer_groups_and_nr3d(self):
        entries = [
            prediction(0, "grounding", question_type="unique"),
            prediction(1, "grounding", question_type="multiple", boxes=[FAR]),
            prediction(2, "grounding", meta={"multiple": True}, boxes=[]),
        ]
        metrics = score_predictions("grounding", entries)["metrics"]
        assert metrics["Acc@0.25/unique"] == 100 and metrics["Acc@0.25/multiple"] == 0
        nr3d = score_predictions("grounding", entries, "nr3d")
        assert nr3d["metrics"]["Acc@0.25"] == pytest.approx(100 / 3) and "Acc" not in nr3d["metrics"]

    def test_nr3d_groups(self):
        entries = [
            prediction(
                index,
                "grounding",
                question_type="easy" if index else "hard",
                meta={"view_dependent": index == 1, "chosen_object_id": 4, "target_object_id": 4 - index},
            )
            for index in range(3)
        ]
        result = score_predictions("grounding", entries, "nr3d")
        assert result["counts"] == {"overall": 3, "easy": 2, "hard": 1, "view_dependent": 1, "view_independent": 2}
        assert result["metrics"]["Acc/hard"] == 100 and result["metrics"]["Acc/easy"] == 0
        assert result["metrics"]["Acc@0.25"] == 100 and result["metrics"]["Acc/view_independent"] == 50

    def test_nr3d_keeps_selection_and_overlap_apart(self):
        half = [*BOX[:3], 0.4, 1, 1, 0]  # IoU 0.4 with the target
        meta = {"chosen_object_id": "4", "target_object_id": 4}
        picked = [prediction(index, "grounding", boxes=[], meta=meta) for index in range(2)]
        result = score_predictions("grounding", picked, "nr3d")
        assert result["metrics"] == {"Acc": 100} and "not boxes" in result["notes"][0]
        boxes = [
            prediction(0, "grounding", boxes=[half], meta={}),
            prediction(1, "grounding", boxes=[half], meta=meta),
        ]
        result = score_predictions("grounding", boxes, "nr3d")
        assert result["metrics"] == {"Acc@0.25": 100, "Acc@0.5": 0} and "1 of 2 predictions" in result["notes"][0]

    def test_nr3d_nearest(self):
        near = [BOX[0] + 0.2, *BOX[1:]]
        rows = [
            prediction(0, "grounding", boxes=[near], meta={"distractor_boxes": [FAR]}),
            prediction(1, "grounding", boxes=[near], meta={"distractor_boxes": [FAR, near]}),
            prediction(2, "grounding", boxes=[BOX], meta={"distractor_boxes": [BOX]}),  # a tie is no choice
            prediction(3, "grounding", boxes=[], meta={"distractor_boxes": []}),
        ]
        result = score_predictions("grounding", rows, "nr3d_nearest")
        assert result["metrics"] == {"Acc-nearest": 25} and result["intervals"]["Acc-nearest"][1] > 25
        with pytest.raises(ValueError, match="sample4 has no meta"):
            score_predictions("grounding", [prediction(4, "grounding")], "nr3d_nearest")

    def test_several_targets(self):
        entries = [prediction(0, "grounding", target_boxes=[BOX, FAR])]
        with pytest.raises(ValueError, match="`matched`"):
            score_predictions("grounding", entries)
        assert score_predictions("grounding", entries, "matched")["metrics"]["mIoU"] == 50


class TestDenseCaption:
    def test_unannotated_objects_take_proposals(self):
        # the second row's box fits an object that nobody annotated, and says so by having no references
        rows = [
            prediction(0, "dense_caption", references=["a chair by a table"], answer="a chair by a table"),
            prediction(1, "dense_caption", references=["a lamp"], target_boxes=[[3.0, *BOX[1:]]], answer="wrong"),
            prediction(10, "dense_caption", references=[], target_boxes=[FAR], scene_id="scene0000_00"),
        ]
        rows[1].meta["query_box"] = FAR
        result = score_predictions("dense_caption", rows, meteor=False)
        assert result["items"] == 2
        assert result["counts"]["objects_captioned@0.5"] == 1

    def test_proposals_and_objects_in_separate_rows(self):
        proposals = [prediction(0, "dense_caption", references=[], target_boxes=[], answer="a chair by a table")]
        objects = [
            prediction(
                1, "dense_caption", references=["a chair by a table"], answer="", boxes=[], meta={"object_id": 3}
            ),
            prediction(9, "dense_caption", references=["a lamp"], answer="", boxes=[], target_boxes=[FAR], meta={}),
        ]
        result = score_predictions("dense_caption", proposals + objects, meteor=False)
        assert result["items"] == 2 and result["sample_score"] is None
        assert result["counts"]["objects_captioned@0.5"] == 1

    def test_boxes_are_needed(self):
        with pytest.raises(ValueError, match="query_box"):
            score_predictions("dense_caption", [prediction(0, "dense_caption", boxes=[], meta={})])
        with pytest.raises(ValueError, match="no target box"):
            score_predictions("dense_caption", [prediction(0, "dense_caption", target_boxes=[])])


class TestGeneration:
    def test_duplicate_keys(self):
        same = {"scene_id": "s", "question": "what next?"}
        rows = [
            prediction(0, "planning", answer="wrong words", **same),
            prediction(1, "planning", **same),
            prediction(2, "planning"),
        ]
        official = score_predictions("planning", rows, meteor=False)
        single = score_predictions("planning", rows, "ll3da_per_sample", meteor=False)
        assert official["items"] == 2 and official["counts"] == {"samples": 3, "keys": 2}
        assert single["items"] == 3 and single["metrics"]["ROUGE-L"] < official["metrics"]["ROUGE-L"] == 1


class TestFiles:
    def write(self, path, content):
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content)
        )
        return path

    def test_own_file_alone(self, tmp_path):
        path = tmp_path / "predictions.jsonl"
        write_predictions(path, [prediction(0), prediction(1), prediction(2, "planning")])
        assert score_file("qa", None, None, path)["items"] == 2

    def test_scanqa_files(self, tmp_path, parity_data):
        content = json.loads((parity_data / "scanqa.json").read_text())
        fields = ("scene_id", "question_id", "question", "answers")
        references = self.write(
            tmp_path / "val.json", [{name: item[name] for name in fields} for item in content["items"]]
        )
        submission = [
            {"scene_id": item["scene_id"], "question_id": item["question_id"], "answer_top10": item["answer_top10"]}
            for item in reversed(content["items"])
        ]
        path = self.write(tmp_path / "submission.json", submission)
        if java.java_available():
            result = score_file("qa", "scanqa", references, path, meteor=False)
            for name, value in result["metrics"].items():
                assert value == pytest.approx(content["expected"][name], rel=1e-9), name
        assert score_file("qa", "exact", references, path)["metrics"]["EM-raw"] == pytest.approx(
            content["expected"]["EM@1"]
        )

    def test_ll3da_text_reaches_the_scorer_untouched(self, tmp_path, parity_data):
        content = json.loads((parity_data / "scanqa_ll3da.json").read_text())["items"]
        expected = json.loads((parity_data / "scanqa_ll3da.json").read_text())["expected"]
        references = self.write(tmp_path / "val.json", [row | {"scene_id": "s"} for row in content])
        answers = [{"question_id": row["question_id"], "prediction": row["prediction"]} for row in content]
        path = self.write(tmp_path / "answers.jsonl", answers)
        metrics = score_file("qa", "scanqa_ll3da", references, path, meteor=False)["metrics"]
        assert metrics["CIDEr"] == pytest.approx(expected["CiDEr"], rel=1e-9)

    def test_sqa3d_files(self, tmp_path, parity_data):
        content = json.loads((parity_data / "sqa3d.json").read_text())
        annotations = [
            {
                "scene_id": item["scene_id"],
                "question_id": item["question_id"],
                "answers": [{"answer": item["answer"], "answer_confidence": "yes", "answer_id": 1}],
            }
            for item in content["items"]
        ]
        questions = [{"question_id": item["question_id"], "question": item["question"]} for item in content["items"]]
        references = self.write(tmp_path / "v1_balanced_sqa_annotations_test.json", {"annotations": annotations})
        self.write(tmp_path / "v1_balanced_questions_test.json", {"questions": questions})
        answers = [{"question_id": item["question_id"], "pred": item["prediction"]} for item in content["items"]]
        result = score_file("situated_qa", "sqa3d", references, self.write(tmp_path / "p.jsonl", answers))
        assert result["metrics"]["EM"] == pytest.approx(content["expected"]["EM"]["all"])
        assert result["counts"] == content["expected"]["counts"]
        own = tmp_path / "predictions.jsonl"
        fields = {"task": "situated_qa", "references": [], "target_boxes": []}
        write_predictions(
            own,
            [
                prediction(sample_id=f"sqa3d-{item['question_id']}", answer=item["prediction"], **fields)
                for item in content["items"]
            ],
        )
        assert score_file("situated_qa", "sqa3d", references, own)["metrics"] == result["metrics"]

    def test_grounding_by_reference_file(self, tmp_path):
        references = tmp_path / "references.jsonl"
        write_predictions(references, [prediction(index, "grounding", boxes=[]) for index in range(2)])
        rows = [{"sample_id": "sample1", "pred_box": BOX[:6]}, {"sample_id": "sample0", "boxes": [FAR]}]
        result = score_file("grounding", "scanrefer", references, self.write(tmp_path / "p.json", rows))
        assert result["metrics"]["Acc@0.5"] == 50
        official = self.write(tmp_path / "ScanRefer.json", [{"scene_id": "s", "description": "x"}])
        with pytest.raises(ValueError, match="hold no boxes"):
            score_file("grounding", "scanrefer", official, references)

    def test_rows_without_ids_join_by_scene_and_question(self, tmp_path):
        row = {"scene_id": "s", "question": "what next?"}
        references = self.write(tmp_path / "r.json", [row | {"answers": [text]} for text in ("go left", "sit down")])
        answers = self.write(tmp_path / "p.json", [row | {"answer": text} for text in ("go left", "sit down")])
        result = score_file("planning", "ll3da_per_sample", references, answers, meteor=False)
        assert result["items"] == 2 and result["metrics"]["ROUGE-L"] == 1

    @pytest.mark.parametrize(
        "answers, message",
        [
            ([{"question_id": "1", "answer": "x"}], "lacks 1 of 2 answers, for instance 2"),
            ([{"question_id": i, "answer": "x"} for i in "123"], "holds 1 answers that .* does not ask for"),
            ([{"question_id": i, "answer": "x"} for i in "122"], "2 occurs 2 times"),
            ([{"question_id": "1"}], r"row 1 \(1\), answer: there is no answer"),
            ([{"question_id": "1", "answer": 3}], "must be a text, not 3"),
            ([], "holds no predictions"),
            ("text", "list of JSON objects"),
        ],
    )
    def test_bad_predictions(self, tmp_path, answers, message):
        references = self.write(
            tmp_path / "r.json", [{"question_id": i, "question": "q", "answers": ["x"]} for i in "12"]
        )
        with pytest.raises(ValueError, match=message):
            score_file("qa", "exact", references, self.write(tmp_path / "p.json", answers))

    def test_broken_files(self, tmp_path):
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"question_id": "1", "answer": "x"}\n{"question')
        references = self.write(tmp_path / "r.json", [{"question_id": "1", "answers": ["x"]}])
        with pytest.raises(ValueError, match="line 2"):
            score_file("qa", "exact", references, broken)
        with pytest.raises(ValueError, match="no file"):
            score_file("qa", "exact", tmp_path / "absent.json", broken)
        with pytest.raises(ValueError, match="without answers"):
            score_file("qa", "exact", self.write(tmp_path / "t.json", [{"question_id": "1"}]), broken)

    def test_the_command_prints_what_is_not_available(self, tmp_path, monkeypatch, capsys):
        for module in (java, caption):
            monkeypatch.setattr(module, "java_available", lambda: False)
        references = self.write(tmp_path / "r.json", [{"question_id": "1", "question": "q", "answers": ["x"]}])
        answers = self.write(tmp_path / "p.json", {"1": "x"})
        options = ["--scorer", "official", "--references", str(references), "--predictions", str(answers)]
        assert cli.main(["score", "--task", "qa", *options]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["scorer"] == "scanqa" and lines["metrics.EM@1"] == "100.0000"
        assert lines["metrics.METEOR"] == lines["metrics.CIDEr"] == "n/a"
        assert "None" not in lines.values()
