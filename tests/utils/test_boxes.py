import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.utils import boxes as boxes_module
from threedr1.utils.boxes import (
    as_boxes,
    batched_nms_3d,
    box3d_giou,
    box3d_iou,
    boxes_to_xyzxyz,
    corners_3d,
    extents,
    giou_axis_aligned,
    match_boxes,
    nms_3d,
    paired_giou,
    paired_iou,
    points_in_boxes,
    volumes,
    xyzxyz_to_boxes,
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


@pytest.fixture(scope="module")
def pairs(parity_data):
    with np.load(parity_data / "boxes_iou.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="class", params=["vectorised", "compiled"])
def both_paths(request):
    """All pairs without a gradient on a CPU: computed by torch, and by the compiled loop where it is built."""
    if request.param == "compiled":
        pytest.importorskip("threedr1.utils.box_intersection", reason="box_intersection is not built")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes_module, "_box_intersection", None)
        yield


@pytest.mark.usefixtures("both_paths")
class TestParity:
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

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_matrix(self, pairs, dtype, tolerance):
        some = slice(None, None, 9)
        first, second = (torch.tensor(pairs[name][some], dtype=dtype) for name in ("boxes1", "boxes2"))
        for name, value in (("iou", box3d_iou(first, second)), ("giou_aabb", box3d_giou(first, second))):
            assert value.dtype == dtype
            np.testing.assert_allclose(value.diagonal().numpy(), pairs[name][some], rtol=0, atol=tolerance)

    def test_axis_aligned_path_and_loss(self, pairs):
        flat = ~np.isnan(pairs["iou_axis_aligned"])
        first, second = pairs["boxes1"][flat], pairs["boxes2"][flat]
        np.testing.assert_allclose(paired_iou(first, second), pairs["iou_axis_aligned"][flat], atol=1e-12)
        np.testing.assert_allclose(
            giou_axis_aligned(torch.tensor(first), torch.tensor(second)), pairs["giou_aabb"][flat], atol=1e-12
        )

    def test_matrix_equals_pairs(self, pairs):
        first, second = pairs["boxes1"][:60], pairs["boxes2"][:60]
        for matrix, paired in ((box3d_iou, paired_iou), (box3d_giou, paired_giou)):
            torch.testing.assert_close(matrix(first, second).diagonal(), paired(first, second), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("both_paths")
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

    @settings(max_examples=60, deadline=None)
    @given(box, box, st.sampled_from([3, 4, 5]), st.sampled_from([3, 4, 5]))
    def test_rounding_gives_no_volume(self, first, second, first_axis, second_axis):
        first[first_axis], second[second_axis] = 0, 0
        boxes = double(first, [*first[:3], *second[3:]], second)
        assert (box3d_iou(boxes, boxes) == 0).all() and (paired_iou(boxes, boxes) == 0).all()

    def test_nan_stays(self):
        whole, broken = double([0, 0, 0, 1, 1, 1, 0.2]), double([0, 0, 0, 1, 1, 1, math.nan])
        assert box3d_iou(whole, broken).isnan().all() and box3d_iou(broken, whole).isnan().all()

    def test_blocks_agree(self, monkeypatch):
        rng = np.random.default_rng(0)
        boxes = np.concatenate([rng.uniform(0.2, 2, (23, 6)), rng.uniform(-4, 4, (23, 1))], axis=1)
        calls = [
            lambda boxes: box3d_iou(boxes, boxes[:9]),
            lambda boxes: box3d_giou(boxes[:, :6], boxes[:9, :6]),
            lambda boxes: box3d_giou(boxes, boxes[:9], "hull"),
        ]
        whole = [call(boxes) for call in calls]
        monkeypatch.setattr(boxes_module, "_BLOCK_PAIRS_CPU", 30)
        for call, expected in zip(calls, whole, strict=True):
            assert expected.shape == (23, 9)
            torch.testing.assert_close(call(boxes), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        rng = np.random.default_rng(0)
        half = torch.tensor(rng.uniform(0.2, 2, (12, 7)), dtype=dtype)
        for function in (box3d_iou, paired_giou):
            values = function(half, half)
            assert values.dtype == torch.float32 and torch.equal(values, function(half.float(), half.float()))
        assert as_boxes(half).dtype == volumes(half).dtype == corners_3d(half).dtype == torch.float32
        assert box3d_iou(half, half.double()).dtype == torch.float64

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


class TestGeometry:
    def test_corners_and_extents(self):
        quarter = double([1, 2, 3, 4, 2, 1, math.pi / 2])
        corners = corners_3d(quarter)[0]
        # local (+, +) corner (2, 1) turns to (-1, 2)
        assert torch.allclose(corners[0], torch.tensor([0, 4, 2.5]).double())
        assert torch.allclose(corners[4] - corners[0], torch.tensor([0, 0, 1.0]).double())
        lower, upper = extents(quarter)
        assert torch.allclose(lower[0], corners.amin(0)) and torch.allclose(upper[0], corners.amax(0))
        assert torch.equal(boxes_to_xyzxyz(quarter), torch.cat([lower, upper], dim=1))
        assert torch.allclose(xyzxyz_to_boxes(boxes_to_xyzxyz(quarter))[0, 3:], torch.tensor([2, 4, 1, 0.0]).double())

    def test_formats(self):
        points = np.array([[0, 1, 2], [4, 3, 2.5], [1, 1, 2]], dtype=np.float32)
        row = np.concatenate([points.min(0), points.max(0)])[None]
        box = xyzxyz_to_boxes(row)
        assert box.dtype == torch.float32 and box.tolist() == [[2, 2, 2.25, 4, 2, 0.5, 0]]
        assert boxes_to_xyzxyz(box).tolist() == boxes_to_xyzxyz(box[:, :6]).tolist() == row.tolist()
        assert xyzxyz_to_boxes([]).shape == (0, 7) and boxes_to_xyzxyz([]).shape == (0, 6)
        with pytest.raises(ValueError, match=r"shape \[K, 6\]"):
            xyzxyz_to_boxes(np.zeros((2, 7)))

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
        monkeypatch.setattr("threedr1.utils.boxes._CONTAINMENT_ELEMENTS_CPU", 60)
        assert torch.equal(points_in_boxes(points, boxes), whole)
        assert points_in_boxes(np.zeros((0, 3)), boxes).shape == (0, 7)


@pytest.mark.usefixtures("both_paths")
class TestSuppressionAndMatching:
    boxes = [[0, 0, 0, 1, 1, 1, 0], [0.1, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0]]

    def test_nms(self):
        assert nms_3d(self.boxes, [0.5, 0.9, 0.3, 0.3], 0.25).tolist() == [1, 2]
        assert nms_3d(self.boxes, [0.5, 0.9, 0.3, 0.3], 0.25, [0, 1, 2, 2]).tolist() == [1, 0, 2]
        assert nms_3d([], [], 0.25).tolist() == []
        assert nms_3d(self.boxes[:1], [0.5], 0.25).tolist() == nms_3d(self.boxes[:1], [0.5], 0.25, [2]).tolist() == [0]
        with pytest.raises(ValueError, match="one score a box"):
            nms_3d(self.boxes, [0.1], 0.25)

    def test_nms_threshold_is_strict_and_chains_stop(self):
        # 0 suppresses 1; 1, gone itself, must not suppress 2
        row = [[0, 0, 0, 1, 1, 1, 0], [0.4, 0, 0, 1, 1, 1, 0], [0.8, 0, 0, 1, 1, 1, 0]]
        assert nms_3d(row, [3, 2, 1], 0.25).tolist() == [0, 2]
        exact = box3d_iou(double(row[0]), double(row[1])).item()
        assert nms_3d(double(*row[:2]), [2, 1], exact).tolist() == [0, 1]

    def test_nms_of_a_batch_is_that_of_each_scene(self):
        # the second scene is the first in another order, one box turned: headings of one must not change the other
        boxes_BK7 = torch.tensor([self.boxes, self.boxes[::-1]])
        boxes_BK7[1, 0, 6] = 0.3
        scores_BK = torch.tensor([[0.5, 0.9, 0.3, 0.3], [0.1, 0.2, 0.9, 0.8]])
        classes_BK = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 1]])
        for classes in (None, classes_BK):
            found = batched_nms_3d(boxes_BK7, scores_BK, 0.25, classes)
            assert [kept.tolist() for kept in found] == [
                nms_3d(boxes_BK7[row], scores_BK[row], 0.25, None if classes is None else classes[row]).tolist()
                for row in range(2)
            ]
        assert found[0].tolist() == [1, 0, 2] and found[1].tolist() == [2, 1]

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
class TestGpu:
    @pytest.fixture
    def boxes(self):
        rng = np.random.default_rng(0)
        return torch.tensor(np.concatenate([rng.uniform(0.2, 2, (40, 6)), rng.uniform(-4, 4, (40, 1))], axis=1))

    def test_equals_cpu(self, boxes):
        for function in (box3d_iou, box3d_giou, lambda first, second: box3d_giou(first, second, "hull")):
            for columns in (6, 7):
                first, second = boxes[:, :columns], boxes[:25, :columns]
                values = function(first.cuda(), second.cuda())
                assert values.is_cuda
                torch.testing.assert_close(values.cpu(), function(first, second), rtol=0, atol=1e-12)
        inside = points_in_boxes(boxes[:, :3].cuda(), boxes.cuda())
        assert torch.equal(inside.cpu(), points_in_boxes(boxes[:, :3], boxes))
        scores = torch.tensor(np.random.default_rng(1).random(40))
        assert nms_3d(boxes.cuda(), scores.cuda(), 0.25).cpu().tolist() == nms_3d(boxes, scores, 0.25).tolist()
        on_gpu, on_cpu = match_boxes(boxes[:9].cuda(), boxes[5:].cuda()), match_boxes(boxes[:9], boxes[5:])
        assert on_gpu.target.cpu().tolist() == on_cpu.target.tolist()

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_parity(self, pairs, dtype, tolerance):
        first, second = (torch.tensor(pairs[name], dtype=dtype, device="cuda") for name in ("boxes1", "boxes2"))
        for name, value in (
            ("iou", paired_iou(first, second)),
            ("giou_aabb", paired_giou(first, second)),
            ("giou_hull", paired_giou(first, second, "hull")),
            ("iou", box3d_iou(first, second).diagonal()),
            ("giou_aabb", box3d_giou(first, second).diagonal()),
        ):
            np.testing.assert_allclose(value.cpu().numpy(), pairs[name], rtol=0, atol=tolerance)
