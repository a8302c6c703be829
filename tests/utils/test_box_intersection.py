"""The compiled loop: against clipping and sampling written here, and against the vectorised path of utils/boxes.py."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.utils import boxes as boxes_module
from threedr1.utils.boxes import as_boxes, box3d_giou, box3d_iou, match_boxes, nms_3d

box_intersection = pytest.importorskip(
    "threedr1.utils.box_intersection", reason="box_intersection is not built"
).box_intersection

position = st.floats(-3, 3)
side = st.floats(0.05, 3)
angle = st.floats(-7, 7)
box = st.tuples(position, position, position, side, side, side, angle).map(list)


def volumes_in_common(first, second):
    first_N7, second_M7 = (np.array(rows, dtype=np.float64).reshape(-1, 7) for rows in (first, second))
    out_NM = np.full((len(first_N7), len(second_M7)), -1.0)
    box_intersection(first_N7, second_M7, out_NM)
    return out_NM


def in_common(first, second):
    return volumes_in_common([first], [second]).item()


def footprint(row):
    """Corners, counter-clockwise, as complex numbers."""
    turn, half = cmath.exp(1j * row[6]), complex(row[3], row[4]) / 2
    return [complex(row[0], row[1]) + turn * corner for corner in (half, -half.conjugate(), -half, half.conjugate())]


def cross(a, b):
    return (a.conjugate() * b).imag


def clipped_volume(first, second):
    """Sutherland and Hodgman's clipping of one footprint by the other's edges, times the common height."""
    polygon, window = footprint(first), footprint(second)
    for a, b in zip(window, window[1:] + window[:1], strict=True):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            side_p, side_q = cross(b - a, p - a), cross(b - a, q - a)
            if side_p >= 0:
                kept.append(p)
            if side_p * side_q < 0:
                kept.append(p + (q - p) * (side_p / (side_p - side_q)))
        polygon = kept
    middle = sum(polygon) / max(1, len(polygon))  # near the origin a cross product loses nothing
    rim = [p - middle for p in polygon]
    area = sum(cross(p, q) for p, q in zip(rim, rim[1:] + rim[:1], strict=True)) / 2
    top = min(first[2] + first[5] / 2, second[2] + second[5] / 2)
    bottom = max(first[2] - first[5] / 2, second[2] - second[5] / 2)
    return area * max(0.0, top - bottom)


def random_boxes(count, seed):
    """Furniture in a room."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.uniform(0, (4, 3, 2.5), (count, 3)),
        rng.uniform(0.2, 2, (count, 3)),
        rng.uniform(-4, 4, (count, 1)),
    ]
    return np.concatenate(columns, axis=1)


class TestVolumes:
    @settings(max_examples=300, deadline=None)
    @given(box, box)
    def test_against_clipping(self, first, second):
        assert in_common(first, second) == pytest.approx(clipped_volume(first, second), abs=1e-12)

    def test_many_against_clipping(self):
        first, second = random_boxes(60, 0), random_boxes(70, 1)
        expected = [[clipped_volume(a, b) for b in second.tolist()] for a in first.tolist()]
        np.testing.assert_allclose(volumes_in_common(first, second), expected, rtol=0, atol=1e-13)
        assert (np.array(expected) > 0).mean() > 0.1

    def test_against_sampling(self):
        rng = np.random.default_rng(0)
        points_P3 = rng.uniform(-2, 2, (200_000, 3))
        for first, second in (
            ([0.2, -0.1, 0.3, 2, 1, 1.5, 0.6], [0.4, 0.3, 0.1, 1, 2.2, 1, -0.5]),
            ([0, 0, 0, 3, 0.4, 2, 1.2], [0.3, 0.2, 0.5, 2, 2, 2, 3.0]),
        ):
            inside_P = np.ones(len(points_P3), dtype=bool)
            for row in (first, second):
                turned_P = (points_P3[:, 0] - row[0] + 1j * (points_P3[:, 1] - row[1])) * cmath.exp(-1j * row[6])
                inside_P &= (abs(turned_P.real) < row[3] / 2) & (abs(turned_P.imag) < row[4] / 2)
                inside_P &= abs(points_P3[:, 2] - row[2]) < row[5] / 2
            assert in_common(first, second) == pytest.approx(64 * inside_P.mean(), abs=0.03)

    def test_hand_computed(self):
        unit = [0, 0, 0, 1, 1, 1, 0]
        assert in_common(unit, [0.25, 0.5, -0.75, 1, 1, 1, 0]) == 0.75 * 0.5 * 0.25
        # a unit square turned by 45 degrees: the common octagon has area 2 (sqrt 2 - 1)
        assert in_common(unit, [0, 0, 0, 1, 1, 1, math.pi / 4]) == pytest.approx(2 * (math.sqrt(2) - 1), abs=1e-15)
        # a bar through a cube, turned: a parallelogram of height 1 and base 0.1 / cos
        assert in_common(unit, [0, 0, 0, 9, 0.1, 9, 0.3]) == pytest.approx(0.1 / math.cos(0.3), abs=1e-15)
        # counter-clockwise: the long box reaches the corner in front on the left, not the one on the right
        long = [0, 0, 0, 4, 0.2, 1, math.pi / 4]
        assert in_common(long, [1, 1, 0, 0.2, 0.2, 1, 0]) > 0 and in_common(long, [1, -1, 0, 0.2, 0.2, 1, 0]) == 0

    @pytest.mark.parametrize("turn", [0.0, 1e-15, 1e-12, 1e-9, 1e-6, -1e-6, 1e-3])
    def test_turned_a_little(self, turn):
        # two squares of side s turned by t share the octagon of area 2 s^2 / (1 + sin |t| + cos t)
        expected = 2 / (1 + math.sin(abs(turn)) + math.cos(turn))
        for heading in (0.0, 0.4, -3.0):
            for scale in (1e-3, 1.0, 50.0):
                row = [3, -2, 1, scale, scale, scale, heading]
                volume = in_common(row, [*row[:6], heading + turn])
                assert volume / scale**3 == pytest.approx(expected, abs=2e-15 * (1 + 9 / scale))

    @pytest.mark.parametrize("heading", [0.0, 0.3, math.pi / 4, 2.0])
    def test_equal_nested_and_touching(self, heading):
        row = [1, 2, 3, 2, 1, 0.5, heading]
        same = [[*row[:6], heading + math.pi], [1, 2, 3, 1, 2, 0.5, heading + math.pi / 2]]
        for other in (row, *same, [1, 2, 3, 9, 9, 9, heading + 0.1]):
            assert in_common(row, other) == pytest.approx(1, abs=1e-15)
        inner = [1.1, 2.05, 3.05, 0.1, 0.2, 0.3, heading + 1]
        assert in_common(row, inner) == pytest.approx(0.006, abs=1e-16)
        step = cmath.exp(1j * heading)
        beside, above = [1 + 2 * step.real, 2 + 2 * step.imag, *row[2:]], [1, 2, 3.5, *row[3:]]
        assert 0 <= in_common(row, beside) < 1e-15 and in_common(row, above) == 0
        assert in_common(row, [1, 2, 9, *row[3:]]) == in_common(row, [9, 2, 3, *row[3:]]) == 0

    @settings(max_examples=100, deadline=None)
    @given(box, box, st.sampled_from([3, 4, 5]), st.sampled_from([0.0, -0.0, -1.0]))
    def test_without_volume(self, first, second, axis, size):
        first[axis] = size
        assert in_common(first, second) == in_common(second, first) == in_common(first, first) == 0

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, number):
        unit = [0.0, 0, 0, 1, 1, 1, 0.2]
        broken = [[number if column == axis else value for column, value in enumerate(unit)] for axis in range(7)]
        assert np.isnan(volumes_in_common(broken, [unit, [9, *unit[1:]]])).all()
        assert np.isnan(volumes_in_common([unit], broken)).all()
        mixed = volumes_in_common([unit, broken[0]], [unit, broken[1]])
        assert mixed[0, 0] == pytest.approx(1) and np.isnan(mixed.flat[1:]).all()

    def test_parity(self, parity_data):
        with np.load(parity_data / "boxes_iou.npz") as archive:
            first, second, expected = archive["boxes1"], archive["boxes2"], archive["inter_volume"]
        found = [in_common(a, b) for a, b in zip(first, second, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


class TestBuffers:
    def test_empty_strided_and_read_only(self):
        rows = random_boxes(8, 0)
        box_intersection(np.zeros((0, 7)), rows, np.zeros((0, 8)))
        box_intersection(rows, np.zeros((0, 7)), np.zeros((8, 0)))
        expected = volumes_in_common(rows[::2], rows[1::2])
        rows.flags.writeable = False
        wide = np.full((4, 8), 7.0)
        box_intersection(rows[::2], rows[1::2], wide[:, ::2])
        assert (wide[:, ::2] == expected).all() and (wide[:, 1::2] == 7).all()

    def test_refused(self):
        rows = random_boxes(3, 0)
        with pytest.raises(ValueError, match="append heading 0"):
            box_intersection(rows[:, :6], rows, np.zeros((3, 3)))
        with pytest.raises(ValueError, match="out_NM is 3 x 2"):
            box_intersection(rows, rows, np.zeros((3, 2)))
        with pytest.raises(ValueError, match="double"):
            box_intersection(rows.astype(np.float32), rows, np.zeros((3, 3)))


class TestChoice:
    """utils/boxes.py takes the loop for numbers on a CPU, and what comes out does not tell that it did."""

    @pytest.fixture
    def calls(self, monkeypatch):
        counted = []

        def counting(*arguments):
            counted.append(arguments)
            box_intersection(*arguments)

        monkeypatch.setattr(boxes_module, "_box_intersection", counting)
        return counted

    def vectorised(self, function, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(boxes_module, "_box_intersection", None)
            return function(*arguments)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
    def test_same_numbers_and_types(self, calls, dtype, tolerance):
        first, second = (torch.tensor(random_boxes(count, count), dtype=dtype) for count in (60, 50))
        for function in (box3d_iou, box3d_giou, lambda *pair: box3d_giou(*pair, "hull")):
            for pair in (
                (first, second),
                (first[:1], second),
                (first[:, :6], second),
                (first.numpy(), second.numpy()),
            ):
                del calls[:]
                values, expected = function(*pair), self.vectorised(function, *pair)
                assert calls and type(values) is type(expected) and values.is_contiguous()
                torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)  # types and shapes too

    def test_other_types(self, calls):
        rows = random_boxes(6, 3)
        for pair in (
            (rows.tolist(), rows.tolist()),
            (torch.tensor(rows).half(), rows.astype(np.float32)),
            (rows.round().astype(int) + 1, rows.astype(np.float32)[:, :6]),
            (torch.tensor(rows).T.contiguous().T, torch.tensor(rows).float()),
            ([], rows),
        ):
            torch.testing.assert_close(box3d_iou(*pair), self.vectorised(box3d_iou, *pair), rtol=0, atol=1e-6)
        assert calls

    def test_suppression_and_matching(self, calls):
        rng = np.random.default_rng(0)
        rows, scores = torch.tensor(random_boxes(120, 0)).float(), rng.random(120)
        assert nms_3d(rows, scores, 0.1).tolist() == self.vectorised(nms_3d, rows, scores, 0.1).tolist()
        for metric in ("iou", "giou"):
            arguments = rows[:40].clone().requires_grad_(), rows[30:80], metric
            found, expected = match_boxes(*arguments), self.vectorised(match_boxes, *arguments)
            torch.testing.assert_close(found.values.sum(), expected.values.sum(), rtol=0, atol=1e-5)
            if metric == "giou":  # which of the boxes that meet nothing go together, IoU leaves open
                assert torch.equal(found.target, expected.target)
        assert len(calls) == 3

    def test_without_headings_takes_the_vectorised_path(self, calls):
        rows = random_boxes(6, 3)
        level = rows * [1, 1, 1, 1, 1, 1, 0]
        assert torch.equal(box3d_iou(level, level), box3d_iou(rows[:, :6], rows[:, :6])) and not calls
        expected = torch.tensor(volumes_in_common(level, level))
        volume = expected.diagonal()
        expected = expected / (volume[:, None] + volume - expected)
        torch.testing.assert_close(box3d_iou(level, level), expected, rtol=0, atol=1e-14)

    def test_derivatives_take_the_vectorised_path(self, calls):
        rows = torch.tensor(random_boxes(4, 0))
        leaf = rows.clone().requires_grad_()
        assert box3d_iou(leaf, rows).requires_grad and box3d_giou(rows, leaf).requires_grad
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
            assert torch.autograd.forward_ad.unpack_dual(box3d_iou(rows, dual)).tangent is not None
        assert not calls
        with torch.no_grad():
            assert not box3d_iou(leaf, rows).requires_grad
        assert len(calls) == 1

    def test_input_is_left_alone(self, calls):
        rows = torch.tensor(random_boxes(4, 0))
        before = rows.clone()
        values = box3d_iou(rows, rows)
        values += 1
        assert calls and torch.equal(rows, before) and as_boxes(rows) is rows
