"""The Scene-30K engine: filters by hand-made cases, a journal that survives a kill, teachers against local servers."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneInfo, SceneStore
from threedr1.datasets.synthesis import FilterOptions, build_teacher, synthesize, synthesize_with
from threedr1.datasets.synthesis.description import describe, inventory, load_captions
from threedr1.datasets.synthesis.filters import (
    check_consistency,
    check_gold,
    check_response,
    last_step,
    names_target,
    near_duplicates,
    similarity,
    step_starts,
)
from threedr1.datasets.synthesis.gemini_teacher import GeminiTeacher
from threedr1.datasets.synthesis.journal import Journal
from threedr1.datasets.synthesis.openai_teacher import OpenAITeacher
from threedr1.datasets.synthesis.prompts import answer_prompt, check_prompt
from threedr1.datasets.synthesis.rule_solvers import locate, solve_question
from threedr1.datasets.synthesis.rule_teacher import answer_of_thought, write_thought
from threedr1.datasets.synthesis.scene_reading import CannotTell, SceneReading
from threedr1.datasets.synthesis.sources import Question, load_questions
from threedr1.datasets.synthesis.teacher import (
    Reply,
    Request,
    RetryOptions,
    TeacherUnavailable,
    backoff,
    parse_retry_after,
)
from threedr1.datasets.tasks import load_samples
from threedr1.main import main
from threedr1.utils.text import parse_response

from .. import data_factory as factory

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = FilterOptions()
FAST = RetryOptions(attempts=3, first_delay=0.001, longest_delay=0.01)
BOX = (0.5, 0.25, 0.45, 0.5, 0.5, 0.9, 0.0)
THINK = (
    "Step 1: The question asks for the thing on the left of the chair, which stands near the middle of the room. "
    "Step 2: From there the table is the only object on that side of it. Conclusion: It is the table."
)
GOOD = f"<think>{THINK}</think><answer>The table.</answer>"


def question(**changes) -> Question:
    base = Question(
        "scanqa-1", "scanqa", "s", "qa", "What is left of the chair?", (3,), ("table",), ("table",), (BOX,)
    )
    return replace(base, **changes)


# ---- filters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        ("", "format"),
        (THINK, "format"),
        (f"<think>{THINK}</think>The table.", "format"),
        (f"{GOOD} And more.", "format"),
        (f"<think>{THINK}</think><answer></answer>", "format"),
        ("<think>First, a. Next, b. Last, the table.</think><answer>table</answer>", "think_short"),
        (GOOD.replace("Step 2: From", "From").replace("Conclusion: ", ""), "few_steps"),
        (GOOD.replace("It is the table.", "It is that one."), "target_unnamed"),
    ],
)
def test_response_filters_by_hand(text, reason):
    assert check_response(text, question(), OPTIONS) == reason


def test_length_filters_count_words_without_boxes_and_can_be_switched():
    strict = FilterOptions(min_answer_words=20)
    assert check_response(GOOD, question(), strict) == "answer_short"
    long_answer = GOOD.replace("The table.", "word " * 19 + "table")
    assert check_response(long_answer, question(), strict) == ""
    boxed = GOOD.replace("The table.", "word " * 18 + "table <box>1, 2, 3, 4, 5, 6</box>")
    assert check_response(boxed, question(), strict) == "answer_short"
    short = "<think>First, a. Next, b. Last, the table.</think><answer>table</answer>"
    assert check_response(short, question(), FilterOptions(min_think_words=0)) == ""


def test_steps_are_cues_that_open_sentences():
    assert len(step_starts("First, a. Next, b. Last, c.")) == 3
    assert len(step_starts("Step 1: a\nStep 2: b\nConclusion: c")) == 3
    assert len(step_starts("Step 1: First, a. **Step 2:** Then b.")) == 2
    assert len(step_starts("1. First, a\n2. Second, b\n- Finally, c")) == 3
    assert len(step_starts("Next to the bed is a lamp. The last chair and the first one are red.")) == 0
    assert last_step("First, the chair. Last, the table.") == "Last, the table."
    assert last_step("no cue") == "no cue"


def test_target_names_take_plurals_and_last_words_but_no_parts_of_words():
    assert names_target("Last, two office chairs.", ["office chair"])
    assert names_target("Last, this chair.", ["office chair"])
    assert not names_target("Last, the armchair.", ["chair"])
    assert not names_target("Last, the bed.", ["table", "desk"])


def test_consistency_is_character_levenshtein_similarity():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "") == 1.0
    assert check_consistency("abcdefghij", "abcdefghXX", OPTIONS) == ""  # exactly 0.8
    assert check_consistency("abcdefghij", "abcdefgXXX", OPTIONS) == "inconsistent"
    assert check_consistency("The table. ", "\nThe table.", OPTIONS) == ""


def test_gold_answers_agree_as_whole_words_and_boxes_by_overlap():
    assert check_gold("There are 3 chairs.", question(gold_answers=("three",)), OPTIONS) == ""
    assert check_gold("It is brown.", question(gold_answers=("white", "brown")), OPTIONS) == ""
    assert check_gold("It is on the tablecloth.", question(gold_answers=("table",)), OPTIONS) == "gold_answer"
    grounding = question(task="grounding")
    assert check_gold("It is <box>0.5, 0.25, 0.45, 0.5, 0.5, 0.9</box>.", grounding, OPTIONS) == ""
    # moved by half its width: IoU 1/3
    assert check_gold("It is <box>0.75, 0.25, 0.45, 0.5, 0.5, 0.9</box>.", grounding, OPTIONS) == "gold_box"
    assert check_gold("It is the chair.", grounding, OPTIONS) == "gold_box"


def test_near_duplicates_need_the_same_target_question_and_answer():
    first = question(text="the chair that is closest to the table")
    same = question(text="The chair that is closest to the table.")
    pairs = [(first, "The chair."), (same, "the chair"), (same, "A wholly different answer.")]
    assert near_duplicates(pairs, OPTIONS) == [1]
    other = [(replace(same, object_ids=(4,)), "The chair."), (replace(same, scene_id="t"), "The chair.")]
    assert near_duplicates([pairs[0], *other], OPTIONS) == []


# ---- sources, descriptions, prompts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A data root of one's own, to break."""
    for name in ("annotations", "prepared"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for path in (prepared / name).iterdir():
            (tmp_path / "root" / name / path.name).write_bytes(path.read_bytes())
    for path in prepared.glob("scannetv2*"):
        (tmp_path / "root" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "root"


def train_and_val(root: Path) -> tuple[list[str], list[str]]:
    return (root / "scannetv2_train.txt").read_text().split(), (root / "scannetv2_val.txt").read_text().split()


def test_questions_are_those_of_training_scenes_in_an_order_of_the_seed(root):
    store, (train, _) = SceneStore(root / "prepared"), train_and_val(root)
    questions, _ = load_questions(root, store, split="train", seed=0, limit=0)
    assert {one.source for one in questions} == {"scanqa", "scanrefer", "nr3d"}
    assert {one.scene_id for one in questions} == set(train)
    assert len({one.question_id for one in questions}) == len(questions)
    again, _ = load_questions(root, store, split="train", seed=0, limit=2)
    assert again == questions[:2]
    orders = {
        tuple(one.question_id for one in load_questions(root, store, split="train", seed=seed, limit=0)[0])
        for seed in range(5)
    }
    assert len(orders) > 1
    chair = next(one for one in questions if one.source == "scanrefer")
    expected = np.array(factory.OBJECTS[factory.CHAIR][0]) - store.index[chair.scene_id].origin_3
    np.testing.assert_allclose(chair.target_boxes[0][:3], expected, atol=0.02)


def test_repeated_questions_are_asked_once_and_ambiguous_ones_never(root):
    path, store = root / "annotations" / "ScanQA_v1.0_train.json", SceneStore(root / "prepared")
    rows = json.loads(path.read_text())
    repeated = {**rows[0], "question_id": "again"}
    other = {**rows[0], "question": "Which one?", "question_id": "a"}
    path.write_text(json.dumps([*rows, repeated, other, {**other, "object_ids": [factory.CHAIR], "question_id": "b"}]))
    questions, left_out = load_questions(root, store, split="train", seed=0, limit=0)
    assert left_out == {"repeated": 1, "ambiguous": 2}
    assert [one.text for one in questions].count(rows[0]["question"]) == len(rows)
    assert "Which one?" not in [one.text for one in questions]


def test_held_out_scenes_are_refused(root, tmp_path):
    train, val = train_and_val(root)
    with pytest.raises(ValueError, match="training data"):
        synthesize(root, tmp_path / "o.jsonl", split="val")
    path = root / "annotations" / "ScanQA_v1.0_train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {**rows[0], "scene_id": val[0], "question_id": "leak"}]))
    with pytest.raises(ValueError, match=rf"{val[0]} belongs to the validation"):
        synthesize(root, tmp_path / "o.jsonl")
    path.write_text(json.dumps(rows))
    (root / "scannetv2_train.txt").write_text("\n".join([*train, *val]))
    with pytest.raises(ValueError, match="belongs to the validation"):
        synthesize(root, tmp_path / "o.jsonl")
    assert not list(tmp_path.glob("o.jsonl"))


def test_missing_questions_are_one_sentence(root, tmp_path):
    for path in (root / "annotations").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="There are no questions"):
        synthesize(root, tmp_path / "o.jsonl")


def info_of(*things: tuple[int, str, tuple[float, ...]]) -> SceneInfo:
    """A scene made of labelled boxes, world frame, floor centre at (1, 2, 0)."""
    boxes_K7 = np.array([[*box, 0.0] for _, _, box in things], np.float32).reshape(-1, 7)
    return SceneInfo(
        scene_id="s",
        object_ids_K=np.array([number for number, _, _ in things], np.int32),
        object_labels=[label for _, label, _ in things],
        class_ids_K=np.zeros(len(things), np.int32),
        boxes_K7=boxes_K7,
        structure_ids=frozenset(),
        axis_align_44=np.eye(4),
        origin_3=np.array([1, 2, 0], np.float32),
        raw_middle_3=np.zeros(3),
    )


ROOM = info_of(
    (0, "desk", (3, 2, 0.4, 1.6, 0.8, 0.8)),
    (1, "monitor", (3, 2, 1.0, 0.6, 0.2, 0.4)),
    (2, "chair", (2, 2, 0.5, 0.5, 0.5, 1.0)),
    (3, "chair", (-1, 2, 0.6, 0.5, 0.5, 1.2)),
    (4, "office chair", (1, 4, 0.4, 0.5, 0.5, 0.8)),
    (5, "bed", (-2, 0, 0.3, 2.0, 1.5, 0.6)),
)


def test_descriptions_use_the_caption_where_there_is_one_and_always_list_boxes(root):
    assert inventory(ROOM) == ("This scene holds two chairs, one bed, one desk, one monitor and one office chair.")
    text = describe(ROOM, {})
    assert text.startswith("This scene holds") and "desk <box>2.00, 0.00, 0.40, 1.60, 0.80, 0.80</box>" in text
    assert describe(ROOM, {"s": "A study."}).startswith("A study. Objects")
    path = root / "annotations" / "scene_caption.json"
    path.write_text(json.dumps({"s": {"captions": ["A study.", "It is small. "]}}))
    assert load_captions(root) == {"s": "A study. It is small."}
    path.write_text(json.dumps({"s": {"caption": "A study."}}))
    with pytest.raises(ValueError, match="captions"):
        load_captions(root)


def test_prompts_hold_the_papers_words_and_take_braces_as_they_are():
    prompt = answer_prompt(question(text="Is {this} it?"), "A {question} room.")
    assert prompt.startswith("A {question} room. Following the scene description, think step by step and answer")
    assert prompt.endswith("Question: Is {this} it?")
    assert "<box>" in answer_prompt(question(task="grounding"), "A room.")
    assert "my {thoughts}" in check_prompt(question(), "my {thoughts}")


# ---- rule teacher


@pytest.mark.parametrize(
    ("description", "object_id"),
    [
        ("it is the bed.", 5),
        ("this is the chair closest to the desk. it is red.", 2),
        ("find the chair that is farthest away from the desk", 3),
        ("pick the tallest chair in the room", 3),
        ("the desk with a monitor on it", 0),
        ("the monitor that is on the desk", 1),
        ("the chair to the left of the desk as seen from the middle of the room", None),  # one stands right ahead
        ("the office chair to the left of the desk as seen from the middle of the room", 4),
        ("the chair between the desk and the bed", 2),
        ("there is a wooden chair. it is the chair nearest to the monitor", 2),
        ("the red chair", None),  # boxes have no colours
        ("the piano", None),
        ("the thing beside the white bed", None),
    ],
)
def test_rules_find_what_a_description_means_or_say_that_they_cannot(description, object_id):
    scene = SceneReading(ROOM)
    if object_id is None:
        with pytest.raises(CannotTell):
            locate(scene, description)
    else:
        assert locate(scene, description).thing.object_id == object_id


@pytest.mark.parametrize(
    ("asked", "gold"),
    [
        ("How many chairs are in the room?", "three"),  # office chairs are chairs
        ("How many office chairs are there?", "1"),
        ("Are there more chairs than desks, fewer, or the same number?", "more"),
        ("Are there more beds than desks, fewer, or the same number?", "the same"),
        ("Which is closer to the monitor, the bed or the desk?", "desk"),
        ("Which is the tallest, the bed, the office chair or the desk?", None),  # the last two are as high
        ("Which is the shortest, the bed, the office chair or the desk?", "bed"),
        ("What is on the desk?", "monitor"),
        ("What is the monitor standing on?", "desk"),
        ("What on the floor is closest to the monitor?", "desk"),
        ("What is the chair made of?", None),
    ],
)
def test_rules_answer_questions_of_known_forms(asked, gold):
    scene = SceneReading(ROOM)
    if gold is None:
        with pytest.raises(CannotTell):
            solve_question(scene, asked)
        return
    solution = solve_question(scene, asked)
    assert check_gold(solution.answer, question(gold_answers=(gold,)), OPTIONS) == ""
    think = write_thought(solution)
    answer = answer_of_thought(think)
    assert answer == solution.answer[0].upper() + solution.answer[1:] + "."
    named = question(target_names=tuple(ROOM.object_labels))
    assert check_response(f"<think>{think}</think><answer>{answer}</answer>", named, OPTIONS) == ""


def test_the_rule_teachers_records_train_and_every_box_it_writes_is_an_objects_own(root, tmp_path):
    out = tmp_path / "out.jsonl"
    report = synthesize(root, out, teacher="rules", workers=2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert report["kept"] == len(rows) > 0
    assert report["questions"] == report["kept"] + sum(report["rejected"].values())
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report
    rejects = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == sum(report["rejected"].values()) and all(row["reason"] for row in rejects)
    (root / "annotations" / "Scene-30K.jsonl").write_bytes(out.read_bytes())
    store = SceneStore(root / "prepared")
    samples = load_samples(root, "train", ["scene30k"], scenes=store)
    assert [sample.scene_id for sample in samples] == [row["scene_id"] for row in rows]
    assert all(sample.think and sample.answer for sample in samples)
    for row in rows:
        listed = describe(store.index[row["scene_id"]], {})
        boxes = [part.split("</box>")[0] for part in row["cot"].split("<box>")[1:]]
        assert boxes and all(box in listed for box in boxes)


def test_the_command_reports_what_it_kept_and_refuses_in_one_sentence(root, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["synthesize", "--root", str(root), "--out", str(out), "--limit", "2"]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert "questions 2" in " ".join(printed[0].split()) and f"wrote {out}" in printed
    assert main(["synthesize", "--root", str(root), "--out", str(out), "--split", "val"]) == 1
    assert "training data" in capsys.readouterr().err


# ---- journal and resuming


class Stopped(Exception):
    """Stands for whatever ends a run."""


class CountingTeacher:
    """Answers every question with its gold answer; counts what it is asked, and fails where it is told to."""

    identity = "counting-1"

    def __init__(self, *, stop_after: int | None = None, unavailable: tuple[int, ...] = ()):
        self.prompts: list[str] = []
        self.closed = False
        self.stop_after, self.unavailable = stop_after, unavailable

    async def ask(self, request: Request) -> Reply:
        await asyncio.sleep(0)
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise Stopped
        self.prompts.append(request.prompt)
        if len(self.prompts) in self.unavailable:
            raise TeacherUnavailable("busy")
        answer = f"It is the {request.question.target_names[0]} <box>" + (
            ", ".join(f"{value:.2f}" for value in request.question.target_boxes[0][:6]) + "</box>."
        )
        if request.think:
            return Reply(f"<answer>{answer}</answer>", input_tokens=3, output_tokens=2)
        think = f"{THINK} {request.question.target_names[0]}"
        return Reply(f"<think>{think}</think><answer>{answer}</answer>", input_tokens=10, output_tokens=5)

    async def close(self) -> None:
        self.closed = True


def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(root, tmp_path):
    whole, whole_out = CountingTeacher(), tmp_path / "whole.jsonl"
    report = synthesize_with(whole, root, whole_out, workers=2)
    assert whole.closed and report["kept"] > 1 and report["requests"] == 2 * report["questions"]
    assert (report["input_tokens"], report["output_tokens"]) == (13 * report["questions"], 7 * report["questions"])
    assert len(whole.prompts) == len(set(whole.prompts)) == report["requests"]
    out, asked = tmp_path / "parts.jsonl", []
    for _ in range(20):
        teacher = CountingTeacher(stop_after=2)
        try:
            synthesize_with(teacher, root, out, workers=2)
        except Stopped:
            assert not out.exists()
        asked += teacher.prompts
        if out.exists():
            break
    assert sorted(asked) == sorted(whole.prompts)
    assert out.read_bytes() == whole_out.read_bytes()
    again = CountingTeacher()
    assert synthesize_with(again, root, out, workers=1)["new_requests"] == 0
    assert again.prompts == [] and out.read_bytes() == whole_out.read_bytes()


def test_questions_without_an_answer_are_counted_and_asked_again_next_time(root, tmp_path):
    out = tmp_path / "out.jsonl"
    first = synthesize_with(CountingTeacher(unavailable=(1,)), root, out, workers=1)
    assert first["failed"] == 1
    teacher = CountingTeacher()
    second = synthesize_with(teacher, root, out, workers=1)
    assert second["failed"] == 0 and second["kept"] == first["kept"] + 1 and len(teacher.prompts) == 2


def test_a_dead_teacher_ends_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr("threedr1.datasets.synthesis.engine.FAILURES_IN_A_ROW", 2)
    with pytest.raises(ValueError, match="2 times in a row, the last time with: busy"):
        synthesize_with(CountingTeacher(unavailable=tuple(range(1, 99))), root, tmp_path / "out.jsonl")


def test_blocked_replies_are_final_and_keep_their_reason(root, tmp_path):
    class Blocked(CountingTeacher):
        async def ask(self, request: Request) -> Reply:
            self.prompts.append(request.prompt)
            return Reply("", "blocked_safety")

    report = synthesize_with(Blocked(), root, tmp_path / "out.jsonl")
    assert report["kept"] == 0 and report["rejected"] == {"blocked_safety": report["questions"]}
    assert synthesize_with(Blocked(), root, tmp_path / "out.jsonl")["new_requests"] == 0


def test_the_journal_drops_a_torn_row_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add("a", Reply("one", input_tokens=1))
        journal.add("b", Reply("two", "truncated"))
        with pytest.raises(ValueError, match="Another run"):
            Journal(path)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n"), -7):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            assert journal.get("a") == Reply("one", input_tokens=1) and journal.get("b") is None
            journal.add("b", Reply("two", "truncated"))
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match="row 1"):
        Journal(path)


def test_a_file_of_someone_else_is_not_overwritten(root):
    path = root / "annotations" / "Scene-30K.jsonl"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="was not written by this engine"):
        synthesize(root, path)
    assert path.read_bytes() == before


# ---- network teachers against servers on this machine


class Server:
    """A local HTTP server that answers from a script of (status, headers, body) and keeps what it was sent."""

    def __init__(self, script, delay: float = 0.0):
        self.requests: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                    number = len(outer.requests) - 1
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                time.sleep(delay)
                status, headers, answer = script(number, body)
                with outer._lock:
                    outer.in_flight -= 1
                if status is None:  # drop the connection
                    self.close_connection = True
                    return
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def gemini_body(text: str, **changes) -> dict:
    parts = [{"text": "hidden", "thought": True}, {"text": text}]
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", **changes}
    usage = {"promptTokenCount": 11, "candidatesTokenCount": 5, "thoughtsTokenCount": 2}
    return {"candidates": [candidate], "usageMetadata": usage}


def openai_body(text: str, **changes) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **changes}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


def make_teacher(kind: str, url: str, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if kind == "gemini":
        pytest.importorskip("google.genai")
        monkeypatch.setenv("GEMINI_API_KEY", "secret-key")
        return GeminiTeacher("some-model", base_url=url, thinking_budget=128, timeout=10, retries=FAST)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    return OpenAITeacher("some-model", base_url=f"{url}/v1/", timeout=10, retries=FAST)


def ask(teacher, request: Request) -> Reply:
    async def once() -> Reply:
        try:
            return await teacher.ask(request)
        finally:
            await teacher.close()

    return asyncio.run(once())


KINDS = {"gemini": gemini_body, "openai": openai_body}
REQUEST = Request(question(), "the prompt")


@pytest.mark.parametrize("kind", KINDS)
def test_network_teachers_send_the_prompt_and_read_text_and_tokens(kind, monkeypatch):
    with Server(lambda number, body: (200, {}, KINDS[kind]("hello"))) as server:
        teacher = make_teacher(kind, server.url, monkeypatch)
        assert ask(teacher, REQUEST) == Reply("hello", "", 11, 7)
    (sent,) = server.requests
    if kind == "gemini":
        assert sent["path"].endswith("/models/some-model:generateContent")
        assert sent["body"]["contents"][0]["parts"] == [{"text": "the prompt"}]
        thinking = sent["body"]["generationConfig"]["thinkingConfig"]
        assert thinking in ({"thinkingBudget": 128}, {"thinking_budget": 128})  # the spelling differs by release
    else:
        assert sent["path"] == "/v1/chat/completions"
        assert sent["body"] == {"model": "some-model", "messages": [{"role": "user", "content": "the prompt"}]}
        assert sent["headers"]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in teacher.identity and "some-model" in teacher.identity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0"}, {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}}),
        (503, {}, {"error": {"code": 503, "message": "overloaded"}}),
        (500, {}, b"<html>broken</html>"),
        (None, {}, b""),
        (200, {"Content-Length": "4000"}, b'{"candidates": [{"con'),
        (200, {}, b'{"candidates": [{"con'),
    ],
    ids=["429", "503", "500 html", "dropped", "truncated", "broken json"],
)
def test_failures_that_pass_are_tried_again(kind, failure, monkeypatch):
    with Server(lambda number, body: failure if number < 2 else (200, {}, KINDS[kind]("late"))) as server:
        assert ask(make_teacher(kind, server.url, monkeypatch), REQUEST).text == "late"
        assert len(server.requests) == 3
    with Server(lambda number, body: failure) as server:
        with pytest.raises(TeacherUnavailable):
            ask(make_teacher(kind, server.url, monkeypatch), REQUEST)
        assert len(server.requests) == FAST.attempts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "message", "said"),
    [(401, "bad key secret-key", "API key"), (404, "no such model", "--model"), (400, "bad secret-key", "status 400")],
)
def test_failures_that_stay_are_one_sentence_without_the_key(kind, status, message, said, monkeypatch):
    body = {"error": {"code": status, "message": message, "status": "X"}}
    with Server(lambda number, sent: (status, {}, body)) as server:
        with pytest.raises(ValueError, match=said) as caught:
            ask(make_teacher(kind, server.url, monkeypatch), REQUEST)
        assert len(server.requests) == 1 and "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}, "blocked_prompt_safety"),
        ("gemini", gemini_body("", finishReason="SAFETY", content=None), "blocked_safety"),
        ("gemini", gemini_body("half", finishReason="MAX_TOKENS"), "truncated"),
        ("gemini", {"candidates": []}, "empty"),
        ("gemini", gemini_body(" "), "empty"),
        ("openai", openai_body("", finish_reason="content_filter"), "blocked_content_filter"),
        ("openai", openai_body("", message={"content": None, "refusal": "no"}), "blocked_refusal"),
        ("openai", openai_body("half", finish_reason="length"), "truncated"),
        ("openai", openai_body(""), "empty"),
    ],
)
def test_blocked_and_truncated_replies_have_reasons(kind, body, reason, monkeypatch):
    with Server(lambda number, sent: (200, {}, body)) as server:
        assert ask(make_teacher(kind, server.url, monkeypatch), REQUEST).reason == reason
        assert len(server.requests) == 1


def gemini_oracle(number: int, body: dict):
    """Thinks about the table and answers so, and answers a check in the same words."""
    prompt = body["contents"][0]["parts"][0]["text"]
    return 200, {}, gemini_body("<answer>The table.</answer>" if "from these thoughts alone" in prompt else GOOD)


def test_the_engine_over_http_keeps_what_agrees_with_the_benchmark(root, tmp_path, monkeypatch):
    with Server(gemini_oracle, delay=0.02) as server:
        teacher = make_teacher("gemini", server.url, monkeypatch)
        report = synthesize_with(teacher, root, tmp_path / "out.jsonl", workers=3)
    assert report["kept_by_source"] == {"scanqa": report["kept"]} and report["kept"] > 0
    # the chair's descriptions get an answer about the table
    assert set(report["rejected"]) == {"target_unnamed"}
    assert 1 < server.most_in_flight <= 3
    assert len(server.requests) == report["requests"] == report["questions"] + report["kept"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(parse_response(row["cot"]).well_formed and row["gold_answer"] == "table" for row in rows)
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out.jsonl*"))
    assert b"secret-key" not in written


def test_missing_keys_and_unknown_teachers_are_one_sentence(root, tmp_path, monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for teacher, said in (("gemini", "GEMINI_API_KEY"), ("openai", "OPENAI_API_KEY"), ("rule", "Unknown teacher")):
        with pytest.raises(ValueError, match=said):
            synthesize(root, tmp_path / "out.jsonl", teacher=teacher)
    with pytest.raises(ValueError, match="no models"):
        build_teacher("rules", store=SceneStore(root / "prepared"), model="x")
    with pytest.raises(ValueError, match="--model"):
        OpenAITeacher(base_url="http://127.0.0.1:1/v1")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.setitem(sys.modules, "google.genai", None)
    monkeypatch.delattr("google.genai", raising=False)
    with pytest.raises(ValueError, match="google-genai"):
        GeminiTeacher()
    assert list(tmp_path.glob("out.jsonl*")) == []


def test_backoff_grows_is_bounded_and_honours_the_server():
    options, rng = RetryOptions(first_delay=1, longest_delay=8), random.Random(0)
    for attempt, ceiling in enumerate((1, 2, 4, 8, 8, 8)):
        assert ceiling / 2 <= backoff(attempt, None, options, rng) <= ceiling
    assert backoff(0, 5.0, options, rng) == 5.0 and backoff(0, 500.0, options, rng) == 8
    assert parse_retry_after("7") == 7.0 and parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0


# ---- killed for real


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_no_answer_and_asks_for_none_twice(root, tmp_path, monkeypatch):
    """kill -9 while requests are in flight; answers that reached the journal are never asked for again."""
    path = root / "annotations" / "ScanQA_v1.0_train.json"
    rows = json.loads(path.read_text())
    more = [{**rows[0], "question": f"What is left of chair {n}?", "question_id": f"q{n}"} for n in range(30)]
    path.write_text(json.dumps(rows + more))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    journal = tmp_path / "out.jsonl.journal.jsonl"
    with Server(gemini_oracle, delay=0.02) as server:
        command = [sys.executable, str(ROOT / "main.py"), "synthesize", "--root", str(root), "--out", str(out)]
        command += ["--teacher", "gemini", "--model", "some-model", "--workers", "3"]
        environment = {**os.environ, "GEMINI_API_KEY": "k", "GOOGLE_GEMINI_BASE_URL": server.url, "no_proxy": "*"}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while not (journal.exists() and journal.read_bytes().count(b"\n") >= 10):
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
        finally:
            run.kill()
            run.wait()
        assert not out.exists()
        stored = journal.read_bytes().count(b"\n")
        time.sleep(0.1)  # requests that were in flight reach the server
        asked_before = len(server.requests)
        monkeypatch.setenv("GEMINI_API_KEY", "k")
        teacher = GeminiTeacher("some-model", base_url=server.url, retries=FAST)
        report = synthesize_with(teacher, root, out, workers=3)
        assert len(server.requests) - asked_before == report["new_requests"] == report["requests"] - stored
        teacher = GeminiTeacher("some-model", base_url=server.url, retries=FAST)
        synthesize_with(teacher, root, whole, workers=1)
    assert out.read_bytes() == whole.read_bytes()
