"""The page of a scene that turns: what it is given is what it shows. A browser looks at it in test_demo_browser.py."""

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from threedr1.datasets.scene import Scene
from threedr1.visualization.scene_canvas import box_list, inline_frame, scene_page

from ..data_factory import room_vertices, scene_of_boxes

BOXES = np.array([[1, 2, 0.5, 1, 1, 1, 0.3], [3, 1, 0.5, 0.5, 0.5, 1, 0]], np.float32)


@pytest.fixture
def scene() -> Scene:
    """A small room."""
    empty = scene_of_boxes("room", np.zeros(0, np.int32), np.zeros((0, 6)), [], np.eye(4))
    points_N3, colors_N3 = room_vertices()[0], np.zeros((len(room_vertices()[0]), 3), np.uint8)
    return replace(empty, points_N3=points_N3.astype(np.float32), colors_N3=colors_N3)


def data_of(page: str) -> dict:
    found = re.search(r"^const DATA = (.*);$", page, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def points_of(data: dict) -> np.ndarray:
    cells_N3 = np.frombuffer(base64.b64decode(data["points"]), "<u2").reshape(-1, 3)
    return np.array(data["low"]) + cells_N3 / 65535 * np.array(data["size"])


def test_boxes_keep_numbers_colours_and_labels():
    found = box_list([([[1, 2, 3, 4, 5, 6]], (9, 8, 7), ["a"]), (BOXES, (1, 2, 3), ["b"])])
    assert found[0] == {"box": [1, 2, 3, 4, 5, 6, 0], "color": [9, 8, 7], "label": "a"}
    assert [each["label"] for each in found] == ["a", "b", ""] and found[1]["box"][6] == 0.3
    assert box_list([([], (1, 2, 3), [])]) == []


def test_points_and_boxes_share_the_world_frame(scene):
    data = data_of(scene_page(scene, [(BOXES, (1, 2, 3), [])], max_points=10**6))
    top = scene.points_N3[:, 2].min() + 0.9 * np.ptp(scene.points_N3[:, 2])
    below_N3 = scene.points_N3[scene.points_N3[:, 2] <= top]
    assert data["count"] == len(below_N3) and np.abs(points_of(data) - below_N3).max() < 1e-3
    assert np.allclose([each["box"] for each in data["boxes"]], BOXES, atol=1e-4)


def test_a_large_scene_is_thinned(scene):
    data = data_of(scene_page(scene, max_points=50))
    assert data["count"] == 50 and len(base64.b64decode(data["colors"])) == 200


def test_a_label_cannot_end_the_script(scene):
    label = "</script><script>alert(1)</script>"
    page = scene_page(scene, [(BOXES, (1, 2, 3), [label])])
    assert page.count("</script>") == 1 and data_of(page)["boxes"][0]["label"] == label


def test_the_frame_holds_the_page_and_shuts_it_in():
    frame = inline_frame('<b title="x">&</b>', 'a "scene"', height=100)
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts" title="([^"]*)" style="[^"]*" srcdoc="([^"]*)"></iframe>', frame
    )
    assert found is not None and "height:100px" in frame
    assert html.unescape(found[1]) == 'a "scene"' and html.unescape(found[2]) == '<b title="x">&</b>'
