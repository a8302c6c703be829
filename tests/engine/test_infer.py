"""Asking about one scan: streams, dialogues, tasks by their friendly names, every object, and what is left behind."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threedr1 import main as cli
from threedr1.datasets.prompts import TASK_NAMES, dialogue_question, task_named
from threedr1.datasets.scene import TASKS
from threedr1.engine.answers import save_answers
from threedr1.engine.chat import Printer, chat
from threedr1.engine.predict import detected_objects, infer, open_session
from threedr1.engine.questions import Request
from threedr1.models.model_files import local_folder
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.predictions import read_predictions
from threedr1.visualization.palette import ANSWERED, ASKED

from ..data_factory import room_vertices, write_ply
from .test_object_token import build, folder, model, scan, scene  # noqa: F401 - fixtures

SAID = "<think>The café has a 🪑.</think><answer>椅子 <obj0></answer>"


@pytest.fixture
def session(folder, scan):  # noqa: F811
    return open_session(scan, folder, device="cpu", max_new_tokens=8)


@pytest.fixture
def scripted(session, monkeypatch):
    """A session whose model says SAID, token by token, whatever it is asked; the prompts that it was given."""
    language = session.model.language
    ids = [*language.tokenizer(SAID).input_ids, language.eos_ids[0]]
    prompts = []

    def decode(inputs, lengths, *, on_token=None, **options):
        from threedr1.models.decoding import Decoded

        for token in ids if on_token else []:
            on_token(0, token)
        return Decoded([ids] * len(lengths), [[0.0] * len(ids)] * len(lengths), [True] * len(lengths))

    write_row = session.model.write_row

    def written(sample, *more):
        prompts.append(sample)
        return write_row(sample, *more)

    monkeypatch.setattr(session.model, "decoder", decode)
    monkeypatch.setattr(session.model, "write_row", written)
    session.prompts = prompts
    return session


# streams ---------------------------------------------------------------------------------------------------------


def test_ask_streams_what_it_returns(model, scene):  # noqa: F811
    pieces = []
    answer = model.ask(scene, "Where?", max_new_tokens=12, on_text=pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer.text
    assert model.ask(scene, "Where?", max_new_tokens=12) == answer
    observation = model.observe(scene)
    assert model.ask(observation, "Where?", max_new_tokens=12) == answer


def test_a_streamed_answer_is_that_of_a_batch(session):
    samples = session.samples(Request(["Where is the chair?", "How many tables are there?"]))
    together = [prediction for prediction, _ in session.answers(samples)]
    pieces = []
    alone = [prediction for prediction, _ in session.answers(samples, pieces.append)]
    assert [entry.text for entry in alone] == [entry.text for entry in together]
    assert "".join(pieces) == "".join(entry.text for entry in alone)


def test_characters_of_several_tokens_are_printed_whole(scripted):
    shown = []
    printer = Printer(shown.append)
    ((prediction, _),) = scripted.answers(scripted.samples(Request(["Where?"])), printer)
    printer.end(prediction.boxes)
    assert prediction.text == SAID
    assert len(shown) > 15 and not any("\ufffd" in piece for piece in shown)
    assert prediction.meta["named"] == {"<obj0>": prediction.boxes[0]}
    box = ", ".join(f"{number:.2f}" for number in prediction.boxes[0])
    assert "".join(shown) == f"think   The café has a 🪑.\nanswer  椅子 <obj0>\nbox     {box}\n"


def test_in_a_terminal_the_thought_is_grey():
    shown = []
    printer = Printer(shown.append, dim=True)
    printer("<think>a</think><answer>b</answer>")
    printer.end()
    assert "".join(shown) == "\x1b[2mthink   a\x1b[0m\nanswer  b\n"


def test_a_batch_cannot_be_told_apart_when_streamed(session):
    """Streaming decodes one by one, so that pieces of two answers never mix."""
    samples = session.samples(Request(["Where?"] * 3))
    marks = []
    for prediction, _ in session.answers(samples, marks.append):
        assert "".join(marks) == prediction.text
        marks.clear()


# dialogues -------------------------------------------------------------------------------------------------------


def test_turns_are_put_as_3d_llm_puts_them():
    """The form of 3d_llm_embodied_dialogue_filtered_val.json."""
    turns = [(" Is there a bed? ", "Yes, one.")]
    assert dialogue_question([], "Hello!") == "### human: Hello! ### assistant:"
    asked = dialogue_question(turns, "What colour is it? ")
    assert asked == "### human: Is there a bed? ### assistant: Yes, one. ### human: What colour is it? ### assistant:"


@pytest.mark.real
def test_turns_are_put_as_in_the_real_file(real_data):
    rows = json.loads((real_data / "annotations" / "3d_llm_embodied_dialogue_filtered_val.json").read_text())
    pattern = re.compile(r"### human: (.*?) ### assistant: (.*?) (?=### human:)", re.DOTALL)
    asked = 0
    for row in rows[:200]:
        before, _, last = row["question"].rpartition("### human: ")
        turns = pattern.findall(before + "### human:")
        if len(turns) == before.count("### human:"):
            assert dialogue_question(turns, last.removesuffix("### assistant:")) == row["question"].strip()
            asked += len(turns) > 0
    assert asked > 100


def reader(lines):
    """Lines of a user, then Ctrl-D."""
    waiting = list(lines)

    def read(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_a_chat_keeps_what_was_said_until_a_new_one_begins(scripted):
    shown, kept = [], []
    lines = ["Is there a chair?", "", "Where is it? ", "/new", "And a bed?", "/what"]
    count = chat(scripted, reader(lines), shown.append, on_answer=lambda *answer: kept.append(answer[0]))
    assert count == 3 and [entry.task for entry in kept] == ["dialogue"] * 3
    first, second, third = [sample.question for sample in scripted.prompts]
    assert first == "### human: Is there a chair? ### assistant:"
    assert second == "### human: Is there a chair? ### assistant: 椅子 <obj0> ### human: Where is it? ### assistant:"
    assert third == "### human: And a bed? ### assistant:"
    assert len({entry.sample_id for entry in kept}) == 3
    text = "".join(shown)
    assert text.count("think   ") == 3 and text.count("/new begins another dialogue") == 2


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_a_chat_ends_cleanly_at_the_prompt(scripted, end):
    shown = []
    assert chat(scripted, reader(["Hello?", end]), shown.append) == 1
    assert shown[-1] == "\n" and len(scripted.turns) == 1


def test_a_chat_ends_cleanly_within_an_answer(scripted, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scripted.model, "decoder", interrupted)
    kept = []
    assert chat(scripted, reader(["Hello?"]), [].append, on_answer=lambda *answer: kept.append(answer)) == 0
    assert kept == [] and scripted.turns == []


def test_the_command_chats_and_writes_the_dialogue(folder, scan, tmp_path, monkeypatch, capsys):  # noqa: F811
    lines = reader(["Is there a chair?", "Where?"])
    monkeypatch.setattr("builtins.input", lines)
    argv = ["infer", "--scene", str(scan), "--model", str(folder), "--chat", "--out", str(tmp_path / "chat")]
    assert cli.main([*argv, "--max-tokens", "4"]) == 0
    said = read_predictions(tmp_path / "chat" / "predictions.jsonl")
    assert [entry.task for entry in said] == ["dialogue"] * 2 and said[1].question.count("### human:") == 2
    assert "predictions.jsonl and answer-0.png, answer-1.png" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", reader([]))
    assert cli.main([*argv[:-1], str(tmp_path / "none")]) == 0 and not (tmp_path / "none").exists()
    assert cli.main([*argv, "--ask", "Where?"]) == 1
    assert "--chat asks for its questions itself" in capsys.readouterr().err


# tasks -----------------------------------------------------------------------------------------------------------


def test_friendly_names_stand_for_tasks():
    assert {task_named(name) for name in (*TASK_NAMES, *TASKS)} == set(TASKS)
    assert (task_named("caption"), task_named("plan")) == ("object_caption", "planning")
    with pytest.raises(ValueError, match="Unknown task 'captions'"):
        task_named("captions")


def test_dense_captions_are_of_every_detected_object(session, tmp_path):
    expected = detected_objects(session.model, session.observation)
    answers = list(session.answers(session.samples(Request(task="dense-caption"))))
    predictions = [prediction for prediction, _ in answers]
    assert len(expected) > 1 and {entry.task for entry in predictions} == {"dense_caption"}
    np.testing.assert_allclose([entry.meta["query_box"] for entry in predictions], expected, atol=1e-5)
    for stale in ("answer-0.png", "answer-11.png"):
        (tmp_path / stale).touch()
    (picture,) = save_answers(session, answers, tmp_path)
    assert list(tmp_path.glob("*.png")) == [picture], "those of earlier answers are gone"
    assert picture.name == "objects.png"
    drawn_HW3 = np.asarray(Image.open(picture))
    assert (drawn_HW3 == ASKED).all(-1).any() and not (drawn_HW3 == ANSWERED).all(-1).any()
    assert len(read_predictions(tmp_path / "predictions.jsonl")) == len(expected)


def test_a_description_needs_no_question_and_a_plan_does(session):
    (sample,) = session.samples(Request(task="describe"))
    assert sample.task == "scene_description" and sample.question == "Describe this room."
    with pytest.raises(ValueError, match="There is no question"):
        session.samples(Request(task="plan"))
    with pytest.raises(ValueError, match="describes the whole room"):
        session.samples(Request(["Why?"], task="describe"))


def test_a_question_of_a_dialogue_is_put_as_the_first_of_one(scripted):
    (sample,) = scripted.samples(Request(["Is there a chair?"], task="dialogue"))
    assert sample.question == "### human: Is there a chair? ### assistant:"


def test_a_situation_makes_a_question_situated(scripted):
    request = Request(["What is behind me?"], situation="I stand at the door.")
    ((prediction, _),) = scripted.answers(scripted.samples(request))
    assert prediction.task == "situated_qa" and scripted.prompts[0].situation == "I stand at the door."
    with pytest.raises(ValueError, match="goes with --situation"):
        Request(["What is behind me?"], task="situated").check()
    with pytest.raises(ValueError, match="goes with --situation"):
        Request(["What?"], task="qa", situation="I stand here.").check()


def test_a_picture_shows_the_answered_box(scripted, tmp_path):
    """Red is the colour of answers: there is some where a box was answered, none where none was."""
    answers = list(scripted.answers(scripted.samples(Request(["Where?"]))))
    (picture,) = save_answers(scripted, answers, tmp_path)
    red = (np.asarray(Image.open(picture)) == [220, 38, 38]).all(axis=2).sum()
    answers[0][0].boxes.clear()
    (picture,) = save_answers(scripted, answers, tmp_path)
    assert red > 30 and (np.asarray(Image.open(picture)) == [220, 38, 38]).all(axis=2).sum() == 0


def test_the_command_describes_grounds_and_prints_json(folder, scan, tmp_path, capsys):  # noqa: F811
    common = ["--scene", str(scan), "--model", str(folder), "--out", str(tmp_path), "--max-tokens", "4", "--json"]
    (tmp_path / "questions.txt").write_text("the chair by the window\n\nthe table\n", encoding="utf-8")
    assert cli.main(["infer", *common, "--task", "describe"]) == 0
    assert cli.main(["infer", *common, "--task", "ground", "--questions", str(tmp_path / "questions.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["scene_description", "grounding", "grounding"]
    assert [row["question"] for row in rows[1:]] == ["the chair by the window", "the table"]


def test_the_command_prints_the_answer_as_it_is_written(scripted, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr("threedr1.engine.predict.open_session", lambda *_, **__: scripted)
    monkeypatch.setattr(sys.stdout, "write", events.append)
    monkeypatch.setattr(sys.stdout, "flush", lambda: events.append("shown"))
    assert cli.main(["infer", "--scene", "a.ply", "--ask", "Where?", "--out", str(tmp_path)]) == 0
    pieces = [text for text, after in zip(events, events[1:], strict=False) if after == "shown"]
    assert pieces[0] == "asked   Where?\n" and len(pieces) > 15
    assert "".join(pieces).startswith("asked   Where?\nthink   The café has a 🪑.\nanswer  椅子 <obj0>\nbox     ")


def test_an_answer_of_nothing_has_its_line():
    shown = []
    printer = Printer(shown.append)
    printer("<think>a")
    printer.end()
    assert "".join(shown) == "think   a\nanswer  \n"


# models ----------------------------------------------------------------------------------------------------------


def test_a_model_and_a_scan_in_one_line(folder, scan):  # noqa: F811
    from threedr1 import SceneVLM as offered

    answer = offered.from_pretrained(folder).ask(scan, "Where can I sit?", max_new_tokens=4)
    assert answer.text == infer(scan, folder, ["Where can I sit?"], max_new_tokens=4).predictions[0].text


def test_a_run_is_loaded_by_its_newest_checkpoint(folder, tmp_path):  # noqa: F811
    for step in (2, 10):
        (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    newest = tmp_path / "run" / "checkpoints" / "step-000010" / "model"
    newest.symlink_to(folder)
    assert local_folder(tmp_path / "run") == newest and local_folder(newest.parent) == newest
    assert SceneVLM.from_pretrained(tmp_path / "run").settings.num_points == 512


def test_a_model_is_loaded_by_its_name_on_the_hub(folder, tmp_path, monkeypatch):  # noqa: F811
    """From the hub's cache, as it is laid out on disk, without a connection."""
    import huggingface_hub.constants as hub

    snapshot = tmp_path / "models--lab--rooms" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "models--lab--rooms" / "refs").mkdir()
    (tmp_path / "models--lab--rooms" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder("lab/rooms").resolve() == folder.resolve()
    with pytest.raises(ValueError, match="the hub gives no model of that name"):
        local_folder("lab/other")
    with pytest.raises(ValueError, match="There is no model at runs/none"):
        local_folder("runs/none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": " "}, "The question is empty"),
        ({"question": "Where?", "task": "caption"}, "needs its box"),
        ({"question": "What is {object}?"}, "needs its box"),
        ({"question": "Where?", "task": "qa", "history": [("a", "b")]}, "Only a dialogue has a history"),
        ({"question": "Where?", "task": "situated"}, "A situation goes with the task situated"),
        ({"question": "Where?", "situation": "I sit."}, "A situation goes with the task situated"),
        ({"question": "Where?", "task": "sing"}, "Unknown task 'sing'"),
    ],
)
def test_ask_refuses_what_makes_no_sense(arguments, words, model, scene):  # noqa: F811
    with pytest.raises(ValueError, match=re.escape(words)):
        model.ask(scene, **arguments)


def test_ask_keeps_a_history(model, scene):  # noqa: F811
    first = model.ask(scene, "Is there a chair?", task="dialogue", max_new_tokens=4)
    second = model.ask(scene, "Where?", history=[("Is there a chair?", first.answer)], max_new_tokens=4)
    put = dialogue_question([("Is there a chair?", first.answer)], "Where?")
    assert put.endswith("### human: Where? ### assistant:") and second.text


# size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_million_points_take_little_memory_and_time(folder, tmp_path):  # noqa: F811
    """The answer begins within 20 s on two idle cores; twice that is allowed here, where others work beside it."""
    count = 5_000_000
    rng = np.random.default_rng(0)
    vertices_V3, _ = room_vertices()
    points_N3 = vertices_V3[rng.integers(0, len(vertices_V3), count)] + rng.normal(0, 0.01, (count, 3))
    write_ply(tmp_path / "large.ply", points_N3)
    argv = [
        "infer",
        "--scene",
        tmp_path / "large.ply",
        "--model",
        folder,
        "--ask",
        "Where?",
        "--out",
        tmp_path / "out",
    ]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, Path(cli.__file__), *argv, "--max-tokens", "4"], stdout=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    first = process.stdout.readline()  # is there once the scan and the model are read
    seconds = time.monotonic() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and first.startswith(b"asked   Where?")
    assert seconds < 40
    assert usage.ru_maxrss < 4 << 20, "kilobytes: 4 GiB"
