"""Grounding, detection and dense captioning against the official evaluators' results."""

import json

import numpy as np
import pytest

from threedr1.utils.metrics.dense_caption import (
    CaptionCorpus,
    CaptionedScene,
    filter_proposals,
    scan2cap,
    select_captions,
    wrap_reference,
)
from threedr1.utils.metrics.detection import SceneDetections, SceneObjects, evaluate_detections, split_logits
from threedr1.utils.metrics.grounding import (
    GroundingItem,
    matched_iou,
    nr3d,
    official_iou,
    scanrefer,
    unique_multiple_lookup,
)
from threedr1.utils.metrics.java import java_available

UNIT = [0.0, 0, 0, 1, 1, 1, 0]


def shifted(x, box=UNIT):
    return [box[0] + x, *box[1:]]


class TestScanRefer:
    @pytest.fixture(scope="class")
    def content(self, parity_data):
        return json.loads((parity_data / "scanrefer_grounding.json").read_text())

    def test_parity(self, content):
        items = [
            GroundingItem(item["pred_box"], item["gt_box"], bool(item["multiple"]), bool(item["others"]))
            for item in content["items"]
        ]
        scores = scanrefer(items)
        assert scores.per_item["mIoU"] == pytest.approx([item["iou"] for item in content["items"]], abs=1e-12)
        compared = 0
        for group, by_class in content["expected"]["scores"].items():
            for kind, values in by_class.items():
                name = "/".join(
                    part for part in (group, kind) if (group, kind) == ("overall", kind) or part != "overall"
                )
                name = {"overall/overall": ""}.get(name, name)
                for measure, value in values.items():
                    threshold = "0.25" if "0.25" in measure else "0.5"
                    key = f"Acc@{threshold}" + (f"/{name}" if name else "")
                    assert scores.metrics[key] == pytest.approx(100 * value, abs=1e-10), key
                    compared += 1
                assert scores.counts[name or "overall"] == content["expected"]["counts"][group][kind]
        assert compared == 18

    def test_boundary(self, content):
        for pair in content["boundary"]:
            iou = official_iou([pair["pred_box"]], [pair["gt_box"]])[0]
            assert iou == pytest.approx(pair["iou"], abs=1e-12), pair["name"]
            for threshold in (0.25, 0.5):
                assert (iou >= threshold) == pair[f"hit_{threshold}"], pair["name"]

    def test_lookup(self, content):
        classes = {item["object_name"].replace("_", " "): item["semantic_class"] for item in content["items"]}
        classes |= {"closet doors": 5, "kitchen counter": 9}  # named by no item, but by other descriptions
        lookup = unique_multiple_lookup([tuple(row[:3]) for row in content["lookup_annotations"]], classes)
        for item in content["items"]:
            assert lookup[item["scene_id"], item["object_id"]] == bool(item["multiple"])

    def test_missing_box_and_groups(self):
        scores = scanrefer([GroundingItem(None, UNIT), GroundingItem(UNIT, UNIT, True)])
        assert scores.metrics["Acc@0.5"] == 50 and scores.per_item["mIoU"] == pytest.approx([0, 1])
        assert "Acc@0.5/unique" not in scores.metrics and "unique/multiple" in scores.notes[0]
        with pytest.raises(ValueError, match="6 or 7 numbers"):
            scanrefer([GroundingItem([0, 0, 0], UNIT)])

    def test_rotated(self):
        turned = [*UNIT[:6], np.pi / 4]
        octagon = 2 * (np.sqrt(2) - 1)
        assert official_iou([UNIT], [turned])[0] == pytest.approx(octagon / (2 - octagon), abs=1e-7)

    def test_nr3d(self):
        scores = nr3d([1, 2, None], [1, 3, 4], ious=[0.25, 0.2, 0.9], groups={"hard": [True, True, False]})
        assert scores.metrics["Acc"] == pytest.approx(100 / 3)
        assert scores.metrics["Acc@0.25"] == pytest.approx(200 / 3)
        assert scores.metrics["Acc@0.5"] == pytest.approx(100 / 3)
        assert scores.metrics["Acc/hard"] == 50 and scores.counts == {"overall": 3, "hard": 2}
        with pytest.raises(ValueError, match="object ids"):
            nr3d(None, None)

    def test_matched_iou_punishes_surplus_and_missing(self):
        assert matched_iou([UNIT], [UNIT]) == 1
        assert matched_iou([UNIT, shifted(5)], [UNIT]) == matched_iou([UNIT], [UNIT, shifted(5)]) == 0.5
        assert matched_iou([UNIT, UNIT], [UNIT, shifted(5)]) == 0.5
        assert matched_iou([], [UNIT]) == 0
        with pytest.raises(ValueError, match="at least one target"):
            matched_iou([UNIT], [])


def load_scenes(archive, num_scenes):
    points = archive["points"].astype(np.float32) / 1000
    for scene in range(num_scenes):
        predicted, truth = archive["pred_scene"] == scene, archive["gt_scene"] == scene
        yield scene, predicted, truth, points[archive["points_scene"] == scene]


class TestDetection:
    @pytest.fixture(scope="class")
    def fixture(self, parity_data):
        content = json.loads((parity_data / "detection_map.json").read_text())
        predictions, ground_truth = [], []
        with np.load(parity_data / "detection_map.npz") as archive:
            for _, predicted, truth, points in load_scenes(archive, len(content["scenes"])):
                probabilities, objectness = split_logits(archive["pred_logits"][predicted])
                predictions.append(SceneDetections(archive["pred_box"][predicted], probabilities, objectness, points))
                ground_truth.append(SceneObjects(archive["gt_box"][truth], archive["gt_class"][truth]))
        return content, predictions, ground_truth

    @pytest.mark.parametrize(
        "variant, options",
        [
            ("exact_eval", {}),
            ("no_empty_box_removal", {"min_points": 0}),
            ("no_nms", {"nms_iou": None, "min_points": 0}),
            ("class_of_argmax_only", {"per_class_proposals": False, "min_points": 0}),
        ],
    )
    def test_parity(self, fixture, variant, options):
        content, predictions, ground_truth = fixture
        names = content["class_names"]
        result = evaluate_detections(predictions, ground_truth, class_names=names, **options)
        if variant == "exact_eval":
            assert result["num_detections"] == content["expected"]["n_detections_exact_eval"]
        for threshold in ("0.25", "0.5"):
            expected = content["expected"][variant][threshold]
            assert result[threshold]["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)
            assert result[threshold]["AR"] == pytest.approx(expected["AR"], abs=1e-6)
            for name in result[threshold]["AP"]:
                assert result[threshold]["AP"][name] == pytest.approx(expected[f"{name} Average Precision"], abs=1e-9)
                assert result[threshold]["recall"][name] == pytest.approx(expected[f"{name} Recall"], abs=1e-9)

    def test_present_classes_only(self, fixture):
        content, predictions, ground_truth = fixture
        seen = evaluate_detections(predictions, ground_truth)["0.25"]
        present = evaluate_detections(predictions, ground_truth, average_over="present")["0.25"]
        assert set(seen["AP"]) - set(present["AP"]) == {"bathtub"}
        assert present["mAP"] == pytest.approx(seen["mAP"] * 18 / 17)

    def test_by_hand(self):
        # two chairs; in order of score: hit, duplicate, hit. Precision 1, 1/2, 2/3: AP = 1/2 + 1/2 * 2/3
        boxes = [UNIT, shifted(0.05), shifted(5)]
        probabilities = np.eye(18)[[2, 2, 2]]
        detections = SceneDetections(boxes, probabilities, np.array([0.9, 0.8, 0.7]))
        truth = SceneObjects([UNIT, shifted(5)], np.array([2, 2]))
        options = {"nms_iou": None, "min_points": 0, "per_class_proposals": False}
        result = evaluate_detections([detections], [truth], **options)
        assert result["0.5"]["AP"] == {"chair": pytest.approx(1 / 2 + 1 / 3)}
        assert result["0.5"]["AR"] == 1 and result["items"] == 1

    def test_empty_scenes(self):
        nothing = SceneDetections([], np.zeros((0, 18)), np.zeros(0))
        objects, none = SceneObjects([UNIT], np.array([1])), SceneObjects([], np.array([], dtype=int))
        result = evaluate_detections([nothing, nothing], [objects, none], min_points=0)
        assert result["0.25"]["mAP"] == result["0.25"]["AR"] == 0
        assert evaluate_detections([nothing], [none], min_points=0)["0.25"]["mAP"] == 0

    def test_bad_input(self):
        scene = SceneDetections([UNIT], np.ones((1, 18)), np.ones(1))
        with pytest.raises(ValueError, match="scene's points"):
            evaluate_detections([scene], [SceneObjects([UNIT], np.array([0]))])
        with pytest.raises(ValueError, match="one entry a scene"):
            evaluate_detections([scene], [])
        with pytest.raises(ValueError, match="one class in 0..17"):
            evaluate_detections([scene], [SceneObjects([UNIT], np.array([18]))], min_points=0)
        with pytest.raises(ValueError, match=r"\[K, 18\]"):
            wrong = SceneDetections([UNIT], np.ones((1, 4)), np.ones(1))
            evaluate_detections([wrong], [SceneObjects([UNIT], np.array([0]))], min_points=0)


class TestScan2Cap:
    @pytest.fixture(scope="class")
    def fixture(self, parity_data):
        content = json.loads((parity_data / "scan2cap.json").read_text())
        scenes = {}
        with np.load(parity_data / "scan2cap_arrays.npz") as archive:
            for assignment in ("ll3da", "scan2cap"):
                scenes[assignment] = []
                for scene, predicted, truth, points in load_scenes(archive, len(content["scenes"])):
                    name = content["scenes"][scene]
                    boxes, logits = archive["pred_box"][predicted], archive["pred_logits"][predicted]
                    kept = filter_proposals(boxes, logits, points, assignment=assignment)
                    captions = [content["captions"][name][row] for row in kept]
                    ids = [str(object_id) for object_id in archive["gt_object_id"][truth]]
                    scenes[assignment].append(
                        CaptionedScene(name, boxes[kept], captions, archive["gt_box"][truth], ids)
                    )
        return content, scenes

    @pytest.mark.parametrize("assignment", ["ll3da", "scan2cap"])
    @pytest.mark.parametrize("annotations", ["scanrefer", "nr3d"])
    @pytest.mark.parametrize("min_iou", [0.25, 0.5])
    @pytest.mark.parametrize("with_meteor", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_parity(self, fixture, assignment, annotations, min_iou, with_meteor):
        if with_meteor and not java_available():
            pytest.skip("Java is not installed")
        content, scenes = fixture
        corpus = CaptionCorpus()
        for row in content["annotations"][annotations]:
            corpus.add(row["scene_id"], row["object_id"], row["description"])
        scores = scan2cap(scenes[assignment], corpus, min_iou=min_iou, assignment=assignment, meteor=with_meteor)
        expected = content["expected"][assignment][f"{annotations}@{min_iou}"]
        names = {"CiDEr": "CIDEr", "Rouge": "ROUGE-L"}
        for name, value in expected["metrics"].items():
            if name != "METEOR" or with_meteor:
                assert scores.metrics[f"{names.get(name, name)}@{min_iou}"] == pytest.approx(value, rel=1e-9), name
        assert scores.items == expected["n_objects"]
        selected = "objects_matched" if assignment == "ll3da" else "objects_captioned"
        assert scores.counts[selected] == expected["n_objects_with_caption_selected"]
        for key, candidate in expected.get("candidates", {}).items():
            scene_id, object_id, _ = key.split("|")
            assert scores.details["candidates"][f"{scene_id}|{object_id}"] == candidate

    def test_assignments_differ(self):
        # both proposals describe object 7; the first fits better, the second comes last
        scene = CaptionedScene("s", [shifted(0.02), shifted(0.2)], ["good", "late"], [UNIT, shifted(9)], ["7", "8"])
        assert select_captions(scene, min_iou=0.5, assignment="ll3da") == {"7": "good"}
        assert select_captions(scene, min_iou=0.5, assignment="scan2cap") == {"7": "late"}
        assert select_captions(scene, min_iou=0.99, assignment="ll3da") == {}

    def test_threshold_is_strict_and_unmatched_count(self):
        half = CaptionedScene("s", [[0.25, 0, 0, 0.5, 1, 1, 0]], ["a chair"], [UNIT], ["7"])
        assert select_captions(half, min_iou=0.5, assignment="ll3da") == {}
        corpus = CaptionCorpus()
        corpus.add("s", 7, "a chair")
        corpus.add("other", 1, "a table")
        scores = scan2cap([half], corpus, min_iou=0.25, meteor=False)
        assert scores.items == 2 and scores.counts["objects_captioned"] == 1
        assert scores.details["candidates"] == {"s|7": "sos a chair eos", "other|1": "sos eos"}

    def test_long_references_are_cut(self):
        assert wrap_reference(" ".join(["word"] * 50)) == "sos " + "word " * 30 + "eos"

    def test_bad_input(self):
        with pytest.raises(ValueError, match="one caption a box"):
            select_captions(CaptionedScene("s", [UNIT], [], [UNIT], ["1"]), min_iou=0.5, assignment="ll3da")
        with pytest.raises(ValueError, match="no object has a reference"):
            scan2cap([], CaptionCorpus())
