"""The page of a scene in a frame of another one. A browser looks at it in test_demo_browser.py."""

import html
import json
import re

import numpy as np
import pytest

from threedr1.visualization.palette import LAYERS
from threedr1.visualization.scene_frame import box_layers, framed_scene, inline_frame
from threedr1.visualization.shown_boxes import ShownBoxes

from ..odd_scene import BOX, odd_scene


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', page)
    assert found is not None
    return json.loads(found[1])


def test_the_page_has_no_panel_and_no_boxes_of_its_own():
    scene = odd_scene()
    page = framed_scene(scene)
    data = data_of(page)
    assert data["framed"] is True and data["layers"] == {} and data["questions"] == []
    assert "http" not in re.sub(r"http-equiv", "", page), "the page must need no other server"


def test_boxes_that_are_sent_stand_among_the_points_of_the_page():
    """Both are in the page's frame: the world's, moved by the floor's middle."""
    scene = odd_scene()
    sent = box_layers({"answered": ShownBoxes.from_rows([BOX], ["trunk"])}, scene)
    assert set(sent["layers"]) <= set(LAYERS)
    (row,) = sent["layers"]["answered"]
    assert row["label"] == "trunk"
    middle_3 = np.mean(row["corners"], axis=0) + data_of(framed_scene(scene))["offset"]
    assert middle_3 == pytest.approx(BOX[:3], abs=1e-3)
    assert json.loads(json.dumps(sent)) == sent


def test_a_large_scene_is_thinned():
    data = data_of(framed_scene(odd_scene(), max_points=50))
    assert len(data["points"]["colors"]) == 200  # 150 bytes in base64


def test_the_frame_holds_the_page_and_shuts_it_in():
    frame = inline_frame('<b title="x">&</b>', 'a "scene"', height=100)
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts" title="([^"]*)" style="[^"]*" srcdoc="([^"]*)"></iframe>', frame
    )
    assert found is not None and "height:100px" in frame
    assert html.unescape(found[1]) == 'a "scene"' and html.unescape(found[2]) == '<b title="x">&</b>'
