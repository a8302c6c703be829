"""report.html in a real browser: no errors, every picture is decoded, the table and the curves are to be seen."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.scene_store import SceneStore
from threedr1.utils.predictions import Prediction, write_predictions
from threedr1.visualization.report import write_report

from .browser import console, find_browser, open_page

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 1280, 1600
# Appended to a copy of the page: what a reader would see, as JSON in an attribute that --dump-dom prints.
PROBE = """<script>
const problems = [];
window.addEventListener("error", event => problems.push(String(event.message || event.target.src)), true);
window.addEventListener("load", () => {
  const box = element => { const r = element.getBoundingClientRect(); return [r.width, r.height]; };
  const all = name => [...document.querySelectorAll(name)];
  document.body.dataset.seen = JSON.stringify({
    problems,
    images: all("img").map(image => [image.alt, image.complete ? image.naturalWidth : 0, ...box(image)]),
    tables: all("table").map(box),
    cells: all("td").map(cell => cell.innerText),
    curves: all("svg").map(box),
    page: [document.documentElement.scrollWidth, window.innerWidth],
    text: document.body.innerText,
    links: all("[src],[href]").map(e => e.src || e.href).filter(url => !url.startsWith("data:")),
  });
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def report(rooms_root, tmp_path_factory) -> Path:
    """The report of a small run: two models on two tasks, curves of the loops, views, text that needs escaping."""
    run = tmp_path_factory.mktemp("report") / "run"
    store = SceneStore(rooms_root / "prepared")
    scenes = [store[name] for name in store.scene_ids[:2]]
    for label, accuracy in (("most-frequent", 0.0), ("sft", 37.5)):
        folder = run / "eval" / label
        (folder / "views").mkdir(parents=True)
        Image.fromarray(np.full((112, 112, 3), 120, np.uint8)).save(folder / "views" / "one.jpg")
        entries = [
            Prediction(
                f"{task}-{scene.scene_id}",
                task,
                scene.scene_id,
                question="Which <chair> & table?",
                text=f"<think>{'First the long wall, then the window. ' * 12}</think><answer>Here</answer>",
                think="First the long wall, then the window. " * 12,
                answer="Here <script>alert(1)</script>",
                well_formed=True,
                boxes=[scene.boxes_K7[0].tolist()],
                target_boxes=[scene.boxes_K7[1].tolist()],
                references=["there"],
                views=["views/one.jpg"],
            )
            for task in ("grounding", "qa")
            for scene in scenes
        ]
        write_predictions(folder / "predictions.jsonl", entries)
        grounding = {"task": "grounding", "scorer": "scanrefer", "questions": 2, "unit": "percent"}
        grounding |= {"metrics": {"Acc@0.25": accuracy, "Acc@0.5": 0.0}, "intervals": {"Acc@0.25": [10.0, 90.0]}}
        answers = {"task": "qa", "scorer": "scanqa", "questions": 2, "unit": "fraction"}
        answers |= {"metrics": {"EM@1": 0.5, "CIDEr": 0.25}, "intervals": {}}
        results = {"label": label, "results": {"scanrefer": grounding, "scanqa": answers}}
        (folder / "results.json").write_text(json.dumps(results))
    for stage, name in (("sft", "loss"), ("grpo", "reward"), ("grpo", "kl"), ("detect", "loss")):
        (run / stage).mkdir(exist_ok=True)
        with (run / stage / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps({"step": step, name: 1 / (1 + step)}) + "\n" for step in range(30))
    return write_report(run, run / "report.html", data_root=rooms_root)


@pytest.fixture(scope="module")
def seen(browser, report, tmp_path_factory) -> dict:
    """What the probe saw, and what the browser's console said."""
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "probed.html"
    source = report.read_text(encoding="utf-8")
    assert source.count("<style>") == 1
    page.write_text(source.replace("<style>", PROBE + "<style>"), encoding="utf-8")
    done = open_page(browser, page, folder, "--dump-dom", size=(WIDTH, HEIGHT))
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, "the page never loaded"
    return json.loads(html.unescape(found.group(1))) | {"console": console(done)}


def test_nothing_goes_wrong_and_nothing_is_fetched(seen):
    assert seen["problems"] == [] and seen["console"] == []
    assert seen["links"] == [], "the report must need no server"


def test_every_picture_is_decoded_and_has_room(seen):
    scenes = [image for image in seen["images"] if image[0] == "scene with boxes"]
    views = [image for image in seen["images"] if image[0] == "views/one.jpg"]
    assert len(scenes) == len(views) == 4  # two tasks, two examples each
    assert all(natural > 0 and width > 50 and height > 50 for _, natural, width, height in seen["images"])
    assert all(width >= 250 for _, _, width, _ in scenes)


def test_table_curves_and_text_are_to_be_seen(seen):
    (table,) = seen["tables"]
    assert table[0] > 300 and table[1] > 80
    assert any(cell.startswith("37.5") for cell in seen["cells"]) and any(c.startswith("50.0") for c in seen["cells"])
    assert len(seen["curves"]) >= 4 and all(width > 100 and height > 60 for width, height in seen["curves"])
    assert "Which <chair> & table?" in seen["text"] and "Here <script>alert(1)</script>" in seen["text"]
    assert seen["page"][0] <= seen["page"][1], "the page is wider than the window"


def test_the_screenshot_is_not_blank(browser, report, tmp_path):
    """Dark text, white ground and colours of pictures, and ink over the upper half of the page."""
    picture = tmp_path / "report.png"
    open_page(browser, report, tmp_path, f"--screenshot={picture}", size=(WIDTH, HEIGHT))
    pixels_HW3 = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels_HW3.shape == (HEIGHT, WIDTH, 3)
    ink_HW = pixels_HW3.min(axis=-1) < 200
    assert 0.01 < ink_HW.mean() < 0.8
    assert all(rows.any() for rows in np.array_split(ink_HW, 8))
    colorful_HW = np.ptp(pixels_HW3, axis=-1) > 40
    assert colorful_HW.mean() > 0.005, "no colours: where are the pictures?"
