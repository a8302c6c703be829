import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.utils.boxes import (
    as_boxes,
    box3d_giou,
    box3d_iou,
    corners_3d,
    extents,
    from_extents,
    match_boxes,
    nms_3d,
    paired_giou,
    paired_giou_axis_aligned,
    paired_iou,
    points_in_boxes,
    volumes,
)

position = st.floats(-3, 3)
side = st.floats(0.05, 3)
angle = st.floats(-7, 7)
box = st.tuples(position, position, position, side, side, side, angle).map(list)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)


def turned(boxes_N7, degrees, shift):
    """The boxes after a rotation of the whole world about z and a shift."""
    radians = math.radians(degrees)
    cos, sin = math.cos(radians), math.sin(radians)
    moved = boxes_N7.clone()
    moved[:, 0] = boxes_N7[:, 0] * cos - boxes_N7[:, 1] * sin + shift[0]
    moved[:, 1] = boxes_N7[:, 0] * sin + boxes_N7[:, 1] * cos + shift[1]
    moved[:, 2] += shift[2]
    moved[:, 6] += radians
    return moved


def clipped_polygon_iou(first, second):
    """Independent check in plain floats: Sutherland-Hodgman clipping of one footprint by the other's edges."""

    def footprint(row):
        return [tuple(corner[:2]) for corner in corners_3d([row])[0, :4].tolist()]

    polygon, clip = footprint(first), footprint(second)
    for (ax, ay), (bx, by) in zip(clip, clip[1:] + clip[:1], strict=True):
        output = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            side_p = (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax)
            side_q = (bx - ax) * (q[1] - ay) - (by - ay) * (q[0] - ax)
            if side_p >= 0:
                output.append(p)
            if side_p * side_q < 0:
                t = side_p / (side_p - side_q)
                output.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = output
        if not polygon:
            return 0.0
    area = 0.5 * sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))
    top = min(first[2] + first[5] / 2, second[2] + second[5] / 2)
    bottom = max(first[2] - first[5] / 2, second[2] - second[5] / 2)
    inter = max(area, 0) * max(top - bottom, 0)
    return inter / (math.prod(first[3:6]) + math.prod(second[3:6]) - inter)


class TestParity:
    @pytest.fixture(scope="class")
    def pairs(self, parity_data):
        with np.load(parity_data / "boxes_iou.npz") as archive:
            return {name: archive[name] for name in archive.files}

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_paired(self, pairs, dtype, tolerance):
        first, second = (torch.tensor(pairs[name], dtype=dtype) for name in ("boxes1", "boxes2"))
        for name, value in (
            ("iou", paired_iou(first, second)),
            ("giou_aabb", paired_giou(first, second)),
            ("giou_hull", paired_giou(first, second, "hull")),
        ):
            assert value.dtype == dtype
            np.testing.assert_allclose(value.numpy(), pairs[name], rtol=0, atol=tolerance)

    def test_axis_aligned_path_and_loss(self, pairs):
        flat = ~np.isnan(pairs["iou_axis_aligned"])
        first, second = pairs["boxes1"][flat], pairs["boxes2"][flat]
        np.testing.assert_allclose(paired_iou(first, second), pairs["iou_axis_aligned"][flat], atol=1e-12)
        np.testing.assert_allclose(paired_giou_axis_aligned(first, second), pairs["giou_aabb"][flat], atol=1e-12)

    def test_matrix_equals_pairs(self, pairs):
        first, second = pairs["boxes1"][:60], pairs["boxes2"][:60]
        for matrix, paired in ((box3d_iou, paired_iou), (box3d_giou, paired_giou)):
            assert torch.equal(matrix(first, second).diagonal(), paired(first, second))


class TestOverlap:
    def test_hand_computed(self):
        unit = double([0, 0, 0, 1, 1, 1, 0])
        half = double([0.5, 0, 0, 1, 1, 1, 0])
        assert box3d_iou(unit, half).item() == pytest.approx(1 / 3, abs=1e-15)
        # a unit square turned by 45 degrees: the common octagon has area 2 (sqrt 2 - 1)
        octagon = 2 * (math.sqrt(2) - 1)
        diamond = double([0, 0, 0, 1, 1, 1, math.pi / 4])
        assert box3d_iou(unit, diamond).item() == pytest.approx(octagon / (2 - octagon), abs=1e-15)
        # two unit cubes 2 m apart: nothing in common, enclosed by 3 cubic metres
        assert box3d_giou(unit, double([2, 0, 0, 1, 1, 1, 0])).item() == pytest.approx(-1 / 3, abs=1e-15)

    def test_heading_is_counter_clockwise(self):
        long_box = double([0, 0, 0, 4, 0.2, 1, math.pi / 4])
        on_diagonal, off_diagonal = double([1, 1, 0, 0.2, 0.2, 1, 0]), double([1, -1, 0, 0.2, 0.2, 1, 0])
        assert box3d_iou(long_box, on_diagonal).item() > 0
        assert box3d_iou(long_box, off_diagonal).item() == 0

    @settings(max_examples=60, deadline=None)
    @given(box, box)
    def test_against_polygon_clipping(self, first, second):
        assert box3d_iou([first], [second]).dtype == torch.float64
        expected = clipped_polygon_iou(first, second)
        assert box3d_iou(double(first), double(second)).item() == pytest.approx(expected, abs=1e-9)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(box, min_size=1, max_size=4), st.lists(box, min_size=1, max_size=4))
    def test_symmetry_and_range(self, first, second):
        first_N7, second_M7 = double(*first), double(*second)
        iou_NM = box3d_iou(first_N7, second_M7)
        assert torch.allclose(iou_NM, box3d_iou(second_M7, first_N7).T, atol=1e-12, rtol=0)
        assert (iou_NM >= 0).all() and (iou_NM <= 1 + 1e-12).all()
        for enclosing in ("aabb", "hull"):
            giou_NM = box3d_giou(first_N7, second_M7, enclosing)
            assert (giou_NM > -1).all() and (giou_NM <= iou_NM + 1e-12).all()
        assert torch.allclose(box3d_iou(first_N7, first_N7).diagonal(), torch.ones(len(first)).double(), atol=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(box, box, st.floats(-360, 360), st.tuples(position, position, position))
    def test_invariance(self, first, second, degrees, shift):
        before = double(first), double(second)
        after = tuple(turned(boxes, degrees, shift) for boxes in before)
        assert torch.allclose(box3d_iou(*before), box3d_iou(*after), atol=1e-10)
        assert torch.allclose(box3d_giou(*before, "hull"), box3d_giou(*after, "hull"), atol=1e-10)

    @settings(max_examples=30, deadline=None)
    @given(box)
    def test_same_solid_in_other_words(self, row):
        cx, cy, cz, dx, dy, dz, heading = row
        swapped = [cx, cy, cz, dy, dx, dz, heading + math.pi / 2]
        assert box3d_iou(double(row), double(swapped)).item() == pytest.approx(1, abs=1e-12)
        assert box3d_giou(double(row), double(swapped), "hull").item() == pytest.approx(1, abs=1e-12)

    def test_no_volume_overlaps_nothing(self):
        flat = double([0, 0, 0, 1, 1, 0, 0], [0, 0, 0, -1, 1, 1, 0.3])
        assert (box3d_iou(flat, flat) == 0).all()
        assert torch.isfinite(box3d_giou(flat, flat)).all()
        assert volumes(flat).tolist() == [0, 0]

    def test_float32_far_from_the_origin(self):
        row = torch.tensor([[500.0, -300.0, 10.0, 0.5, 0.5, 0.5, 0.7]])
        assert box3d_iou(row, row).item() == pytest.approx(1, abs=1e-6)

    def test_empty_and_shapes(self):
        three = np.tile([0.0, 0, 0, 1, 1, 1], (3, 1))
        assert box3d_iou([], three).shape == (0, 3)
        assert box3d_giou(three, np.zeros((0, 7))).shape == (3, 0)
        assert paired_giou([], [], "hull").shape == (0,)
        assert corners_3d([]).shape == (0, 8, 3)
        with pytest.raises(ValueError, match=r"shape \[K, 7\]"):
            as_boxes(np.zeros((2, 5)))
        with pytest.raises(ValueError, match="wrap a single box"):
            as_boxes(np.zeros(7))
        with pytest.raises(ValueError, match="equally many"):
            paired_iou(three, three[:2])

    def test_loss_gradient(self):
        first = double([0, 0, 0, 1, 2, 1, 0], [3, 3, 0, 1, 1, 1, 0]).requires_grad_()
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, 0], [0, 0, 0, 1, 1, 1, 0])
        assert torch.autograd.gradcheck(lambda boxes: paired_giou_axis_aligned(boxes, second), first)
        paired_giou_axis_aligned(first, second).sum().backward()
        # the second pair does not overlap: moving towards the target must still raise its score
        assert first.grad is not None and (first.grad[1, :2] < 0).all()

    def test_oriented_gradient(self):
        first = double([0, 0, 0, 1, 2, 1, 0.3]).requires_grad_()
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, -0.4])
        assert torch.autograd.gradcheck(lambda boxes: paired_iou(boxes, second), first)


class TestGeometry:
    def test_corners_and_extents(self):
        quarter = double([1, 2, 3, 4, 2, 1, math.pi / 2])
        corners = corners_3d(quarter)[0]
        # local (+, +) corner (2, 1) turns to (-1, 2)
        assert torch.allclose(corners[0], torch.tensor([0, 4, 2.5]).double())
        assert torch.allclose(corners[4] - corners[0], torch.tensor([0, 0, 1.0]).double())
        lower, upper = extents(quarter)
        assert torch.allclose(lower[0], corners.amin(0)) and torch.allclose(upper[0], corners.amax(0))
        assert torch.allclose(from_extents(lower, upper)[0, 3:], torch.tensor([2, 4, 1, 0.0]).double())

    @settings(max_examples=30, deadline=None)
    @given(box)
    def test_points_on_the_inside_of_corners(self, row):
        boxes = double(row)
        centre = boxes[:, None, :3]
        corners = corners_3d(boxes)
        inner, outer = (centre + (corners - centre) * scale for scale in (0.999, 1.001))
        assert points_in_boxes(inner[0], boxes).all()
        assert not points_in_boxes(outer[0], boxes).any()

    def test_points_match_volume(self):
        points = np.random.default_rng(0).uniform(-2, 2, (40_000, 3))
        boxes = double([0.2, -0.1, 0.3, 2, 1, 1.5, 0.6])
        share = points_in_boxes(points, boxes).double().mean().item()
        assert share == pytest.approx(3 / 64, abs=0.003)

    def test_chunks_agree(self, monkeypatch):
        points = np.random.default_rng(1).uniform(-2, 2, (50, 3))
        boxes = np.concatenate([np.random.default_rng(2).uniform(0.2, 2, (7, 6)), np.zeros((7, 1))], axis=1)
        whole = points_in_boxes(points, boxes)
        monkeypatch.setattr("threedr1.utils.boxes._MAX_CONTAINMENT_ELEMENTS", 60)
        assert torch.equal(points_in_boxes(points, boxes), whole)
        assert points_in_boxes(np.zeros((0, 3)), boxes).shape == (0, 7)


class TestSuppressionAndMatching:
    boxes = [[0, 0, 0, 1, 1, 1, 0], [0.1, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0]]

    def test_nms(self):
        assert nms_3d(self.boxes, [0.5, 0.9, 0.3, 0.3], 0.25).tolist() == [1, 2]
        assert nms_3d(self.boxes, [0.5, 0.9, 0.3, 0.3], 0.25, [0, 1, 2, 2]).tolist() == [1, 0, 2]
        assert nms_3d([], [], 0.25).tolist() == []
        with pytest.raises(ValueError, match="one score a box"):
            nms_3d(self.boxes, [0.1], 0.25)

    def test_nms_threshold_is_strict_and_chains_stop(self):
        # 0 suppresses 1; 1, gone itself, must not suppress 2
        row = [[0, 0, 0, 1, 1, 1, 0], [0.4, 0, 0, 1, 1, 1, 0], [0.8, 0, 0, 1, 1, 1, 0]]
        assert nms_3d(row, [3, 2, 1], 0.25).tolist() == [0, 2]
        exact = box3d_iou(double(row[0]), double(row[1])).item()
        assert nms_3d(double(*row[:2]), [2, 1], exact).tolist() == [0, 1]

    def test_match(self):
        # greedy by IoU would take (1, 0) first and leave 0 with nothing
        targets = [[0, 0, 0, 1, 1, 1, 0], [0.3, 0, 0, 1, 1, 1, 0]]
        predicted = [[-0.3, 0, 0, 1, 1, 1, 0], [0.1, 0, 0, 1, 1, 1, 0]]
        matches = match_boxes(predicted, targets)
        assert matches.predicted.tolist() == [0, 1] and matches.target.tolist() == [0, 1]
        assert matches.values.tolist() == pytest.approx([0.7 / 1.3, 0.8 / 1.2])
        assert len(match_boxes([], targets).values) == 0
        assert len(match_boxes(predicted, targets[:1], "giou").values) == 1
        with pytest.raises(ValueError, match="finite"):
            match_boxes([[math.nan] * 7], targets)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    rng = np.random.default_rng(0)
    boxes = torch.tensor(np.concatenate([rng.uniform(0.2, 2, (40, 6)), rng.uniform(-4, 4, (40, 1))], axis=1))
    for function in (box3d_iou, box3d_giou):
        assert torch.allclose(function(boxes.cuda(), boxes.cuda()).cpu(), function(boxes, boxes), atol=1e-12)
    scores = torch.tensor(rng.random(40))
    assert nms_3d(boxes.cuda(), scores.cuda(), 0.25).cpu().tolist() == nms_3d(boxes, scores, 0.25).tolist()
