"""The page of a scene in a real browser: no errors, points and boxes are drawn where they belong, clicks work."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threedr1.utils.camera import Camera, look_at, pinhole
from threedr1.utils.predictions import Prediction, write_predictions
from threedr1.utils.view_cameras import write_camera
from threedr1.visualization.scene_page import write_scene_page
from threedr1.visualization.shown_boxes import ShownBoxes
from threedr1.visualization.shown_scene import load_shown

from ..odd_scene import BOX, odd_scene
from .browser import console, find_browser, open_page

pytestmark = pytest.mark.slow

SIZE = (1200, 800)
# Appended to a copy of the page: what it does, step by step, as JSON in an attribute that --dump-dom prints.
PROBE = """<script>
const problems = [];
window.addEventListener("error", event => problems.push(String(event.message || event.target.src)), true);
document.addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
window.addEventListener("load", () => setTimeout(() => {
  const canvas = document.getElementById("canvas"), gl = canvas.getContext("webgl");
  const pixels = () => {
    const read = new Uint8Array(canvas.width * canvas.height * 4);
    gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, read);
    return read;
  };
  const count = wanted => {
    const read = pixels(), found = { number: 0, left: 1e9, right: -1, top: 1e9, bottom: -1 };
    for (let i = 0; i < read.length; i += 4) if (wanted(read[i], read[i + 1], read[i + 2])) {
      const x = i / 4 % canvas.width, y = canvas.height - 1 - Math.floor(i / 4 / canvas.width);
      found.number += 1;
      found.left = Math.min(found.left, x); found.right = Math.max(found.right, x);
      found.top = Math.min(found.top, y); found.bottom = Math.max(found.bottom, y);
    }
    return found;
  };
  const magenta = (r, g, b) => r > 245 && g < 10 && b > 245, red = (r, g, b) => r > 200 && g < 60 && b < 60;
  const green = (r, g, b) => r < 40 && g > 150 && b < 90, grey = (r, g, b) => r === 170 && g === 170 && b === 170;
  const yellow = (r, g, b) => r > 200 && g > 200 && b < 60;
  const labels = () => [...document.querySelectorAll("#labels span")].map(label => label.textContent);
  const place = () => { const c = window.viewer.camera; return [c.yaw, c.pitch, c.distance, ...c.target]; };
  const steps = {};
  const step = name => {
    const detail = document.querySelector(".detail");
    steps[name] = { magenta: count(magenta), red: count(red), green: count(green), grey: count(grey).number,
      yellow: count(yellow).number, labels: labels(), detail: detail && detail.innerText, place: place(),
      pictures: detail ? [...detail.querySelectorAll("img")].map(image => [image.alt, image.naturalWidth]) : [],
      note: document.getElementById("place").textContent };
  };
  step("start");
  const corners = window.viewer.boxesOf("objects")[0].corners.map(window.viewer.project);
  steps.hull = { left: Math.min(...corners.map(c => c[0])), right: Math.max(...corners.map(c => c[0])),
    top: Math.min(...corners.map(c => c[1])), bottom: Math.max(...corners.map(c => c[1])) };
  const points = document.getElementById("points"), objects = document.getElementById("layer-objects");
  points.value = 20; points.dispatchEvent(new Event("input")); objects.click();
  steps.drawn = count((r, g, b) => r === 148 && g === 163 && b === 184);
  objects.click(); points.value = 100; points.dispatchEvent(new Event("input"));
  const questions = document.querySelectorAll(".question");
  questions[0].click();
  setTimeout(() => {
    step("first");
    document.getElementById("layer-true").click();
    step("without true");
    document.getElementById("layer-true").click();
    questions[1].click();
    step("second");
    questions[1].click();
    step("closed");
    questions[0].click();
    const mouse = (kind, x, y, more) => canvas.dispatchEvent(new PointerEvent(kind,
      { clientX: x, clientY: y, pointerId: 1, bubbles: true, ...more }));
    const drag = more => { mouse("pointerdown", 300, 300, more); mouse("pointermove", 340, 320, more);
      mouse("pointerup", 340, 320, more); };
    drag({ buttons: 1 }); step("turned");
    drag({ buttons: 2 }); step("moved");
    canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -100, cancelable: true })); step("nearer");
    document.getElementById("reset").click(); step("reset");
    document.getElementById("above").click(); step("above");
    document.getElementById("reset").click();
    const ceiling = document.getElementById("ceiling");
    ceiling.value = 5; ceiling.dispatchEvent(new Event("input")); step("cut");
    ceiling.value = 100; ceiling.dispatchEvent(new Event("input"));
    const at = window.viewer.project(window.viewer.boxesOf("answered")[0].corners[6]);
    canvas.dispatchEvent(new MouseEvent("dblclick", { clientX: at[0], clientY: at[1] })); step("centred");
    document.querySelector(".detail .views button").click(); step("looked");
    const c = window.viewer.camera;
    const back = [Math.cos(c.pitch) * Math.cos(c.yaw), Math.cos(c.pitch) * Math.sin(c.yaw), Math.sin(c.pitch)];
    steps.looked.eye = back.map((value, i) => c.target[i] + c.distance * value + window.viewer.data.offset[i]);
    document.getElementById("play").click(); step("playing");
    setTimeout(() => {
      step("played");
      const links = [...document.querySelectorAll("[src],[href]")].map(e => e.src || e.href);
      document.body.dataset.seen = JSON.stringify({ problems, steps, error: gl.getError(),
        links: links.filter(url => !url.startsWith("data:")),
        page: [document.documentElement.scrollWidth, window.innerWidth] });
    }, 1400);
  }, 600);
}, 300));
</script>"""
EYE = [1232.0, -989.0, 56.5]


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A scene with an odd origin; one question with two boxes and a yellow view, and one with other boxes and none."""
    folder = tmp_path_factory.mktemp("page")
    picture = folder / "views" / "odd" / "frame-0.jpg"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((48, 64, 3), (255, 255, 0), np.uint8)).save(picture, quality=95)
    write_camera(picture, Camera(look_at(np.array(EYE), np.array(BOX[:3])), pinhole(64, 48, 60), 64, 48))
    other = [1232.5, -987.5, 55.5, 0.5, 0.5, 0.5, 0.0]
    rows = [
        Prediction(
            "odd-0",
            "grounding",
            "odd",
            question="Where is the <trunk> & chest?",
            text="<think>I look.</think><answer>There</answer>",
            think="I look at the <wall> first.",
            answer="It stands there <script>alert(1)</script>",
            well_formed=True,
            boxes=[BOX, other],
            target_boxes=[[1232.5, -988.7, 55.6, 1, 1, 1, 0.3]],
            references=["there"],
            views=["views/odd/frame-0.jpg"],
        ),
        Prediction("odd-1", "qa", "odd", question="How many?", text="One.", answer="One."),
    ]
    write_predictions(folder / "predictions.jsonl", rows)
    (shown,) = load_shown(folder, data_root="nowhere", scene=odd_scene())
    shown.boxes = ShownBoxes.from_rows([])
    return write_scene_page(shown, folder / "room.html")


@pytest.fixture(scope="module")
def seen(browser, page, tmp_path_factory) -> dict:
    """What the probe saw, and what the browser's console said."""
    folder = tmp_path_factory.mktemp("browser")
    probed = folder / "probed.html"
    source = page.read_text(encoding="utf-8")
    assert source.count("<style>") == 1
    probed.write_text(source.replace("<style>", PROBE + "<style>"), encoding="utf-8")
    done = open_page(browser, probed, folder, "--dump-dom", size=SIZE)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the page never loaded: {console(done)}"
    return json.loads(html.unescape(found.group(1))) | {"console": console(done)}


def test_nothing_goes_wrong_and_nothing_is_fetched(seen):
    assert seen["problems"] == [] and seen["console"] == [] and seen["error"] == 0
    assert seen["links"] == [] and seen["page"][0] <= seen["page"][1]


def test_the_points_are_drawn(seen):
    start = seen["steps"]["start"]
    assert start["grey"] > 20_000 and start["magenta"]["number"] > 2000
    assert start["red"]["number"] == start["green"]["number"] == 0 and start["labels"] == [], "no question is chosen"


def test_the_box_is_drawn_where_its_points_are(seen):
    """The object's pixels fill the hull of the projected box, up to half the width of a point."""
    hull, magenta, drawn = seen["steps"]["hull"], seen["steps"]["start"]["magenta"], seen["steps"]["drawn"]
    for side in ("left", "right", "top", "bottom"):
        assert abs(hull[side] - magenta[side]) < 9, (side, hull, magenta)
        assert abs(hull[side] - drawn[side]) < 4, (side, hull, drawn)


def test_a_click_on_a_question_shows_its_answer_boxes_and_views(seen):
    first, second, closed = (seen["steps"][name] for name in ("first", "second", "closed"))
    assert "I look at the <wall> first." in first["detail"]
    assert "It stands there <script>alert(1)</script>" in first["detail"] and "reference: there" in first["detail"]
    assert first["red"]["number"] > 300 and first["green"]["number"] > 150
    assert [label.split(" IoU")[0] for label in first["labels"]] == ["answer 1", "answer 2", "true"]
    assert first["pictures"] == [["frame-0", 64]] and first["yellow"] > 30, (
        "the view's picture stands in the scene too"
    )
    assert "One." in second["detail"] and second["red"]["number"] == 0 and second["pictures"] == []
    assert closed["detail"] is None and closed["labels"] == []


def test_layers_can_be_hidden(seen):
    hidden = seen["steps"]["without true"]
    assert hidden["green"]["number"] == 0 and hidden["red"]["number"] > 300 and "true" not in hidden["labels"]


def test_turning_moving_and_zooming(seen):
    steps = seen["steps"]
    names = ("first", "turned", "moved", "nearer", "reset", "above")
    first, turned, moved, nearer, reset, above = (np.array(steps[name]["place"]) for name in names)
    assert turned[0] < first[0] and turned[1] > first[1] and (turned[2:] == first[2:]).all()
    assert (moved[:3] == turned[:3]).all() and np.linalg.norm(moved[3:] - turned[3:]) > 0.05
    assert nearer[2] < moved[2] and (nearer[3:] == moved[3:]).all()
    assert (reset == first).all() and above[1] > 1.5
    assert steps["cut"]["grey"] < 0.8 * steps["reset"]["grey"], "walls above the cut are gone"


def test_a_double_click_says_where_in_the_world_it_was(seen):
    note = seen["steps"]["centred"]["note"]
    numbers = [float(text) for text in note.removesuffix(" m").split(", ")]
    cos, sin = np.cos(0.6), np.sin(0.6)  # corner 6: +x, +y, +z in the box's own frame
    corner = [BOX[0] + 0.8 * cos - 0.35 * sin, BOX[1] + 0.8 * sin + 0.35 * cos, BOX[2] + 0.45]
    np.testing.assert_allclose(numbers, corner, atol=0.12)


def test_a_click_on_a_view_looks_from_its_camera(seen):
    np.testing.assert_allclose(seen["steps"]["looked"]["eye"], EYE, atol=2e-3)


def test_boxes_appear_one_after_the_other(seen):
    playing, played = seen["steps"]["playing"]["labels"], seen["steps"]["played"]["labels"]
    assert not [label for label in playing if label.startswith("answer")]
    assert len([label for label in played if label.startswith("answer")]) == 2


def test_the_screenshot_shows_the_room_and_the_chosen_question(browser, page, tmp_path):
    picture = tmp_path / "room.png"
    done = open_page(browser, page, tmp_path, f"--screenshot={picture}", size=SIZE, fragment="#question=1")
    assert console(done) == []
    pixels_HW3 = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels_HW3.shape == (SIZE[1], SIZE[0], 3)
    scene_HW3 = pixels_HW3[:, :790]
    assert ((scene_HW3 == (255, 0, 255)).all(-1)).sum() > 1000
    assert (pixels_HW3[:, 810:].min(-1) < 150).sum() > 500, "text stands in the panel"
