"""Boxes as the viewers draw them, against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.boxes import corners_3d
from threedr1.visualization.shown_boxes import EDGES, ShownBoxes, boxes_from_corners

metres = st.floats(-50, 50)
side = st.floats(0.05, 5)


def test_a_box_turned_by_a_quarter_swaps_its_sides():
    boxes = ShownBoxes.from_rows([[1, 2, 3, 4, 2, 1, np.pi / 2]])
    low_3, high_3 = boxes.corners_K83[0].min(0), boxes.corners_K83[0].max(0)
    np.testing.assert_allclose(low_3, [0, 0, 2.5], atol=1e-12)
    np.testing.assert_allclose(high_3, [2, 4, 3.5], atol=1e-12)
    np.testing.assert_allclose(boxes.quaternions_K4, [[0, 0, np.sqrt(0.5), np.sqrt(0.5)]])
    # the first corner lies at (-2, -1) in the box's own frame, which a quarter turn takes to (1, -2)
    np.testing.assert_allclose(boxes.corners_K83[0, 0], [2, 0, 2.5], atol=1e-12)


def test_corners_are_those_of_the_boxes_that_are_scored():
    rows = [[1, 2, 3, 4, 2, 1, 0.3], [-1, 0, 0.5, 0.1, 0.2, 0.3, -2.0]]
    ours_K83, theirs_K83 = ShownBoxes.from_rows(rows).corners_K83, corners_3d(np.array(rows)).numpy()
    # both go round counter-clockwise; these start at the opposite corner
    np.testing.assert_allclose(ours_K83[:, [2, 3, 0, 1, 6, 7, 4, 5]], theirs_K83, atol=1e-6)


def test_edges_are_as_long_as_the_sides():
    corners_83 = ShownBoxes.from_rows([[0, 0, 0, 4, 2, 1, 0.7]]).corners_K83[0]
    lengths = sorted(round(float(np.linalg.norm(corners_83[i] - corners_83[j])), 6) for i, j in EDGES)
    assert lengths == [1.0] * 4 + [2.0] * 4 + [4.0] * 4


@given(st.tuples(metres, metres, metres, side, side, side, st.floats(-4, 4)), st.randoms(use_true_random=False))
def test_corners_in_any_order_give_the_box_back(row, random):
    boxes = ShownBoxes.from_rows([row])
    order = list(range(8))
    random.shuffle(order)
    found = ShownBoxes(*boxes_from_corners(boxes.corners_K83[:, order]))
    gaps_88 = np.linalg.norm(found.corners_K83[0][:, None] - boxes.corners_K83[0], axis=-1)
    assert gaps_88.min(0).max() < 1e-6 and gaps_88.min(1).max() < 1e-6
    assert found.headings_K is not None and abs(found.headings_K[0]) <= np.pi / 4 + 1e-6


def test_flat_and_aligned_boxes_keep_their_axes():
    rows = [[0, 0, 0, 2, 1, 0, 0.0], [0, 0, 0, 2, 0, 1, 0.0]]
    centers_K3, sizes_K3, rotations_K33 = boxes_from_corners(ShownBoxes.from_rows(rows).corners_K83)
    np.testing.assert_allclose(centers_K3, 0, atol=1e-12)
    np.testing.assert_allclose(sizes_K3, [[2, 1, 0], [2, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(rotations_K33, np.stack([np.eye(3)] * 2), atol=1e-12)


def test_corners_of_no_upright_box_are_refused():
    corners_K83 = ShownBoxes.from_rows([[0, 0, 0, 2, 1, 1, 0.0]] * 2).corners_K83
    corners_K83[1, 0, 2] -= 0.5
    with pytest.raises(ValueError, match="box 1: its corners are not those of an upright box"):
        boxes_from_corners(corners_K83)


def test_boxes_and_points_move_together():
    """Corners of moved boxes are the moved corners, under a turn in space, a scale and a shift."""
    turn_33 = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # x to y, y to z, z to x
    matrix_44 = np.eye(4)
    matrix_44[:3, :3] = 0.01 * turn_33
    matrix_44[:3, 3] = [10, 20, 30]
    boxes = ShownBoxes.from_rows([[100, 200, 300, 40, 20, 10, 0.4]], ["chair"], [0.5])
    moved = boxes.moved(matrix_44)
    by_hand_83 = boxes.corners_K83[0] @ matrix_44[:3, :3].T + matrix_44[:3, 3]
    np.testing.assert_allclose(moved.corners_K83[0], by_hand_83, atol=1e-12)
    np.testing.assert_allclose(moved.sizes_K3, [[0.4, 0.2, 0.1]])
    assert moved.headings_K is None and moved.texts() == ["chair 0.50"]


def test_texts_and_missing_parts():
    boxes = ShownBoxes.from_rows([[0] * 3 + [1] * 3] * 3, ["a", "", "b"], [None, 0.256, 1.0])
    assert boxes.texts() == ["a", "0.26", "b 1.00"] and boxes.first(1).texts() == ["a"]
    assert len(ShownBoxes.from_rows([])) == 0 and ShownBoxes.from_rows([]).corners_K83.shape == (0, 8, 3)
    assert ShownBoxes.from_rows([]).quaternions_K4.shape == (0, 4)
    with pytest.raises(ValueError, match="give one to each box"):
        ShownBoxes.from_rows([[0] * 3 + [1] * 3], ["a", "b"])
