"""The engine in a process of its own: killed at random moments, and stopped by Ctrl-C."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis import InputOptions, synthesize_with
from threedr1.datasets.synthesis.asking import build_asker
from threedr1.datasets.synthesis.journal import request_key
from threedr1.datasets.synthesis.openai_teacher import identity_of
from threedr1.datasets.synthesis.prompts import check_prompt
from threedr1.datasets.synthesis.sources import load_questions
from threedr1.datasets.synthesis.teacher import Request

from .batch_server import BatchServer, make_batches
from .teacher_server import GOOD, KEY, KINDS, THINK, Server, add_questions, make_teacher, moody, prompt_of

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """`main.py synthesize` with a network teacher, as a process."""

    def __init__(self, root: Path, out: Path, url: str, *options: str, kind: str = "openai"):
        command = [sys.executable, str(ROOT / "main.py"), "synthesize", "--root", str(root), "--out", str(out)]
        command += ["--teacher", kind, "--model", "some-model", *options]
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{url}/v1", "no_proxy": "*"}
        environment |= {"GEMINI_API_KEY": KEY, "GOOGLE_GEMINI_BASE_URL": url}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # what a shell runs in the background ignores Ctrl-C, and so would what it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, condition) -> bool:
        """Until a condition holds or the process has ended; whether the condition held first."""
        deadline = time.monotonic() + 180
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return False

    def end(self, number: int) -> str:
        """Send a signal; what the process wrote to the terminal."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1]


def prompts_by_key(root: Path) -> dict[str, str]:
    """Every prompt that a run may send, by its key in the journal."""
    store = SceneStore(root / "prepared")
    questions, _ = load_questions(root, store, split="train", seed=0, limit=0)
    ask_about = build_asker(root, store, questions, split="train", inputs=InputOptions())
    prompts = {}
    for question in questions:
        first = ask_about(question)
        check = Request(question, check_prompt(question, THINK), THINK)
        for request in (first, check):
            prompts[request_key(identity_of("some-model"), request)] = request.prompt
    return prompts


def journal_keys(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [json.loads(line)["key"] for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def kill_and_compare(root: Path, folder: Path, monkeypatch, *, kills: int, workers: int, delay: float) -> Counter:
    """Run with `kills` kills at random moments; returns how often each prompt was sent."""
    assert GOOD  # the replies whose thought the checks repeat
    out, journal, rng = folder / "out.jsonl", folder / "out.jsonl.journal.jsonl", random.Random(7)
    prompts = prompts_by_key(root)
    with Server(moody("openai"), delay=delay) as server:
        calm = make_teacher("openai", server.url, monkeypatch)
        whole = synthesize_with(calm, root, folder / "whole.jsonl", workers=workers)
        asked = Counter(prompt_of(sent["body"]) for sent in server.requests)
        assert set(asked.values()) == {1} and len(asked) == whole["requests"]
        server.requests.clear()
        for number in range(kills):
            received = journal_keys(journal)
            before = len(server.requests)
            goal = whole["requests"] * (number + 1) // (kills + 2) - len(received)
            run = Run(root, out, server.url, "--workers", str(workers))
            assert run.wait_for(lambda b=before, g=goal: len(server.requests) - b >= max(g, 1)), run.end(0)
            time.sleep(rng.uniform(0, 2 * delay))
            run.end(signal.SIGKILL)
            time.sleep(4 * delay)  # requests that were in flight reach the server
            assert not out.exists()
            sent = [prompt_of(row["body"]) for row in server.requests[before:]]
            assert not {prompts[key] for key in received} & set(sent)
        received, before = journal_keys(journal), len(server.requests)
        report = synthesize_with(make_teacher("openai", server.url, monkeypatch), root, out, workers=workers)
        sent = [prompt_of(row["body"]) for row in server.requests[before:]]
        assert not {prompts[key] for key in received} & set(sent)
        assert report["new_requests"] == len(sent) and report["requests"] == whole["requests"]
    for ending in ("", ".rejects.jsonl"):
        first, second = (
            sorted((folder / f"{name}.jsonl{ending}").read_bytes().splitlines()) for name in ("out", "whole")
        )
        assert first == second
    assert report["rejected"] == whole["rejected"] and report["kept"] == whole["kept"] > 0
    keys = journal_keys(journal)
    assert len(keys) == len(set(keys)) == whole["requests"]  # no answer was received twice
    return Counter(prompt_of(row["body"]) for row in server.requests)


def test_killed_while_asking_it_loses_no_answer_and_asks_for_none_twice(root, tmp_path, monkeypatch):
    add_questions(root, 150)
    counts = kill_and_compare(root, tmp_path, monkeypatch, kills=2, workers=8, delay=0.02)
    # only what was in flight at a kill was sent again
    assert sum(counts.values()) - len(counts) <= 2 * 8


@pytest.mark.slow
def test_thirty_kills_over_two_thousand_items(root, tmp_path, monkeypatch):
    add_questions(root, 2000)
    counts = kill_and_compare(root, tmp_path, monkeypatch, kills=30, workers=16, delay=0.02)
    assert sum(counts.values()) - len(counts) <= 30 * 16


def test_ctrl_c_stops_within_a_second_and_keeps_what_was_received(root, tmp_path):
    add_questions(root, 100)
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal.jsonl"
    answers = moody("openai")

    def script(number: int, body: dict):
        if number >= 40:
            time.sleep(30)  # as a model that thinks for long
        return answers(number, body)

    with Server(script) as server:
        run = Run(root, out, server.url, "--workers", "16")
        assert run.wait_for(lambda: len(server.requests) >= 56 and len(journal_keys(journal)) >= 40)
        start = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        said = ""
        while "replies are kept" not in said:
            line = run.process.stderr.readline()
            assert line, said
            said += line
        stopped = time.monotonic() - start
        said += run.process.communicate(timeout=60)[1]
        ended = time.monotonic() - start
    # what is left after the message is Python that takes its modules down
    assert stopped < 1.0 and ended < 5.0, (stopped, ended)
    assert run.process.returncode == 130 and "40 replies are kept" in said and "Traceback" not in said
    assert len(journal_keys(journal)) == 40 and not out.exists()


BATCHES = ("--batch", "--batch-size", "9", "--poll-interval", "0.05", "--thinking-budget", "128")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_around_a_batch_it_pays_for_no_answer_twice(kind, kills, root, tmp_path, monkeypatch):
    """Kills after the provider started a batch and before it said so, while batches work, and while replies come."""
    add_questions(root, 40)
    out, whole_out, rng = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", random.Random(3)
    with BatchServer(kind) as server:
        whole = synthesize_with(make_batches(kind, server.url, monkeypatch), root, whole_out)
    with BatchServer(kind, looks=None, pause=1.0) as server:
        for _ in range(kills):  # the id never arrives
            run, before = Run(root, out, server.url, *BATCHES, kind=kind), len(server.batches)
            assert run.wait_for(lambda b=before: len(server.batches) > b), run.end(0)
            run.end(signal.SIGKILL)
            assert "id" not in json.loads((tmp_path / "out.jsonl.journal.jsonl").read_bytes().splitlines()[-1])
        server.pause = 0.0
        run = Run(root, out, server.url, *BATCHES, kind=kind)  # all first requests are in batches, which work on
        assert run.wait_for(lambda: len(server.keys) >= whole["questions"]), run.end(0)
        run.end(signal.SIGKILL)
        assert len(server.keys) == len(set(server.keys)) == whole["questions"] and not out.exists()
        server.looks = 12
        for _ in range(kills):
            run, before = Run(root, out, server.url, *BATCHES, kind=kind), len(server.paths)
            if not run.wait_for(lambda b=before: len(server.paths) > b):
                break
            time.sleep(rng.uniform(0.0, 0.3))
            run.end(signal.SIGKILL)
        server.looks = 1
        report = synthesize_with(make_batches(kind, server.url, monkeypatch, 9), root, out)
    assert set(server.answered.values()) == {1} and server.answered.total() == whole["requests"]
    assert len(server.keys) == len(set(server.keys)) == whole["requests"]
    for ending in ("", ".rejects.jsonl"):
        first, second = (path.with_name(path.name + ending).read_bytes() for path in (out, whole_out))
        assert first == second
    assert report["kept"] == whole["kept"] > 0 and report["failed"] == 0
    assert not list(tmp_path.glob(".*batch-*"))


def test_ctrl_c_leaves_batches_at_work_and_says_how_to_come_back(root, tmp_path):
    out = tmp_path / "out.jsonl"
    with BatchServer("openai", looks=None) as server:
        run = Run(root, out, server.url, *BATCHES[:3], "--poll-interval", "60")
        assert run.wait_for(lambda: len(server.paths) >= 2 and server.batches)
        time.sleep(0.5)
        start = time.monotonic()
        said = run.end(signal.SIGINT)
    assert time.monotonic() - start < 5.0
    assert run.process.returncode == 130 and "Traceback" not in said
    assert "1 batches go on at the provider" in said and "--cancel-batches" in said
    assert not any("cancel" in path for path in server.paths) and KEY not in said
