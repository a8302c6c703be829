"""Dense captioning from oracle proposals, and object captioning by CLIP: by hand, and through the registry."""

import json

import numpy as np
import pytest

from threedr1.utils.metrics import caption, java
from threedr1.utils.metrics.dense_caption import filter_proposals
from threedr1.utils.metrics.dense_oracle import OracleCaption, oracle
from threedr1.utils.metrics.object_caption import clip_scores
from threedr1.utils.metrics.score import score_predictions
from threedr1.utils.predictions import Prediction

from .test_metrics_boxes import UNIT, load_scenes, shifted

needs_java = pytest.mark.skipif(not java.java_available(), reason="Java is not installed")


def candidates(form, *items, min_iou=0.5):
    return oracle(items, form=form, min_iou=min_iou, meteor=False).details["candidates"]


class TestForms:
    WORDS = OracleCaption("s|1", "A chair. It is red, I think.", ("a chair.",), 0.5)
    MISSING = OracleCaption("s|2", None, ("a table.",))
    BELOW = OracleCaption("s|3", "a lamp", ("a lamp.",), 0.49)

    def test_leo(self):
        found = candidates("leo", self.WORDS, self.MISSING, self.BELOW)
        # the full stop before eos is set apart too; case and comma stay; the object without a caption is dropped
        assert found == {"s|1": "sos A chair . It is red, I think . eos", "s|3": "sos eos"}

    def test_video3dllm(self):
        found = candidates("video3dllm", self.WORDS, self.MISSING, self.BELOW)
        assert found == {
            "s|1": "sos a chair .  it is red ,  i think .  eos",
            "s|2": "sos  eos",
            "s|3": "sos  eos",
        }

    @needs_java
    def test_chat_scene(self):
        found = candidates("chat_scene", self.WORDS, self.MISSING, self.BELOW)
        assert found == {"s|1": "sos A chair. It is red, I think. eos", "s|2": "sos eos", "s|3": "sos eos"}
        # the tokenizer drops case and punctuation
        same = OracleCaption("s|1", "a Chair; it is\nred", ("A chair. It is red.",), 1.0)
        assert oracle([same], form="chat_scene", meteor=False).metrics["ROUGE-L@0.5"] == pytest.approx(1)

    def test_threshold_is_met_by_equality(self):
        item = OracleCaption("s|1", "a lamp", ("a lamp",), 0.25)
        assert candidates("leo", item, min_iou=0.25) == {"s|1": "sos a lamp eos"}
        assert candidates("leo", item, min_iou=0.26) == {"s|1": "sos eos"}

    def test_an_empty_caption_is_no_missing_one(self):
        assert candidates("leo", OracleCaption("s|1", "", ("a lamp",), 1.0)) == {"s|1": "sos  eos"}

    def test_counts_and_denominators(self):
        items = [
            OracleCaption("s|1", "a red lamp stands here", ("a red lamp stands here",), 1.0),
            OracleCaption("s|2", None, ("a blue chair is there",)),
        ]
        leo, other = (oracle(items, form=form, meteor=False) for form in ("leo", "video3dllm"))
        assert leo.items == 1 and leo.metrics["ROUGE-L@0.5"] == pytest.approx(1)
        assert leo.counts == {
            "objects": 2,
            "objects_scored": 1,
            "objects_without_caption": 1,
            "objects_matched": 1,
        }
        assert "1 of 2 annotated objects have no caption" in leo.notes[0]
        assert other.items == 2 and other.notes == []
        # "sos", "", "eos" against seven tokens: two in common, so precision 2/3 and recall 2/7
        precision, recall = 2 / 3, 2 / 7
        part = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
        assert other.per_item["ROUGE-L"] == pytest.approx([1, part])

    def test_leo_sets_full_stops_of_references_apart_once(self):
        tokens = OracleCaption("s|1", "a lamp. it is red.", ("a lamp . it is red .",), 1.0)
        raw = OracleCaption("s|1", "a lamp. it is red.", ("a lamp. it is red.",), 1.0)
        for item in (tokens, raw):
            assert oracle([item], form="leo", meteor=False).metrics["ROUGE-L@0.5"] == pytest.approx(1)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="nothing to score"):
            oracle([], form="leo")
        with pytest.raises(ValueError, match=r"Object s\|2 has 2 captions"):
            oracle([self.MISSING, self.WORDS, self.MISSING], form="leo")
        for form in ("leo", "chat_scene", "video3dllm"):
            with pytest.raises(ValueError, match="No annotated object has a caption"):
                oracle([self.MISSING], form=form)


def row(number, text="a chair by a table", **fields):
    defaults = {
        "references": [text],
        "answer": text,
        "target_boxes": [shifted(9 * number)],
        "meta": {"object_id": number, "query_box": shifted(9 * number)},
    }
    return Prediction(f"s{number}", "dense_caption", "scene", "q", "", **(defaults | fields))


class TestOracleRows:
    @pytest.mark.parametrize("scorer", ["oracle_leo", "oracle_video3dllm"])
    def test_scores_at_both_thresholds(self, scorer):
        # the second proposal overlaps its object with IoU 0.3
        rows = [row(0), row(1, "a lamp on the floor", meta={"object_id": 1, "query_box": [9, 0, 0, 0.3, 1, 1, 0]})]
        unannotated = Prediction("s2", "dense_caption", "scene", "q", "", target_boxes=[UNIT], meta={"object_id": 2})
        result = score_predictions("dense_caption", [*rows, unannotated], scorer, meteor=False)
        assert result["scorer"] == scorer and result["unit"] == "fraction" and result["items"] == 2
        assert result["counts"]["objects_matched@0.25"] == 2 and result["counts"]["objects_matched@0.5"] == 1
        assert result["metrics"]["ROUGE-L@0.25"] == pytest.approx(1)
        assert 0.5 < result["metrics"]["ROUGE-L@0.5"] < 1
        assert result["intervals"]["CIDEr@0.5"][0] < result["metrics"]["CIDEr@0.5"]
        assert set(result["intervals"]) == set(result["metrics"]) and result["notes"] == []

    def test_without_java_the_tokenized_form_is_not_available(self, monkeypatch):
        for module in (java, caption):
            monkeypatch.setattr(module, "java_available", lambda: False)
        result = score_predictions("dense_caption", [row(0)], "oracle_chat_scene")
        assert set(result["metrics"].values()) == {None} and result["intervals"] == {}
        assert len(result["notes"]) == 1 and "Java" in result["notes"][0]

    def test_objects_without_a_caption(self):
        rows = [row(0), row(1, boxes=[], answer="", meta={"object_id": 1})]
        leo, other = (
            score_predictions("dense_caption", rows, scorer, meteor=False)
            for scorer in ("oracle_leo", "oracle_video3dllm")
        )
        assert (leo["items"], other["items"]) == (1, 2)
        assert leo["counts"]["objects_without_caption@0.5"] == other["counts"]["objects_without_caption@0.25"] == 1

    def test_rows_of_proposals_are_refused(self):
        proposal = row(1, references=[], target_boxes=[])
        with pytest.raises(ValueError, match="s1 captions a proposal of no object.*Use `detect`"):
            score_predictions("dense_caption", [row(0), proposal], "oracle_leo", meteor=False)
        with pytest.raises(ValueError, match="no target box"):
            score_predictions("dense_caption", [row(0, target_boxes=[])], "oracle_leo", meteor=False)

    def test_without_java_nothing_is_made_up(self, monkeypatch):
        for module in (java, caption):
            monkeypatch.setattr(module, "java_available", lambda: False)
        result = score_predictions("dense_caption", [row(0)], "oracle_leo")
        assert result["metrics"]["METEOR@0.5"] is None and result["metrics"]["ROUGE-L@0.5"] == pytest.approx(1)


class TestDetectRows:
    """Official results through rows of a prediction file."""

    @pytest.fixture(scope="class")
    def fixture(self, parity_data):
        content = json.loads((parity_data / "scan2cap.json").read_text())
        rows = {"ll3da": [], "scan2cap": []}
        with np.load(parity_data / "scan2cap_arrays.npz") as archive:
            for assignment, found in rows.items():
                for scene, predicted, truth, points in load_scenes(archive, len(content["scenes"])):
                    name = content["scenes"][scene]
                    boxes = archive["pred_box"][predicted]
                    kept = filter_proposals(boxes, archive["pred_logits"][predicted], points, assignment=assignment)
                    found += [
                        Prediction(
                            f"{name}-proposal-{index}",
                            "dense_caption",
                            name,
                            "q",
                            content["captions"][name][index],
                            meta={"query_box": boxes[index].tolist()},
                        )
                        for index in kept
                    ]
                    objects = zip(archive["gt_object_id"][truth].tolist(), archive["gt_box"][truth], strict=True)
                    found += [
                        Prediction(
                            f"{name}-object-{object_id}",
                            "dense_caption",
                            name,
                            "q",
                            "",
                            target_boxes=[box.tolist()],
                            meta={"object_id": object_id},
                        )
                        for object_id, box in objects
                    ]
        return content, rows

    @pytest.mark.parametrize("assignment, scorer", [("ll3da", "detect"), ("scan2cap", "scan2cap")])
    @pytest.mark.parametrize("annotations", ["scanrefer", "nr3d"])
    def test_parity(self, fixture, assignment, scorer, annotations):
        content, rows = fixture
        texts: dict[tuple[str, int], list[str]] = {}
        for entry in content["annotations"][annotations]:
            texts.setdefault((entry["scene_id"], int(entry["object_id"])), []).append(entry["description"])
        entries = [
            Prediction(**(vars(entry) | {"references": texts.get((entry.scene_id, entry.meta.get("object_id")), [])}))
            for entry in rows[assignment]
        ]
        result = score_predictions("dense_caption", entries, scorer, meteor=False)
        for threshold in (0.25, 0.5):
            expected = content["expected"][assignment][f"{annotations}@{threshold}"]
            for official, value in expected["metrics"].items():
                name = {"CiDEr": "CIDEr", "Rouge": "ROUGE-L"}.get(official, official)
                if name != "METEOR":
                    assert result["metrics"][f"{name}@{threshold}"] == pytest.approx(value, rel=1e-9), name
            assert result["items"] == expected["n_objects"]


class TestClip:
    def test_by_hand(self):
        # image 0 is nearest to caption 0; image 1 to caption 2, then its own; image 2 is opposite to its own
        captions = np.array([[1.0, 0], [3, 4], [0, 2]])
        images = np.array([[2.0, 0], [0, 1], [0, -1]])
        scores = clip_scores(captions, images)
        assert scores.unit == "percent" and scores.items == 3
        assert scores.metrics["CLIP"] == pytest.approx(100 * (1 + 0.8 - 1) / 3)
        assert scores.metrics["R@1"] == pytest.approx(100 / 3)
        assert scores.metrics["R@5"] is None and scores.metrics["R@10"] is None
        assert scores.notes == ["R@5 is null: there are only 3 objects.", "R@10 is null: there are only 3 objects."]
        two = clip_scores(captions, images, recall_at=(2, 3))
        assert two.metrics["R@2"] == pytest.approx(200 / 3) and two.metrics["R@3"] == 100

    def test_equal_captions_count_against(self):
        same = np.ones((6, 3))
        scores = clip_scores(same, same)
        assert scores.metrics["R@1"] == scores.metrics["R@5"] == 0 and scores.metrics["CLIP"] == pytest.approx(100)

    def test_many_rows(self):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(2500, 32))
        scores = clip_scores(images + 0.01 * rng.normal(size=images.shape), images)
        assert scores.metrics["R@1"] == 100 and len(scores.per_item["R@10"]) == 2500
        shuffled = clip_scores(np.roll(images, 1, axis=0), images)
        assert shuffled.metrics["R@10"] < 2

    def test_bad_input(self):
        good = np.ones((2, 3))
        for captions in (np.ones((2, 4)), np.ones((1, 3)), np.ones(3)):
            with pytest.raises(ValueError, match="one shape"):
                clip_scores(captions, good)
        with pytest.raises(ValueError, match="N of at least 1"):
            clip_scores(np.ones((0, 3)), np.ones((0, 3)))
        with pytest.raises(ValueError, match="caption 1 is zero or not finite"):
            clip_scores(np.array([[1.0, 0, 0], [0, 0, 0]]), good)
        with pytest.raises(ValueError, match="image 0 is zero or not finite"):
            clip_scores(good, np.array([[np.nan, 0, 0], [1, 0, 0]]))
