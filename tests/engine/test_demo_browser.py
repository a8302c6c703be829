"""The demo in a real browser, and its server under attack. Needs gradio (`main.py demo` says how) and Chromium.

The model is a small untrained one whose words are scripted; detection, views, boxes and the page are real.
"""

import http.client
import importlib.util
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from threedr1.engine.demo import launch, private_folder, stop
from threedr1.engine.demo_page import BROKEN
from threedr1.engine.demo_scenes import DemoScenes, Limits
from threedr1.models.scene_vlm import SceneVLM
from threedr1.visualization.palette import ANSWERED, ASKED, DETECTED

from ..chromium import Chromium, find_chromium
from ..data_factory import room_vertices, write_ply

pytestmark = pytest.mark.slow

WORDS = "<think>The desk is near the <b>wall</b>.</think><answer>It is <obj1>.</answer>"


class Served(NamedTuple):
    address: str
    port: int
    scenes: DemoScenes


@pytest.fixture(scope="module")
def served(demo_model, rooms_root) -> Iterator[Served]:
    """The demo on a free port."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed; `python main.py demo` says how")
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with private_folder() as uploads:
        model = SceneVLM.from_pretrained(demo_model)
        model.language.decode = lambda token_ids: WORDS  # type: ignore[method-assign]
        limits = Limits(file_bytes=2_000_000, rows=100_000, new_tokens=16, waiting=2)
        scenes = DemoScenes(model, threading.Lock(), uploads, limits, rooms_root)
        page, address = launch(scenes, "127.0.0.1", port)
        yield Served(address, port, scenes)
        stop(page, scenes)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def browser(served, tmp_path) -> Iterator[Chromium]:
    """A browser with the page open."""
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with Chromium(program, tmp_path, width=1400, height=1150) as page:
        page.open(served.address)
        page.wait_for("document.querySelector('#ask')")
        page.wait_for("document.querySelector('#scene').innerText.includes('No scene yet')")
        yield page


def one(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


def status(browser: Chromium, words: str) -> str:
    """The status line, once it holds these words."""
    browser.wait_for(f"{one('#status')}.innerText.includes({json.dumps(words)})")
    return browser.value(f"{one('#status')}.innerText")


def choose_task(browser: Chromium, title: str) -> None:
    browser.click(one("#task input"))
    browser.click(f"[...document.querySelectorAll('[role=option]')].find(o => o.innerText.includes('{title}'))")


def show_tab(browser: Chromium, words: str) -> None:
    """Click a tab until it is shown: while the page is laid out, tabs move."""
    tab = f"[...document.querySelectorAll('button[role=tab]')].find(tab => tab.innerText.includes('{words}'))"
    for _ in range(5):
        browser.click(tab)
        browser.wait_a_little(0.5)
        if browser.value(f"{tab}.ariaSelected") == "true":
            return
    pytest.fail(f"the tab {words} cannot be shown")


def upload(browser: Chromium, path: Path) -> None:
    show_tab(browser, "PLY")
    browser.wait_for(one("#upload input[type=file]"))
    browser.upload("#upload input[type=file]", path)


def ink(browser: Chromium, folder: Path, color: tuple[int, int, int]) -> int:
    """Pixels of a colour in the frame of the scene."""
    browser.value(f"{one('#scene')}.scrollIntoView()")
    browser.wait_a_little(0.5)
    edges = f"{one('#scene iframe')}.getBoundingClientRect().toJSON()"
    x, y, width, height = (browser.value(edges)[name] for name in ("x", "y", "width", "height"))
    pixels_HW3 = np.asarray(Image.open(browser.screenshot(folder / "shot.png")).convert("RGB")).astype(int)
    part_HW3 = pixels_HW3[int(max(y, 0)) : int(y + height), int(x) : int(x + width)]
    return int((np.abs(part_HW3 - np.array(color)).max(-1) < 12).sum())


def errors(browser: Chromium) -> list[str]:
    """What went wrong; gradio itself warns of a method that it lacks."""
    return [problem for problem in browser.problems if "warning: Method not implemented" not in problem]


def test_a_scan_is_uploaded_asked_about_and_answered(browser, served, tmp_path):
    browser.click(one("#ask"))
    assert "There is no scene yet" in status(browser, "upload a PLY")
    scan = tmp_path / "my room.ply"
    write_ply(scan, room_vertices()[0])
    upload(browser, scan)
    status(browser, "Ready: ask a question.")
    assert "Upload my room.ply" in browser.value(f"{one('#summary')}.innerText")
    assert not list(served.scenes.uploads.rglob("*.ply")), "the upload is still on disk"
    assert ink(browser, tmp_path, ANSWERED) == 0
    browser.click("[...document.querySelectorAll('#examples button')].find(b => b.innerText.includes('Where can'))")
    browser.wait_for(f"{one('#question textarea')}.value === 'Where can I sit?'")
    browser.click(one("#ask"))
    status(browser, "after")
    assert browser.value(f"{one('#answer textarea')}.value") == "It is <obj1>."
    assert browser.value(f"{one('#think textarea')}.value") == "The desk is near the <b>wall</b>."
    rows = browser.value("[...document.querySelectorAll('#answer-boxes tr')].map(row => row.innerText)")
    assert len(rows) == 2 and rows[1].startswith("<obj1>")
    pictures = "[...document.querySelectorAll('#views img')].map(image => image.naturalWidth)"
    assert browser.value(pictures) == [56, 56]
    assert ink(browser, tmp_path, ANSWERED) > 50 and ink(browser, tmp_path, DETECTED) == 0
    browser.click(one("#detected input"))
    browser.wait_a_little(1)
    assert ink(browser, tmp_path, DETECTED) > 50 and ink(browser, tmp_path, ANSWERED) > 50
    assert errors(browser) == []
    outside = [url for url in browser.requests if not url.startswith((served.address, "data:", "blob:", "about:"))]
    assert outside == [], "the page must need no other server"


def test_a_room_a_scene_and_other_tasks(browser, served, tmp_path):
    browser.click(one("#open-room"))
    status(browser, "Ready")
    assert "Generated room 7" in browser.value(f"{one('#summary')}.innerText")
    choose_task(browser, "Object captioning")
    browser.wait_for(f"!{one('#question textarea')} && {one('#object input')}")
    browser.click(one("#ask"))
    status(browser, "after")
    assert ink(browser, tmp_path, ASKED) > 50
    show_tab(browser, "Prepared scene")
    browser.click(one("#open-prepared"))
    browser.wait_for(f"{one('#summary')}.innerText.includes('Scene {served.scenes.prepared[0]}')")
    choose_task(browser, "Situated")
    browser.wait_for(f"{one('#situation textarea')} && {one('#question textarea')}")
    browser.type(one("#question textarea"), "What is on my left?")
    browser.click(one("#ask"))
    assert "Say where you are" in status(browser, "Say where")
    browser.type(one("#situation textarea"), "I stand at the door.")
    browser.click(one("#ask"))
    status(browser, "after")
    assert errors(browser) == []


def test_an_answer_is_stopped_and_another_asked_for(browser, served):
    browser.click(one("#open-room"))
    status(browser, "Ready")
    browser.type(one("#question textarea"), "Where is the table?")
    with served.scenes.lock:  # somebody else is being answered
        browser.click(one("#ask"))
        status(browser, "Looking at the scene")
        browser.click(one("#stop"))
        status(browser, "Stopped.")
    browser.wait_a_little(1)
    assert browser.value(f"{one('#answer textarea')}.value") == ""
    browser.click(one("#ask"))
    status(browser, "after")
    assert browser.value(f"{one('#answer textarea')}.value") == "It is <obj1>." and errors(browser) == []


def test_faults_are_told_in_one_sentence(browser, tmp_path, monkeypatch):
    bad = tmp_path / "bad.ply"
    bad.write_text("no cloud")
    upload(browser, bad)
    assert "bad.ply is not a PLY file" in status(browser, "bad.ply")
    show_tab(browser, "Generated room")
    browser.click(one("#open-room"))
    status(browser, "Ready")

    def fail(*_, **__):
        raise RuntimeError("a detail of the server")

    monkeypatch.setattr("threedr1.engine.demo_page.answers", fail)
    browser.type(one("#question textarea"), "Why?")
    browser.click(one("#ask"))
    browser.wait_for(f"document.body.innerText.includes({json.dumps(BROKEN)})")
    text = browser.value("document.body.innerText")
    assert "a detail of the server" not in text and "Traceback" not in text
    assert errors(browser) == []


def test_a_port_that_is_taken_is_named(served):
    with pytest.raises(ValueError, match=f"Port {served.port} of 127.0.0.1 cannot be had"):
        launch(served.scenes, "127.0.0.1", served.port)


# The server ------------------------------------------------------------------------------------------------------


def request(port: int, method: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes]:
    """Status and body of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={secret}",
        "/gradio_api/file=..%2f..%2f..%2f..%2f{secret}",
        "/gradio_api/file%3D{secret}",
        "/gradio_api/file/{secret}",
        "/file={secret}",
        "/static/../../../../../../../..{secret}",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}",
        "/svelte/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}",
        "/gradio_api/file=http://127.0.0.1:{port}/config",
        "/gradio_api/proxy=http://127.0.0.1:{port}/config",
        "/monitoring",
        "/docs",
    ],
)
def test_no_file_of_the_server_is_read(served, tmp_path, path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    code, body = request(served.port, "GET", path.format(secret=secret, port=served.port))
    assert code in (403, 404) and b"the secret" not in body


def test_an_upload_lands_under_a_safe_name_and_is_not_handed_out(served):
    form = b'--B\r\nContent-Disposition: form-data; name="files"; filename="../../../evil.ply"\r\n\r\nply\r\n--B--\r\n'
    code, body = request(served.port, "POST", "/gradio_api/upload", form, "multipart/form-data; boundary=B")
    (name,) = json.loads(body)
    assert code == 200 and Path(name).resolve().is_relative_to(served.scenes.uploads.resolve())
    assert request(served.port, "GET", f"/gradio_api/file={name}")[0] == 403
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", "3000000")
    connection.endheaders(form)
    assert connection.getresponse().status == 413  # before the rest has come
    connection.close()


def join(served: Served, target: str, data: list, visitor: str) -> tuple[int, bytes]:
    """Join the queue for the event of a button."""
    config = json.loads(request(served.port, "GET", "/config")[1])
    ids = [part["id"] for part in config["components"] if part["props"].get("elem_id") == target]
    event = next(each for each in config["dependencies"] if each["targets"] and each["targets"][0][0] == ids[0])
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": visitor})
    return request(served.port, "POST", "/gradio_api/queue/join", body.encode(), "application/json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "http://127.0.0.1:1/x"])
def test_no_foreign_file_is_opened_through_the_queue(served, path):
    data = [{"path": path, "orig_name": "x.ply", "meta": {"_type": "gradio.FileData"}}, None]
    assert join(served, "upload", data, "thief")[0] == 403


def test_a_full_queue_turns_visitors_away(served):
    with served.scenes.lock:  # nobody is served meanwhile
        told = [join(served, "open-room", [number, None], f"visitor {number}") for number in range(12)]
    assert told[0][0] == 200 and told[-1][0] == 503 and b"Queue is full" in told[-1][1]
