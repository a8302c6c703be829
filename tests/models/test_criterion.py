"""Matcher and criterion of the scene encoder: hand-computed values, and a plain loop over layers and scenes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from threedr1.models.scene_encoder import DetectionTargets, LayerPrediction, LossWeights, SceneEncoding, SetCriterion
from threedr1.models.scene_encoder.criterion import box_losses, owner_centres
from threedr1.models.scene_encoder.matcher import assign, match, match_cost
from threedr1.utils.boxes import box3d_giou, paired_giou


def one_scene(boxes_K7: torch.Tensor, classes_K: list[int]) -> DetectionTargets:
    return DetectionTargets.of([boxes_K7], [torch.tensor(classes_K, dtype=torch.int64)])


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    boxes_K7 = torch.zeros(count, 7)
    boxes_K7[:, :3] = 4 * torch.rand(count, 3, generator=generator)
    boxes_K7[:, 3:6] = 0.2 + torch.rand(count, 3, generator=generator)
    return boxes_K7


def random_problem(counts: list[int], num_layers: int = 3, num_queries: int = 6):
    generator = torch.Generator().manual_seed(sum(counts))
    targets = DetectionTargets.of(
        [random_boxes(count, generator) for count in counts],
        [torch.randint(0, 4, (count,), generator=generator) for count in counts],
    )
    logits_LBQC1 = torch.randn(num_layers, len(counts), num_queries, 5, generator=generator)
    boxes_LBQ7 = random_boxes(num_layers * len(counts) * num_queries, generator)
    return logits_LBQC1, boxes_LBQ7.view(num_layers, len(counts), num_queries, 7), targets


def test_targets_are_packed_and_come_back():
    boxes = [torch.rand(2, 7), torch.zeros(0, 7), torch.rand(1, 7)]
    classes = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    targets = DetectionTargets.of(boxes, classes)
    assert targets.scene_T.tolist() == [0, 0, 2]
    assert targets.slot_BK.tolist() == [[0, 1], [3, 3], [2, 3]]
    for scene in range(3):
        assert torch.equal(targets.of_scene(scene)[0], boxes[scene])
        assert torch.equal(targets.of_scene(scene)[1], classes[scene])
    with pytest.raises(ValueError, match="as many classes as boxes"):
        DetectionTargets.of(boxes, classes[:2])


def test_match_cost_and_assignment_by_hand():
    boxes_Q7 = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0], [2.0, 0, 0, 1, 1, 1, 0], [9.0, 0, 0, 1, 1, 1, 0]])
    target_K7 = torch.tensor([[2.0, 0, 0, 1, 1, 1, 0], [0.5, 0, 0, 1, 1, 1, 0]])
    logits_QC1 = torch.zeros(3, 4)  # every probability is 1/4
    targets = one_scene(target_K7, [0, 2])
    cost_KQ = match_cost(logits_QC1[None, None], boxes_Q7[None, None], targets)[0]
    # query 0, object 1: centre 0.5 m, IoU 0.5 / 1.5, no gap in the enclosing box
    assert cost_KQ[1, 0].item() == pytest.approx(0.5 - 0.25 - 2 / 3)
    # query 1, object 0: the same box
    assert cost_KQ[0, 1].item() == pytest.approx(0.0 - 0.25 - 2.0)
    # query 0, object 0: 2 m apart, IoU 0, the enclosing box of 3 m is a third empty
    assert cost_KQ[0, 0].item() == pytest.approx(2.0 - 0.25 + 2 / 3)
    matches = match(logits_QC1[None, None], boxes_Q7[None, None], targets)
    assert list(zip(matches.query_P.tolist(), matches.object_P.tolist(), strict=True)) == [(1, 0), (0, 1)]
    assert matches.layer_P.tolist() == matches.scene_P.tolist() == [0, 0]


def test_costs_that_are_not_finite_stop_the_training():
    with pytest.raises(FloatingPointError, match="diverged; lower optim.lr"):
        assign(np.full((1, 1, 1), np.nan), [1], [1])
    assert assign(np.zeros((2, 0, 3)), [0], [1, 1]).query_P.numel() == 0


@pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4], [0, 0], [9, 2]], ids=["some", "none", "nothing", "too-many"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_all_scenes_at_once_equal_one_after_the_other(counts, repeats):
    """Layers are matched as scipy does one by one; with more objects than queries, the dearest objects get none."""
    logits_LBQC1, boxes_LBQ7, targets = random_problem(counts)
    found = match(logits_LBQC1, boxes_LBQ7, targets, [repeats, repeats, 1])
    pairs = set(zip(*(column.tolist() for column in found), strict=True))
    expected, first = set(), 0
    for scene, count in enumerate(counts):
        boxes_K7, classes_K = targets.of_scene(scene)
        for layer in range(3):
            probability_QC1 = logits_LBQC1[layer, scene].softmax(-1)
            boxes_Q7 = boxes_LBQ7[layer, scene]
            cost_QK = torch.cdist(boxes_Q7[:, :3], boxes_K7[:, :3], p=1) - probability_QC1[:, classes_K]
            cost_QK = (cost_QK - 2 * box3d_giou(boxes_Q7, boxes_K7)).numpy()
            times = repeats if layer < 2 else 1
            query_R, column_R = linear_sum_assignment(np.tile(cost_QK, (1, times)))
            expected |= {
                (layer, scene, int(q), first + int(c) % count) for q, c in zip(query_R, column_R, strict=True)
            }
        first += count
    assert pairs == expected
    assert len(found.query_P) == sum(
        min(6, count * (repeats if layer < 2 else 1)) for layer in range(3) for count in counts
    )


@pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4], [0, 0], [9, 2]], ids=["some", "none", "nothing", "too-many"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_losses_equal_a_loop_over_layers_and_scenes(counts, repeats):
    logits_LBQC1, boxes_LBQ7, targets = random_problem(counts)
    predictions = [LayerPrediction(logits, boxes) for logits, boxes in zip(logits_LBQC1, boxes_LBQ7, strict=True)]
    losses = SetCriterion(4, LossWeights(no_object=0.1), repeats).layer_losses(predictions, targets)
    for layer in range(3):
        alone = slice(layer, layer + 1)
        matches = match(logits_LBQC1[alone], boxes_LBQ7[alone], targets, [repeats if layer < 2 else 1])
        wanted_BQ = torch.full((len(counts), 6), 4)
        centre = size = giou = 0.0
        for scene, query, entry in zip(*(column.tolist() for column in matches[1:]), strict=True):
            wanted_BQ[scene, query] = targets.classes_T[entry]
            box_7, truth_7 = boxes_LBQ7[layer, scene, query], targets.boxes_T7[entry]
            centre += float((box_7[:3] - truth_7[:3]).abs().sum())
            size += float((box_7[3:6].log() - truth_7[3:6].log()).abs().sum())
            giou += 1 - float(paired_giou(box_7[None], truth_7[None]))
        weights = torch.tensor([1.0, 1, 1, 1, 0.1])
        entropy = F.cross_entropy(logits_LBQC1[layer].flatten(0, 1), wanted_BQ.flatten(), weights, reduction="sum")
        count = max(1, len(matches.query_P))
        expected = {
            "classification": float(entropy) / max(1.0, float(weights[wanted_BQ].sum())),
            "centre": centre / count,
            "size": size / count,
            "giou": giou / count,
        }
        for name, value in expected.items():
            assert losses[name][layer].item() == pytest.approx(value, rel=1e-4, abs=1e-6), (name, layer)


def test_box_losses_by_hand():
    predicted_P7 = torch.tensor([[0.0, 0, 0, 2, 1, 1, 0], [5.0, 5, 5, 1, 1, 1, 0]])
    truth_P7 = torch.tensor([[0.5, 0, 0, 1, 1, 1, 0], [5.0, 5, 5, 1, 1, 1, math.pi / 4]])
    losses = box_losses(predicted_P7, truth_P7, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert losses["centre"].tolist() == pytest.approx([0.5, 0.0])
    assert losses["size"].tolist() == pytest.approx([math.log(2), 0.0])
    assert losses["giou"].tolist() == pytest.approx([0.5, 0.0])  # IoU 1 / 2 inside its own enclosing box
    assert losses["heading"].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)  # (cos, sin) of 90 degrees against (1, 0)


def test_classification_loss_by_hand_and_without_objects():
    boxes_Q7 = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0], [9.0, 0, 0, 1, 1, 1, 0]])
    logits_QC1 = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    criterion = SetCriterion(2, LossWeights(no_object=0.1))
    prediction = LayerPrediction(logits_QC1[None], boxes_Q7[None])
    losses = criterion.layer_losses([prediction], one_scene(boxes_Q7[:1], [0]))
    first, second = math.log(math.e**2 + 2) - 2, math.log(2 + math.e) - 1
    assert losses["classification"].item() == pytest.approx((first + 0.1 * second) / 1.1, rel=1e-5)
    losses = criterion.layer_losses([prediction], one_scene(torch.zeros(0, 7), []))
    assert losses["centre"].item() == 0.0 and losses["giou"].item() == 0.0
    background = math.log(math.e**2 + 2)
    assert losses["classification"].item() == pytest.approx(0.1 * (background + second) / 1.0, rel=1e-5)


def test_the_loss_is_the_mean_over_layers_plus_what_the_tokens_lose():
    logits_LBQC1, boxes_LBQ7, targets = random_problem([2, 3])
    predictions = [LayerPrediction(logits, boxes) for logits, boxes in zip(logits_LBQC1, boxes_LBQ7, strict=True)]
    seeds_BQ3 = targets.boxes_T7[targets.slot_BK[:, :1].expand(-1, 6), :3]  # in the middle of each scene's first box
    encoding = SceneEncoding(
        token_xyz_BM3=seeds_BQ3[:, :2] + torch.tensor([[0.0], [50.0]]),
        tokens_BMD=torch.zeros(2, 2, 4),
        query_features_BQD=torch.zeros(2, 6, 4),
        final=predictions[-1],
        intermediate=predictions[:-1],
        seed_xyz_BQ3=seeds_BQ3,
        vote_xyz_BQ3=seeds_BQ3 + 0.5,
        foreground_BM=torch.zeros(2, 2),
    )
    weights = LossWeights()
    loss, parts = SetCriterion(4, weights)(encoding, targets)
    assert parts["foreground"].item() == pytest.approx(math.log(2))
    owners_BQ3, inside_BQ = owner_centres(seeds_BQ3, targets)
    assert inside_BQ.all()
    assert parts["vote"].item() == pytest.approx(float((seeds_BQ3 + 0.5 - owners_BQ3).abs().sum(-1).mean()), rel=1e-5)
    layers = SetCriterion(4, weights).layer_losses(predictions, targets)
    total = sum(getattr(weights, name) * value_L.mean() for name, value_L in layers.items())
    total = total + weights.vote * parts["vote"] + weights.foreground * parts["foreground"]
    assert loss.item() == pytest.approx(float(total), rel=1e-6)
    assert all(parts[name].item() == value_L[-1].item() for name, value_L in layers.items())


def test_points_belong_to_the_smallest_box_around_them():
    boxes_K7 = torch.tensor([[0.0, 0, 0, 4, 4, 4, 0], [1.0, 0, 0, 1, 1, 1, 0], [10.0, 0, 0, 4, 1, 1, math.pi / 2]])
    points_P3 = torch.tensor([[1.2, 0.0, 0.0], [-1.0, 0, 0], [7.0, 0, 0], [10.0, 1.8, 0.0], [11.8, 0.0, 0.0]])
    none = torch.zeros(0, dtype=torch.int64)
    targets = DetectionTargets.of(
        [boxes_K7[:0], boxes_K7, boxes_K7[:1]], [none, torch.tensor([0, 1, 2]), torch.tensor([0])]
    )
    centres_BP3, inside_BP = owner_centres(points_P3.expand(3, -1, -1), targets)
    assert inside_BP[0].tolist() == [False] * 5
    assert inside_BP[1].tolist() == [True, True, False, True, False]
    assert inside_BP[2].tolist() == [True, True, False, False, False]
    assert centres_BP3[1, :2, 0].tolist() == [1.0, 0.0] and centres_BP3[1, 3, 0].item() == 10.0
    assert centres_BP3[2, :2, 0].tolist() == [0.0, 0.0]
    assert not owner_centres(points_P3[None], one_scene(boxes_K7[:0], []))[1].any()
