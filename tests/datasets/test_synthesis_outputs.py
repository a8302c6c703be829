"""What a run leaves beside its records: datasheet, pictures, captions, and the page of samples."""

import base64
import json
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis import FilterOptions, InputOptions, sheet_folder, synthesize, synthesize_with
from threedr1.datasets.synthesis.datasheet import Counts, count_files, funnel, scalars, table, write_datasheet
from threedr1.datasets.synthesis.description import load_captions
from threedr1.datasets.synthesis.gemini_teacher import GeminiTeacher
from threedr1.datasets.synthesis.histograms import bars, bin_width, binned, histogram, quantile
from threedr1.datasets.synthesis.openai_teacher import OpenAITeacher
from threedr1.datasets.tasks import load_samples
from threedr1.main import main
from threedr1.utils.text import parse_response
from threedr1.visualization.samples_page import draw_sample, marked, one_of_each_reason, write_samples

from .. import data_factory as factory

TRAIN = "scene0000_00"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.fixture(scope="module")
def out(root, tmp_path_factory):
    """A run of the rule teacher."""
    out = tmp_path_factory.mktemp("run") / "Scene-30K.jsonl"
    synthesize(root, out)
    return out


# ---- the datasheet


def test_a_run_leaves_a_datasheet_with_its_counts_filters_and_pictures(out):
    folder, report = sheet_folder(out), json.loads(out.with_name(out.name + ".report.json").read_text())
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# {out.name}\n\n{report['kept']} records about 1 scenes, written by `rules-")
    for reason, count in report["rejected"].items():
        assert re.search(rf"^\| `{reason}` \| .* \| {count} \| \d+ \|$", text, re.MULTILINE), reason
    assert re.search(rf"^\| `near_duplicate` .* \| 0 \| {report['kept']} \|$", text, re.MULTILINE)
    assert "rapidfuzz" in text and "terms" in text and str(out.parent) not in text
    shown = re.findall(r"!\[\w+\]\((\w+\.png)\)", text)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.png")) and len(shown) == 5
    for name in shown:
        assert Image.open(folder / name).size[0] == 720


def test_the_records_read_back_and_so_do_the_captions(root, out, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "Scene-30K.jsonl").write_bytes(out.read_bytes())
    captions = (sheet_folder(out) / "scene_caption.json").read_bytes()
    (tmp_path / "annotations" / "scene_caption.json").write_bytes(captions)
    for path in root.glob("scannetv2*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store = SceneStore(root / "prepared")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"scene_id", "question", "cot"} <= set(rows[0])
    samples = load_samples(tmp_path, "train", ["scene30k", "scene30k_captions"], scenes=store)
    assert [sample.dataset for sample in samples] == ["scene30k"] * len(rows) + ["scene30k_captions"]
    for row, sample in zip(rows, samples, strict=False):
        response = parse_response(row["cot"])
        assert (sample.question, sample.think, sample.answer) == (row["question"], response.think, response.answer)
    assert load_captions(tmp_path) == {TRAIN: "A room with a chair and a table."} == {TRAIN: samples[-1].answer}


def test_a_run_that_keeps_nothing_says_so(root, tmp_path):
    out = tmp_path / "none.jsonl"
    assert synthesize(root, out, options=FilterOptions(min_think_words=1000))["kept"] == 0
    text = (sheet_folder(out) / "README.md").read_text()
    assert "0 records about 0 scenes" in text and "think_words.png" not in text and "reasons.png" in text
    assert json.loads((sheet_folder(out) / "scene_caption.json").read_text()) == {}
    page = write_samples(out, tmp_path / "samples.html", data_root=root).read_text()
    assert "No record was kept." in page and "think_short" in page


def test_the_funnel_gives_what_each_filter_leaves_in_order():
    reasons = Counter(cannot_tell=4, gold_box=2, gold_answer=1, near_duplicate=3, truncated=1)
    rows = funnel(Counts(kept=10, reasons=reasons), {"min_think_words": 30, "skipped": ["few_steps"]})
    named = [(row[0], row[2], row[3], row[4]) for row in rows]
    assert named[:3] == [("`cannot_tell`", "", 4, 17), ("`truncated`", "", 1, 16), ("`format`", "", 0, 16)]
    assert ("`think_short`", "30", 0, 16) in named and ("`few_steps`", "skipped", 0, 16) in named
    assert ("`gold_answer`, `gold_box`", "", 3, 13) in named and named[-1] == ("`near_duplicate`", "", 3, 10)


def test_counting_is_by_source_task_scene_and_length(tmp_path):
    cot = "<think>First, a b. Next, c. Last, d <box>1, 2, 3, 4, 5, 6</box>.</think><answer>It is red.</answer>"
    row = {"scene_id": "s", "question": "?", "cot": cot, "task": "qa", "source": "scanqa"}
    kept, rejects = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    kept.write_text("".join(json.dumps({**row, "scene_id": scene}) + "\n" for scene in "sst"))
    rejects.write_text(json.dumps({"reason": "format"}) + "\n")
    counts = count_files(kept, rejects)
    assert (counts.kept, counts.scenes, counts.reasons) == (3, {"s": 2, "t": 1}, {"format": 1})
    assert counts.by == {"source": {"scanqa": 3}, "task": {"qa": 3}}
    assert (counts.think_words, counts.answer_words, counts.steps) == ({7: 3}, {3: 3}, {3: 3})
    kept.write_text("{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: not JSON"):
        count_files(kept, rejects)
    with pytest.raises(ValueError, match="run `synthesize` first"):
        write_datasheet(tmp_path / "a.jsonl", {}, {})


def test_tables_and_nested_reports():
    assert table(("a", "b"), [("x|y", 1)]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"
    assert scalars({"a": 1, "b": {"c": "d", "e": []}, "f": None}) == [("a", 1), ("b.c", "d"), ("b.e", "–")]


# ---- the pictures


@given(st.dictionaries(st.integers(0, 3000), st.integers(1, 9), min_size=1, max_size=30))
def test_bins_hold_every_value_once(counts):
    start, width, heights = binned(counts)
    assert len(heights) <= 40 and sum(heights) == sum(counts.values())
    for index, height in enumerate(heights):
        low = start + index * width
        assert height == sum(count for value, count in counts.items() if low <= value < low + width)
    values = sorted(value for value, count in counts.items() for _ in range(count))
    for share in (0.05, 0.5, 0.95):
        below = next(value for value in values if sum(one <= value for one in values) >= share * len(values) - 1e-9)
        assert quantile(counts, share) == below


def test_bins_are_of_round_widths():
    assert [bin_width(0, high) for high in (0, 39, 40, 100, 2000)] == [1, 1, 2, 5, 100]


def test_the_highest_bar_is_the_commonest_length():
    blue = (np.asarray(histogram({10: 1, 11: 4, 13: 2}, "Lengths", "words")) == (37, 99, 235)).all(-1)
    columns = blue.sum(0)  # four bins of 168 pixels, bars of 60 at most
    heights = [int(columns[24 + 168 * index : 24 + 168 * (index + 1)].max()) for index in range(4)]
    assert heights[1] > heights[3] > heights[0] > heights[2] == 0
    assert heights[1] == pytest.approx(2 * heights[3], abs=2)
    rows = (np.asarray(bars([("kept", 10), ("gone", 5), ("none", 0)], "Rows")) == (37, 99, 235)).all(-1).sum(1)
    assert rows.max() == pytest.approx(2 * rows[56 + 28 : 56 + 56].max(), abs=2) and rows[56 + 56 :].max() == 0
    for draw in (lambda: histogram({}, "Lengths", "words"), lambda: bars([], "Lengths")):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()


# ---- the page


def test_the_page_shows_records_with_pictures_inside_and_one_reject_a_reason(root, out, tmp_path):
    page = write_samples(out, tmp_path / "samples.html", data_root=root, count=50).read_text()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert page.count("class='example'") == len(rows) and f"{len(rows)} of {len(rows)} records" in page
    assert page.count("alt='view") == 2 * len(rows)  # two posed frames a scene
    assert not re.search(r"(?:src|href)=['\"](?!data:image/jpeg;base64,)", page)
    rejects = [json.loads(line) for line in out.with_name(out.name + ".rejects.jsonl").read_text().splitlines()]
    assert page.count("<tr><td><code>") == len({row["reason"] for row in rejects}) > 0
    seen: list[tuple[str, str]] = []

    def views_of(scene_id: str, question: str) -> list[bytes]:
        seen.append((scene_id, question))
        return [Path(SceneStore(root / "prepared")[scene_id].frames[0].color_path).read_bytes()]

    shown = write_samples(out, tmp_path / "samples.html", data_root=root, views_of=views_of).read_text()
    assert shown.count("alt='view") == len(rows) and seen == [(row["scene_id"], row["question"]) for row in rows]
    with pytest.raises(ValueError, match="run `synthesize` first"):
        write_samples(tmp_path / "none.jsonl", tmp_path / "x.html", data_root=root)


def test_markup_in_texts_stays_text():
    assert marked("<b> & <box>1, 2</box>") == "&lt;b&gt; &amp; <span class='box'>[1, 2]</span>"


def test_samples_are_drawn_evenly_and_in_order():
    rows = [{"n": number} for number in range(6)]
    drawn = Counter(tuple(row["n"] for row in draw_sample(iter(rows), 2, random.Random(seed))) for seed in range(3000))
    assert set(drawn) == {(a, b) for b in range(6) for a in range(b)}  # 15 pairs, 200 each: sd below 14
    assert min(drawn.values()) > 140 and max(drawn.values()) < 260
    assert draw_sample(iter(rows), 9, random.Random(0)) == rows
    refused = [{"reason": "a", "n": 0}, {"reason": "b", "n": 1}, {"reason": "a", "n": 2}]
    seen = {one_of_each_reason(refused, random.Random(seed))[0][0]["n"] for seed in range(50)}
    assert seen == {0, 2} and [count for _, count in one_of_each_reason(refused, random.Random(0))] == [2, 1]


def test_the_command_takes_sources_descriptions_filters_and_views(root, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["synthesize", "--root", str(root), "--out", str(out)]
    asked = ["--sources", "scanqa", "--description", "none", "--views", "1", "--skip-filter", "gold", "--samples", "1"]
    assert main([*command, *asked]) == 0
    page = sheet_folder(out) / "samples.html"
    assert f"wrote {page}" in capsys.readouterr().out and page.is_file()
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["settings"]["filters"]["skipped"] == ["gold"] and report["questions"] == 1
    assert main([*command, "--skip-filter", "all"]) == 1
    assert "no filter 'all'" in capsys.readouterr().err


# ---- pictures over the wire


class Recorder(ThreadingHTTPServer):
    """Answers every request with the same text, in the protocol of the path, and keeps what it was sent."""

    def __init__(self, text: str):
        self.bodies: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                part = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP"}
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                body = json.dumps({"candidates": [part], "choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize("kind", ["gemini", "openai"])
def test_views_reach_the_teacher_in_order_and_before_the_prompt(kind, root, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    pictures = [Path(frame.color_path).read_bytes() for frame in SceneStore(root / "prepared")[TRAIN].frames]
    with Recorder("no thought") as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        if kind == "gemini":
            pytest.importorskip("google.genai")
            teacher = GeminiTeacher("m", base_url=url)
        else:
            teacher = OpenAITeacher("m", base_url=f"{url}/v1")
        inputs = InputOptions(sources=("scanqa",), views_of=lambda *_: pictures)
        report = synthesize_with(teacher, root, tmp_path / "o.jsonl", inputs=inputs)
        server.shutdown()
    assert report["rejected"] == {"format": 1}
    (body,) = server.bodies
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    if kind == "gemini":
        *shown, prompt = body["contents"][0]["parts"]
        sent = [one["inlineData"] for one in shown]
        # the spelling of the type, and of the letters 62 and 63, differs by release
        types = [one.get("mimeType", one.get("mime_type")) for one in sent]
        assert types == ["image/jpeg"] * 2
        assert [one["data"].replace("-", "+").replace("_", "/") for one in sent] == encoded
    else:
        *shown, prompt = body["messages"][0]["content"]
        assert [one["image_url"]["url"] for one in shown] == [f"data:image/jpeg;base64,{data}" for data in encoded]
    assert prompt["text"].startswith("The 2 pictures show the scene from different places. A room with a chair")
