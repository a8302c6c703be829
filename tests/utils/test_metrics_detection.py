"""Detection by files and by name, and mAP of resampled scenes."""

import json

import numpy as np
import pytest

from threedr1.utils.metrics.detection import SceneDetections, SceneObjects, detection_scores, split_logits
from threedr1.utils.metrics.detection_resamples import RankedClass, mean_over_seen
from threedr1.utils.metrics.score import sample_score, score_file, score_predictions
from threedr1.utils.predictions import Prediction

from .test_metrics_boxes import UNIT, load_scenes, shifted


def sure(index):
    return [float(number == index) for number in range(18)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class TestFiles:
    def test_parity(self, tmp_path, parity_data):
        content = json.loads((parity_data / "detection_map.json").read_text())
        found, truth = [], []
        with np.load(parity_data / "detection_map.npz") as archive:
            for scene, predicted, objects, _ in load_scenes(archive, len(content["scenes"])):
                probabilities, objectness = split_logits(archive["pred_logits"][predicted].astype(np.float64))
                found.append(
                    {
                        "scene_id": content["scenes"][scene],
                        "boxes": archive["pred_box"][predicted].tolist(),
                        "class_probs": probabilities.tolist(),
                        "objectness": objectness.tolist(),
                    }
                )
                boxes, classes = archive["gt_box"][objects].tolist(), archive["gt_class"][objects].tolist()
                truth.append({"scene_id": content["scenes"][scene], "boxes": boxes, "classes": classes})
        references, predictions = (
            write(tmp_path / name, rows) for name, rows in (("r.jsonl", truth), ("p.jsonl", found))
        )
        result = score_file("detection", None, references, predictions)
        assert result["scorer"] == "3detr" and result["unit"] == "fraction" and result["items"] == 25
        assert "no points were given" in result["notes"][0] and result["sample_score"] is None
        assert set(result["intervals"]) == set(result["metrics"]) and len(result["notes"]) == 1
        for threshold in ("0.25", "0.5"):
            expected = content["expected"]["no_empty_box_removal"][threshold]
            assert result["metrics"][f"mAP@{threshold}"] == pytest.approx(expected["mAP"], abs=1e-6)
            assert result["metrics"][f"AR@{threshold}"] == pytest.approx(expected["AR"], abs=1e-6)
            low, high = result["intervals"][f"mAP@{threshold}"]
            assert low < result["metrics"][f"mAP@{threshold}"] < high
            # a class without objects is part of the mean
            assert result["metrics"][f"AP@{threshold}/bathtub"] == 0

    ROW = {"scene_id": "a", "boxes": [UNIT], "class_probs": [sure(2)], "objectness": [0.9]}
    TRUTH = {"scene_id": "a", "boxes": [UNIT[:6]], "classes": [2]}

    def test_by_hand(self, tmp_path):
        missed = {"scene_id": "b", "boxes": [], "class_probs": [], "objectness": []}
        truth = [self.TRUTH, {"scene_id": "b", "boxes": [UNIT], "classes": [2]}]
        references, predictions = write(tmp_path / "r.jsonl", truth), write(tmp_path / "p.jsonl", [missed, self.ROW])
        result = score_file("detection", "3detr", references, predictions)
        assert result["metrics"]["AP@0.5/chair"] == result["metrics"]["AR@0.5"] * 18 == 0.5
        assert result["counts"] == {"scenes": 2, "detections": 18, "objects": 2}

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"boxes": [[1, 2, 3]]}, "boxes: a box must be 6 or 7"),
            ({"boxes": 5}, "boxes: must be a list of boxes, not 5"),
            ({"class_probs": [[0.5] * 17]}, r"class_probs: must be 18 numbers in 0\.\.1"),
            ({"class_probs": [sure(2), sure(2)]}, "class_probs: must have one entry for each of the 1 boxes, not 2"),
            ({"class_probs": None}, "class_probs: must be a list, not None"),
            ({"objectness": [2]}, r"objectness: must be 1 numbers in 0\.\.1, not \[2\]"),
            ({"objectness": [True]}, "objectness: must be 1 numbers"),
            ({"objectness": 0.5}, "objectness: must be a list"),
        ],
    )
    def test_broken_predictions(self, tmp_path, change, message):
        references = write(tmp_path / "r.jsonl", [self.TRUTH])
        with pytest.raises(ValueError, match=rf"p.jsonl, line 1 \(a\), {message}"):
            score_file("detection", None, references, write(tmp_path / "p.jsonl", [self.ROW | change]))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"classes": [18]}, r"classes: a class must be a whole number in 0\.\.17, not 18"),
            ({"classes": [None]}, r"classes: a class must be a whole number in 0\.\.17, not None"),
            ({"classes": []}, "classes: must have one entry for each of the 1 boxes"),
            ({"scene_id": 5}, "scene_id: must be a text, not 5"),
        ],
    )
    def test_broken_references(self, tmp_path, change, message):
        predictions = write(tmp_path / "p.jsonl", [self.ROW])
        with pytest.raises(ValueError, match=f"r.jsonl, line 1.*, {message}"):
            score_file("detection", None, write(tmp_path / "r.jsonl", [self.TRUTH | change]), predictions)

    def test_own_rows_are_checked_too(self):
        entry = Prediction("a", "detection", "a", "", "", boxes=[UNIT], target_boxes=[UNIT], meta={"classes": [2]})
        with pytest.raises(ValueError, match="Scene a, class_probs: must be a list, not None"):
            score_predictions("detection", [entry])
        with pytest.raises(ValueError, match="has no score of its own"):
            sample_score("detection", entry)

    def test_points_are_used_where_given(self):
        scene = SceneDetections([UNIT], np.array([sure(2)]), np.array([0.9]), np.full((4, 3), 0.1))
        truth = SceneObjects([UNIT], np.array([2]))
        assert detection_scores([scene], [truth]).metrics["mAP@0.5"] == 0
        scene.points_P3 = None
        scores = detection_scores([scene], [truth])
        assert scores.metrics["AP@0.5/chair"] == 1 and scores.notes


class TestResamples:
    def test_by_hand(self):
        # best first: a hit in scene 0, a miss in scene 1, a hit in scene 1; three objects
        ranked = RankedClass(np.array([0, 1, 1]), np.array([True, False, True]), np.array([1, 2]))
        weights = np.array([[1.0, 1], [2, 0], [0, 2], [0, 0]])
        ap, recall, seen = ranked.resample(weights)
        # once each: (1 + 2/3) / 3; the first scene twice: all found; the second twice: precision 1/2 for 2 of 4
        assert ap == pytest.approx([(1 + 2 / 3) / 3, 1, 0.25, 0])
        assert recall == pytest.approx([2 / 3, 1, 0.5, 0])
        assert seen.tolist() == [True, True, True, False]

    def test_nothing_found(self):
        nothing = RankedClass(np.zeros(0, dtype=int), np.zeros(0, dtype=bool), np.array([1, 0]))
        ap, recall, seen = nothing.resample(np.array([[1.0, 1], [0, 2]]))
        assert ap.tolist() == recall.tolist() == [0, 0] and seen.tolist() == [True, False]

    def test_mean_over_the_classes_there_are(self):
        values, seen = np.array([[1.0, 0.5], [0.0, 0.0]]), np.array([[True, True], [True, False]])
        assert mean_over_seen(values, seen).tolist() == [0.5, 0.5]
        assert mean_over_seen(values, ~seen | True)[1] == 0.25

    def test_resampling_equals_writing_scenes_several_times(self):
        rng = np.random.default_rng(1)
        scenes, truth = [], []
        for _ in range(6):
            boxes = [shifted(float(x)) for x in rng.uniform(0, 4, 8)]
            scenes.append(SceneDetections(boxes, rng.dirichlet(np.ones(18), 8), rng.uniform(0.1, 1, 8)))
            truth.append(SceneObjects([shifted(float(x)) for x in (0, 1.5, 3)], rng.integers(0, 3, 3)))
        scores = detection_scores(scenes, truth)
        weights = np.array([2, 0, 1, 3, 0, 1])
        repeated = [index for index, weight in enumerate(weights) for _ in range(weight)]
        again = detection_scores([scenes[index] for index in repeated], [truth[index] for index in repeated])
        for name in ("mAP@0.25", "AR@0.25", "mAP@0.5"):
            of_sums = scores.aggregates[name].of_sums
            assert scores.aggregates[name].value() == pytest.approx(scores.metrics[name], abs=1e-12)
            assert of_sums(weights[None].astype(float))[0] == pytest.approx(again.metrics[name], abs=1e-12)
