"""The demo apart from gradio: what it opens, what it refuses, how a question becomes a sample and an answer."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from threedr1 import main as cli
from threedr1.datasets.prompts import dialogue_question
from threedr1.datasets.scene import TASKS
from threedr1.engine.demo import GRADIO, check_gradio, private_folder
from threedr1.engine.demo_answers import DEMO_TASKS, answers, make_sample, parts_so_far
from threedr1.engine.demo_gate import BODY_BYTES, Gate, asks_file, is_foreign, names_foreign
from threedr1.engine.demo_page import boxes_table, layers_of, notice, summary, views_strip
from threedr1.engine.demo_scenes import (
    UPLOAD_SECONDS,
    DemoScenes,
    Limits,
    Opened,
    Openings,
    Shelf,
    check_header,
    object_names,
    opened_scene,
    read_upload,
    shown_name,
    sweep,
    waiting_bytes,
)
from threedr1.models.observation import Observation
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.text import format_response, parse_response
from threedr1.visualization.palette import LAYERS

from ..data_factory import room_vertices, write_ply


@pytest.fixture(scope="module")
def model(demo_model) -> SceneVLM:
    return SceneVLM.from_pretrained(demo_model)


@pytest.fixture
def scenes(model, rooms_root, tmp_path) -> DemoScenes:
    (tmp_path / "uploads").mkdir()
    return DemoScenes(model, threading.Lock(), tmp_path / "uploads", Limits(new_tokens=12), rooms_root)


@pytest.fixture(scope="module")
def opened(model, rooms_root) -> Opened:
    from threedr1.datasets.scene_store import SceneStore

    store = SceneStore(rooms_root / "prepared")
    return opened_scene(model, store[store.scene_ids[0]], "A <room>")


def arrived(scenes: DemoScenes, name: str = "room.ply", **options) -> Path:
    """A small room as it lies in the folder for uploads."""
    path = scenes.uploads / "abc" / name
    path.parent.mkdir(exist_ok=True)
    write_ply(path, room_vertices()[0], **options)
    return path


# Scenes ----------------------------------------------------------------------------------------------------------


def test_rooms_scenes_and_uploads_are_opened(scenes):
    room = scenes.shelf.get(scenes.room(3))
    again = scenes.shelf.get(scenes.room(3.0))
    assert room.title.startswith("Generated room 3: ") and np.array_equal(room.scene.points_N3, again.scene.points_N3)
    assert not np.array_equal(room.scene.points_N3, scenes.shelf.get(scenes.room(4)).scene.points_N3)
    prepared = scenes.shelf.get(scenes.prepared_scene(scenes.prepared[1]))
    assert prepared.scene.scene_id == scenes.prepared[1]
    path = arrived(scenes)
    upload = scenes.shelf.get(scenes.upload(str(path)))
    assert upload.title == "Upload room.ply" and len(upload.scene.points_N3) == len(room_vertices()[0])
    assert len(upload.names) == len(upload.objects_K7) and upload.observation.encoded is not None


@pytest.mark.parametrize("number", [-1, 1.5, None, 10**9 + 1, float("nan"), float("inf")])
def test_a_room_has_a_number(scenes, number):
    with pytest.raises(ValueError, match="A room has a whole number from 0"):
        scenes.room(number)


@pytest.mark.parametrize("name", [None, "", "../prepared/scene0000_00", "/etc/passwd", "scene9999_00"])
def test_only_a_name_on_offer_is_opened(scenes, name):
    with pytest.raises(ValueError, match="There is no such scene here"):
        scenes.prepared_scene(name)


def test_a_data_root_without_scenes_is_refused(model, tmp_path):
    (tmp_path / "prepared").mkdir()
    with pytest.raises(ValueError, match="There are no prepared scenes in .*main.py prepare"):
        DemoScenes(model, threading.Lock(), tmp_path, data=tmp_path)


def test_an_upload_is_gone_once_it_is_read(scenes):
    path = arrived(scenes)
    read_upload(path, scenes.uploads, scenes.limits)
    path = arrived(scenes)
    path.write_bytes(b"ply\nend_header\n")
    with pytest.raises(ValueError):
        read_upload(path, scenes.uploads, scenes.limits)
    left = [entry for entry in scenes.uploads.parent.rglob("*") if entry.is_file()]
    assert left == [] and not list(scenes.uploads.parent.glob("threedr1-upload-*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "room.ply is not a PLY file"),
        (b"hello", "room.ply is not a PLY file"),
        (b"ply\nformat ascii 1.0\nelement vertex 6000000\nend_header\n", "room.ply has 6,000,000 points; this demo"),
        (b"ply\r\nelement face 99999999\r\nend_header\r\n", "room.ply has 99,999,999 faces"),
        (b"ply\nelement edge 99999999\nend_header\n", "room.ply has 99,999,999 rows of another kind"),
        (b"ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\nend_header\n", "room.ply"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty float x\nend_header\n", "room.ply"),
    ],
)
def test_a_bad_upload_is_refused_in_words_that_tell_no_path(scenes, content, words):
    path = arrived(scenes)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        scenes.upload(path)
    assert str(scenes.uploads.parent) not in str(caught.value) and "/" not in str(caught.value).replace("`", "")


def test_a_large_upload_is_refused(scenes):
    with pytest.raises(ValueError, match=r"room.ply has \d+ MB; this demo takes up to 0 MB"):
        read_upload(arrived(scenes), scenes.uploads, Limits(file_bytes=100))
    with pytest.raises(ValueError, match="points; this demo takes up to 10"):
        read_upload(arrived(scenes), scenes.uploads, Limits(rows=10))
    with pytest.raises(ValueError, match="room.npz is no PLY file"):
        read_upload(arrived(scenes, "room.npz"), scenes.uploads, Limits())


def test_no_file_outside_the_uploads_is_read_or_removed(scenes, tmp_path):
    secret = tmp_path / "secret.ply"
    write_ply(secret, room_vertices()[0])
    link = scenes.uploads / "link.ply"
    link.symlink_to(secret)
    for path in (secret, link, scenes.uploads / ".." / "secret.ply", scenes.uploads, scenes.uploads / "gone.ply"):
        with pytest.raises(ValueError, match="The upload did not arrive whole"):
            scenes.upload(path)
    assert secret.exists()
    with pytest.raises(ValueError, match="There is no file yet"):
        scenes.upload(None)


def test_uploads_that_nobody_opened_go(scenes):
    old, new = arrived(scenes, "old.ply"), arrived(scenes, "new.ply")
    os.utime(old, (time.time() - 1000,) * 2)
    (scenes.uploads / "empty").mkdir()
    os.utime(scenes.uploads / "empty", (time.time() - 1000,) * 2)
    sweep(scenes.uploads, 900)
    assert not old.exists() and new.exists() and not (scenes.uploads / "empty").exists()


def test_a_header_is_read_as_far_as_it_states_rows(tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(b"ply\ncomment element vertex 999\nelement vertex 10\nelement face 9\nend_header\n")
    check_header(path, 10)
    with pytest.raises(ValueError, match="has 10 points"):
        check_header(path, 9)


@given(st.text(max_size=200))
def test_a_shown_name_is_short_plain_and_no_path(name):
    shown = shown_name(name)
    assert 0 < len(shown) <= 60 and not set("/\\\n\r\t\0\x1b") & set(shown)


def test_names_lose_their_folders():
    assert shown_name("../../etc/pass wd.ply") == "pass wd.ply" and shown_name("C:\\x\\a.ply") == "a.ply"
    assert shown_name("a/") == "upload"


def an_opened(name: str) -> Opened:
    return Opened(name, None, np.zeros((0, 7), np.float32), [])  # type: ignore[arg-type]


def test_the_shelf_puts_away_what_was_not_used_for_longest():
    shelf = Shelf(2)
    first, second = shelf.put(an_opened("first")), shelf.put(an_opened("second"))
    assert shelf.get(first).title == "first"
    third = shelf.put(an_opened("third"))
    assert {shelf.get(first).title, shelf.get(third).title} == {"first", "third"}
    with pytest.raises(ValueError, match="Your scene was put away"):
        shelf.get(second)
    shelf.drop(first)
    shelf.drop(None)
    for key in (first, "guess"):
        with pytest.raises(ValueError, match="put away"):
            shelf.get(key)
    with pytest.raises(ValueError, match="There is no scene yet"):
        shelf.get(None)


def test_objects_are_named_as_in_answers():
    assert object_names([2, 0, 18]) == ["<obj0> chair", "<obj1> cabinet", "<obj2>"]


# Questions and answers -------------------------------------------------------------------------------------------


def ask(opened, task, question="Where?", situation="At the door.", number=0, turns=()):
    return make_sample(
        opened, task, question=question, situation=situation, number=number, turns=turns, limits=Limits()
    )


def test_every_task_is_offered():
    assert set(DEMO_TASKS) == set(TASKS)
    assert all(task.examples for task in DEMO_TASKS.values() if task.question)


def test_a_sample_has_what_its_task_needs(opened):
    assert (ask(opened, "qa").question, ask(opened, "qa").situation) == ("Where?", "")
    assert ask(opened, "situated_qa").situation == "At the door."
    caption = ask(opened, "dense_caption", question="", number=1)
    assert caption.query_box_7 is not None and np.allclose(caption.query_box_7, opened.objects_K7[1])
    assert ask(opened, "qa").query_box_7 is None
    assert ask(opened, "scene_description", question="").task == "scene_description"
    said = [("A chair?", "Which?")]
    text = "### human: A chair? ### assistant: Which? ### human: The red one. ### assistant:"
    assert (
        ask(opened, "dialogue", "The red one.", turns=said).question == text == dialogue_question(said, "The red one.")
    )


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("qa", {"question": "  "}, "There is no question"),
        ("situated_qa", {"situation": ""}, "Say where you are"),
        ("qa", {"question": "a" * 1001}, "up to 1000 characters"),
        ("situated_qa", {"situation": "a" * 1001}, "up to 1000 characters"),
        ("object_caption", {"number": None}, "Choose one of the detected objects"),
        ("object_caption", {"number": 10_000}, "Choose one of the detected objects"),
        ("object_caption", {"number": -1}, "Choose one of the detected objects"),
        ("../x", {}, "There is no such task"),
    ],
)
def test_what_a_question_lacks_is_said(opened, task, changes, words):
    with pytest.raises(ValueError, match=words):
        ask(opened, task, **changes)


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("", "", ""),
        ("<thi", "", ""),
        ("<think>Fir", "Fir", ""),
        ("<think>First</thi", "First", ""),
        ("<think>First</think><ans", "First", ""),
        ("<think>First</think><answer>on <obj1", "First", "on <obj1"),
        ("<think>First</think><answer>two</answer>", "First", "two"),
        ("<answer>two", "", "two"),
        ("two chairs", "", "two chairs"),
    ],
)
def test_a_response_is_taken_apart_while_it_is_written(text, think, answer):
    assert parts_so_far(text) == (think, answer)


@given(st.text("ab <>/", max_size=20), st.text("ab <>/", max_size=20))
def test_parts_grow_to_the_whole(think, answer):
    text = format_response(think, answer)
    whole = parse_response(text)
    assert parts_so_far(text) == (whole.think, whole.answer)
    for end in range(len(text)):
        assert whole.think.startswith(parts_so_far(text[:end])[0].rstrip(" <"))


def test_an_answer_comes_in_pieces_and_whole(scenes, opened):
    sample = ask(opened, "qa")
    told = list(answers(scenes.model, scenes.lock, sample, opened, scenes.limits))
    (last,) = [each for each in told if each.done]
    assert told[-1] is last and len(last.views) == 2 and 0 < last.seconds < 60
    direct = scenes.model.ask(opened.scene, "Where?", max_new_tokens=12)
    assert (last.think, last.answer, list(last.boxes)) == (direct.think, direct.answer, direct.boxes)
    assert not scenes.lock.locked()


def test_time_and_leaving_end_an_answer(scenes, opened):
    sample = ask(opened, "qa")
    limits = Limits(new_tokens=5000, seconds=0.001)
    (*_, last) = answers(scenes.model, scenes.lock, sample, opened, limits)
    assert last.done and not last.finished and last.seconds < 20
    stream = answers(scenes.model, scenes.lock, sample, opened, Limits(new_tokens=100_000, seconds=600))
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 20 and not scenes.lock.locked()


def test_several_visitors_get_their_own_answers(scenes, opened):
    other = scenes.shelf.get(scenes.room(5))
    asked = [(opened, "Where is the chair?"), (other, "How many tables?")] * 2
    alone = [list(answers(scenes.model, scenes.lock, ask(o, "qa", q), o, scenes.limits))[-1].answer for o, q in asked]
    found: dict[int, str] = {}

    def visit(number: int) -> None:
        scene, question = asked[number]
        sample = ask(scene, "qa", question)
        found[number] = list(answers(scenes.model, scenes.lock, sample, scene, scenes.limits))[-1].answer

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(len(asked))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    assert [found[number] for number in range(len(asked))] == alone


def test_the_end_waits_for_scenes_that_are_being_opened_and_lets_none_begin():
    openings, inside, leave, told = Openings(), threading.Event(), threading.Event(), []

    def visit() -> None:
        with openings.begin() as may_begin:
            inside.set()
            leave.wait(30)
            told.append(may_begin)

    visitor, ending = threading.Thread(target=visit), threading.Thread(target=openings.end)
    visitor.start()
    assert inside.wait(30)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive() and not told
    with openings.begin() as may_begin:
        assert not may_begin
    leave.set()
    for thread in (visitor, ending):
        thread.join(30)
        assert not thread.is_alive()
    assert told == [True]
    failed = Openings()
    with pytest.raises(RuntimeError), failed.begin():
        raise RuntimeError("a fault in opening")
    failed.end()  # what has failed is not waited for


def test_a_fault_reaches_the_caller(scenes, opened, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shape")

    monkeypatch.setattr("threedr1.engine.demo_answers.roll_out", fail)
    with pytest.raises(RuntimeError, match="shape"):
        list(answers(scenes.model, scenes.lock, ask(opened, "qa"), opened, scenes.limits))
    assert not scenes.lock.locked()


# What the page shows ---------------------------------------------------------------------------------------------


def test_texts_of_others_are_escaped(opened):
    assert "<script>" not in notice("<script>") and "A &lt;room&gt;" in summary(opened)
    table = boxes_table([opened.objects_K7[0].tolist()], opened)
    assert "&lt;obj" in table and "<obj" not in table and f"{opened.objects_K7[0][0]:.2f}" in table


def test_boxes_come_in_the_colours_of_their_meaning(opened):
    box = opened.objects_K7[0].tolist()
    layers = layers_of(opened, [box, [50, 50, 50, 1, 1, 1, 0]], 1, True)
    assert set(layers) <= set(LAYERS) and layers["boxes"].labels == [""] * len(opened.names)
    assert layers["asked"].labels == [opened.names[1]]
    assert np.allclose(layers["asked"].centers_K3[0], opened.objects_K7[1][:3])
    assert layers["answered"].labels[1] == "box 2" and layers["answered"].labels[0].startswith("<obj")
    assert [len(boxes) for boxes in layers_of(opened, [], None, False).values()] == [0, 0, 0]


def test_views_are_pictures_in_the_page(model, opened):
    model.view_pool(opened.observation)
    assert views_strip([0, 1], opened).count('src="data:image/jpeg;base64,') == 2
    assert "no views" in views_strip([], opened)
    assert isinstance(opened.observation, Observation)


# The gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/file%3D%2Fetc%2Fpasswd",
        "/file=C:\\x",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/file=http://example.org",
        "/gradio_api/proxy=http://example.org",
    ],
)
def test_no_file_is_handed_out(path):
    assert asks_file(path)


def test_the_page_itself_is_no_file():
    assert not any(map(asks_file, ("/", "/config", "/gradio_api/queue/join", "/assets/index-abc.js")))


def test_foreign_paths_are_told_from_uploads(tmp_path):
    inside = tmp_path / "uploads"
    (inside / "a").mkdir(parents=True)
    (inside / "out").symlink_to(tmp_path)
    assert not is_foreign(str(inside / "a" / "b.ply"), inside) and not is_foreign("a/b.ply", inside)
    for path in ("/etc/passwd", "../x", str(inside / ".." / "x"), "http://h/x", str(inside / "out" / "x"), "a\0"):
        assert is_foreign(path, inside), path
    assert names_foreign({"data": [1, {"x": [{"path": "/etc/passwd", "meta": {}}]}]}, inside)
    assert not names_foreign({"data": [{"path": str(inside / "a" / "b.ply")}, "/etc/passwd", None]}, inside)


def through_the_gate(uploads: Path, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Status of a request, and the body that the application behind the gate got."""
    got, sent = [b"nothing"], []

    async def application(scope, receive, send):
        got[0] = (await receive())["body"] if method == "POST" else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})

    parts = [body[:5], body[5:]]

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Gate(application, uploads, 1000)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], got[0]


def test_the_gate_passes_what_the_page_sends(tmp_path):
    body = json.dumps({"data": [{"path": str(tmp_path / "a.ply")}]}).encode()
    assert through_the_gate(tmp_path, "GET", "/config") == (200, b"")
    assert through_the_gate(tmp_path, "POST", "/gradio_api/queue/join", body) == (200, body)
    assert through_the_gate(tmp_path, "POST", "/gradio_api/upload", b"x", content_length="900")[0] == 200


def test_uploads_that_nobody_opens_do_not_fill_the_disk(tmp_path):
    def upload():
        return through_the_gate(tmp_path, "POST", "/gradio_api/upload", b"x", content_length="900")[0]

    for number in range(5):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "scan.ply").write_bytes(b"x" * 1000)
    assert waiting_bytes(tmp_path) == 5000 and upload() == 503
    long_ago = time.time() - UPLOAD_SECONDS - 1
    for path in (tmp_path / "0" / "scan.ply", tmp_path / "0"):
        os.utime(path, (long_ago, long_ago))
    assert upload() == 200 and not (tmp_path / "0" / "scan.ply").exists() and waiting_bytes(tmp_path) == 4000


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/gradio_api/file=/etc/passwd", b"", {}, 403),
        ("POST", "/gradio_api/queue/join", b'{"data": [{"path": "/etc/passwd"}]}', {}, 403),
        ("POST", "/gradio_api/queue/join", b'{"data": [{"path": "https://example.org"}]}', {}, 403),
        ("POST", "/gradio_api/run/x", b"not json", {}, 400),
        ("POST", "/gradio_api/run/x", b"[" * 100_000, {}, 400),
        ("POST", "/gradio_api/run/x", b" " * (BODY_BYTES + 1), {}, 413),
        ("POST", "/gradio_api/upload", b"x", {}, 413),
        ("POST", "/gradio_api/upload/", b"x", {"content_length": "100000"}, 413),
        ("POST", "/gradio_api/upload", b"x", {"content_length": "-1"}, 413),
    ],
)
def test_the_gate_refuses(tmp_path, method, path, body, headers, status):
    assert through_the_gate(tmp_path, method, path, body, **headers) == (status, b"nothing")


# Starting --------------------------------------------------------------------------------------------------------


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {GRADIO}"):
        check_gradio()
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("threedr1 demo: The demo needs the package gradio")


def test_the_extra_is_the_tested_version():
    root = Path(cli.__file__).parent
    assert f'"demo": ["{GRADIO}"]' in (root / "setup.py").read_text()
    assert GRADIO not in (root / "requirements.txt").read_text()


def test_the_folder_is_private_and_goes(monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    with private_folder() as uploads:
        assert uploads.parent.stat().st_mode & 0o077 == 0
        assert os.environ["GRADIO_TEMP_DIR"] == str(uploads) and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not uploads.parent.exists() and torch.is_grad_enabled()
