"""Where a room is: its own extent without stray points; every viewer looks there."""

import re
from pathlib import Path

import numpy as np
import pytest

import threedr1
from threedr1.visualization.extent import room_extent
from threedr1.visualization.palette import LAYERS
from threedr1.visualization.pictures import overview
from threedr1.visualization.rerun_view import eye_of
from threedr1.visualization.scene_page import page_data
from threedr1.visualization.shown_boxes import ShownBoxes
from threedr1.visualization.shown_scene import ShownScene
from threedr1.visualization.top_view import top_view

from ..odd_scene import MAGENTA, odd_scene

ROOM = (np.array([1231.5, -990.1, 55.0]), np.array([1237.5, -986.1, 57.4]))


def with_strays(count: int = 20, away: float = 300.0):
    """The room of odd_scene, and some points far from it on all sides."""
    scene = odd_scene()
    strays_N3 = np.array([1234.5, -988.1, 56.0]) + np.random.default_rng(0).uniform(-away, away, (count, 3))
    scene.points_N3 = np.concatenate([scene.points_N3, strays_N3.astype(np.float32)])
    scene.colors_N3 = np.concatenate([scene.colors_N3, np.zeros((count, 3), np.uint8)])
    return scene


def test_without_stray_points_it_is_the_extent_of_all():
    scene = odd_scene()
    found_23 = room_extent(scene)
    np.testing.assert_allclose(found_23, [scene.points_N3.min(0), scene.points_N3.max(0)])
    np.testing.assert_allclose(found_23, ROOM, atol=1e-3)


def test_stray_points_widen_it_by_a_twentieth_at_most():
    """20 of 19,000 points: a tenth of a percent, below the 0.2 percent that are looked past."""
    low_3, high_3 = room_extent(with_strays())
    assert (low_3 > ROOM[0] - [0.31, 0.21, 0.13]).all() and (high_3 < ROOM[1] + [0.31, 0.21, 0.13]).all()
    assert (low_3 <= ROOM[0] + 0.01).all() and (high_3 >= ROOM[1] - 0.01).all()


def test_boxes_widen_it_by_half_the_room_at_most():
    near_3, far_3 = np.array([[1238.0, -988, 56]]), np.array([[1e7, -988, 56]])
    assert room_extent(odd_scene(), near_3)[1][0] == pytest.approx(1238.0)
    assert room_extent(odd_scene(), far_3)[1][0] == pytest.approx(1237.5 + 3.0, abs=0.01)


def test_every_viewer_looks_at_the_room_in_spite_of_stray_points():
    clean, strayed = odd_scene(), with_strays()
    plans = [(top_view(scene, [], width=680) == MAGENTA).all(-1).sum() for scene in (clean, strayed)]
    assert plans[1] > 0.75 * plans[0] > 3000, "the plan is as large as before"
    for look in (eye_of, lambda scene: [overview(scene)[1].position_3]):
        before, after = look(clean), look(strayed)
        assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) < 1.0
    pages = [page_data(ShownScene(scene)) for scene in (clean, strayed)]
    np.testing.assert_allclose(pages[0]["extent"], pages[1]["extent"], atol=0.35)
    assert max(pages[1]["points"]["step"]) < 20 / 65535, "16 bits are for the room, not for what lies far from it"
    assert "20 stray points not shown" in pages[1]["notes"] and not pages[0]["notes"]


def test_a_box_outside_the_points_is_on_the_plan():
    red = (255, 0, 0)
    outside = ShownBoxes.from_rows([[1239, -988, 56, 1, 1, 1]])
    image_HW3 = top_view(odd_scene(), [(outside, red)], width=680)
    columns = np.nonzero((image_HW3 == red).all(-1))[1]
    assert columns.min() > 500 and columns.max() < 645, "within the margin of 40 pixels"


def test_a_label_at_the_edge_of_the_plan_is_not_cut():
    red, label = (255, 0, 0), "a box of a rather long name"
    box = [[1237.4, -988, 56, 0.1, 0.1, 1]]
    with_label, without = (
        top_view(odd_scene(), [(ShownBoxes.from_rows(box, labels), red)], width=680) for labels in ([label], [""])
    )
    columns = np.nonzero((with_label != without).any(-1))[1]
    assert columns.max() < 679 and np.ptp(columns) > 100, "all of it is there"


def test_colours_of_boxes_are_defined_once():
    """No other module of the viewers, and no page, has a colour of the palette in numbers."""
    root = Path(threedr1.__file__).parent
    files = [path for folder in ("visualization", "engine") for path in (root / folder).rglob("*.py")]
    written = {", ".join(map(str, color)) for color in LAYERS.values()}
    assert len(written) == 5
    for path in [*files, root / "visualization" / "viewer.html"]:
        if path.name in ("palette.py", "contact_sheet.py"):  # the latter's are of bars
            continue
        numbers = set(re.findall(r"\d+, \d+, \d+", path.read_text(encoding="utf-8")))
        assert not numbers & written, path.name
