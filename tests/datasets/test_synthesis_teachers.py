"""Network teachers: through the real client libraries, against servers on this machine that misbehave by script."""

import json
import logging
import random
import sys
import time
from dataclasses import replace

import pytest

from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis import build_teacher, synthesize, synthesize_with
from threedr1.datasets.synthesis.gemini_batches import GeminiBatches
from threedr1.datasets.synthesis.gemini_teacher import GeminiTeacher, retry_delay
from threedr1.datasets.synthesis.openai_teacher import OpenAITeacher
from threedr1.datasets.synthesis.teacher import (
    Reply,
    RetryOptions,
    TeacherUnavailable,
    backoff,
    parse_retry_after,
)
from threedr1.utils.text import parse_response

from .teacher_server import (
    FAST,
    KEY,
    KINDS,
    MALFORMED,
    REQUEST,
    Server,
    add_questions,
    ask,
    gemini_body,
    is_check,
    make_teacher,
    openai_body,
    oracle,
    prompt_of,
)


@pytest.mark.parametrize("kind", KINDS)
def test_network_teachers_send_the_prompt_and_read_text_and_tokens(kind, monkeypatch):
    with Server(lambda number, body: (200, {}, KINDS[kind]("hello"))) as server:
        teacher = make_teacher(kind, server.url, monkeypatch)
        assert ask(teacher, REQUEST) == Reply("hello", "", 11, 7)
    (sent,) = server.requests
    if kind == "gemini":
        assert sent["path"].endswith("/models/some-model:generateContent")
        assert sent["body"]["contents"][0]["parts"] == [{"text": "the prompt"}]
        assert sent["body"]["generationConfig"] == {"thinkingConfig": {"thinkingBudget": 128}}
    else:
        assert sent["path"] == "/v1/chat/completions"
        assert sent["body"] == {"model": "some-model", "messages": [{"role": "user", "content": "the prompt"}]}
        assert sent["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in teacher.identity and "some-model" in teacher.identity


def test_gemini_is_sent_the_same_by_itself_and_in_a_batch(monkeypatch):
    requests, rows = [REQUEST, replace(REQUEST, think="thoughts")], []
    with Server(lambda number, body: (200, {}, gemini_body("hello"))) as server:
        for request in requests:
            teacher = make_teacher("gemini", server.url, monkeypatch, timeout=2.5)
            rows.append(json.loads(GeminiBatches(teacher).row("key", request))["request"])
            ask(teacher, request)
    assert [sent["body"] for sent in server.requests] == rows
    thinking = {"thinkingConfig": {"thinkingBudget": 128}}
    assert [row["generationConfig"] for row in rows] == [thinking, {**thinking, "temperature": 0.0}]
    headers = {name.lower(): value for name, value in server.requests[0]["headers"].items()}
    assert headers["x-server-timeout"] == "3"


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
        (200, {}, b""),
        (200, {"Content-Encoding": "gzip"}, b"not gzip"),
        (200, {}, {"candidates": "many", "choices": "many"}),
    ],
    ids=["429", "503", "500 html", "dropped", "truncated", "broken json", "no body", "not gzip", "other fields"],
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
        assert len(server.requests) == 1 and KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}, "blocked_prompt_safety"),
        ("gemini", gemini_body("", finishReason="SAFETY", content=None), "blocked_safety"),
        ("gemini", gemini_body("half", finishReason="MAX_TOKENS"), "truncated"),
        ("gemini", {"candidates": [], "usageMetadata": {"promptTokenCount": 11}}, "empty"),
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


def test_the_engine_over_http_keeps_what_agrees_with_the_benchmark(root, tmp_path, monkeypatch):
    with Server(oracle("gemini"), delay=0.02) as server:
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
    assert KEY.encode() not in written


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


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_drip_is_cut_off_and_asked_again(kind, monkeypatch):
    """Every byte comes in time, the whole reply would take a minute."""
    with Server(lambda number, body: (200, {}, KINDS[kind]("x" * 200)), drip=0.1) as server:
        teacher = make_teacher(kind, server.url, monkeypatch, timeout=0.5)
        start = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="no whole reply within 0.5 s"):
            ask(teacher)
        assert time.monotonic() - start < 5 and len(server.requests) == FAST.attempts


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_says_nothing_is_given_up(kind, monkeypatch):
    with Server(lambda number, body: (200, {}, KINDS[kind]("late")), delay=2.0) as server:
        teacher = make_teacher(kind, server.url, monkeypatch, timeout=0.3, retries=RetryOptions(attempts=1))
        with pytest.raises(TeacherUnavailable):
            ask(teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_the_wait_that_a_server_names_holds_for_every_request(kind, root, tmp_path, monkeypatch):
    def script(number: int, body: dict):
        if number == 0:
            return 429, {"Retry-After": "1"}, {"error": {"code": 429, "message": "slow", "status": "X"}}
        return oracle(kind)(number, body)

    with Server(script) as server:
        teacher = make_teacher(kind, server.url, monkeypatch)
        report = synthesize_with(teacher, root, tmp_path / "out.jsonl", workers=1)
    assert report["failed"] == 0 and report["kept"] > 0
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 1.0


def test_gemini_names_its_wait_in_the_body_too(monkeypatch):
    info = [{"@type": "x/QuotaFailure"}, {"@type": "x/RetryInfo", "retryDelay": "0.5s"}]
    body = {"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": info}}
    assert retry_delay(body) == 0.5
    assert retry_delay({}) is None and retry_delay(None) is None and retry_delay({"error": {"details": []}}) is None
    with Server(lambda number, sent: (429, {}, body) if number == 0 else (200, {}, gemini_body("x"))) as server:
        ask(make_teacher("gemini", server.url, monkeypatch))
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_through_all_kinds_of_trouble_ends_as_an_undisturbed_one(kind, root, tmp_path, monkeypatch):
    """The trouble hits the first try of a prompt, by turns; malformed and blocked replies stay as they are."""
    add_questions(root, 24)
    seen: set[str] = set()
    error = {"error": {"code": 500, "message": f"broken {KEY}", "status": "X"}}
    blocked = {
        "gemini": {"promptFeedback": {"blockReason": "SAFETY"}},
        "openai": openai_body("", finish_reason="content_filter"),
    }[kind]
    trouble = [(429, {"Retry-After": "0"}, error), (500, {}, error), (None, {}, b""), (503, {}, b"<html>")]
    trouble += [(200, {"Content-Length": "4000"}, b'{"cand'), (200, {}, b"{"), (502, {}, b"")]

    def calm(number: int, body: dict):
        prompt = prompt_of(body)
        if "chair 3?" in prompt and not is_check(prompt):
            return 200, {}, blocked
        if "chair 5?" in prompt and not is_check(prompt):
            return 200, {}, KINDS[kind](MALFORMED)
        return oracle(kind)(number, body)

    def script(number: int, body: dict):
        prompt = prompt_of(body)
        if prompt in seen:
            return calm(number, body)
        seen.add(prompt)
        return trouble[len(seen) % len(trouble)]

    outputs = []
    for name, answers in (("calm", calm), ("troubled", script)):
        with Server(answers) as server:
            teacher = make_teacher(kind, server.url, monkeypatch)
            report = synthesize_with(teacher, root, tmp_path / f"{name}.jsonl", workers=8)
        assert report["failed"] == report["unasked"] == 0
        assert report["rejected"]["format"] == 1
        assert sum(count for reason, count in report["rejected"].items() if reason.startswith("blocked")) == 1
        outputs.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert outputs[0] == outputs[1] and outputs[0]


@pytest.mark.parametrize("kind", KINDS)
def test_connections_are_kept(kind, root, tmp_path, monkeypatch):
    add_questions(root, 120)
    with Server(oracle(kind), delay=0.2) as server:
        teacher = make_teacher(kind, server.url, monkeypatch)
        report = synthesize_with(teacher, root, tmp_path / "out.jsonl", workers=32)
    assert report["requests"] > 200 and 20 < server.most_in_flight <= 32
    # Gemini's first requests and its checks have connections of their own
    assert server.connections <= (64 if kind == "gemini" else 32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_is_in_no_log_error_or_file(kind, root, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    error = {"error": {"code": 500, "message": f"bad {KEY}", "status": "X"}}
    with Server(lambda number, body: (500, {"X-Echo": KEY}, error)) as server:
        report = synthesize_with(make_teacher(kind, server.url, monkeypatch), root, tmp_path / "out.jsonl")
    assert report["failed"] > 0
    shown = capfd.readouterr()
    assert "busy (status 500)" in caplog.text and "no answer" in caplog.text
    assert KEY not in shown.out + shown.err
    assert KEY not in "".join(record.getMessage() for record in caplog.records if "threedr1" in record.name)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.glob("out.jsonl*"))


def test_keys_and_addresses_that_cannot_be_used_are_one_sentence_without_them(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret key")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as caught:
        OpenAITeacher()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    for address in ("localhost:8000", "ftp://host", "http://host:port/v1", "http://"):
        with pytest.raises(ValueError, match="OPENAI_BASE_URL"):
            OpenAITeacher("m", base_url=address)
    teacher = OpenAITeacher("m", base_url="http://user:pass@127.0.0.1:1/v1?token=t", retries=RetryOptions(attempts=1))
    with pytest.raises(TeacherUnavailable, match="http://127.0.0.1:1/v1 failed") as caught:
        ask(teacher)
    assert "pass" not in str(caught.value) and "token" not in str(caught.value)


def test_backoff_grows_is_bounded_and_honours_the_server():
    options, rng = RetryOptions(first_delay=1, longest_delay=8), random.Random(0)
    for attempt, ceiling in enumerate((1, 2, 4, 8, 8, 8)):
        assert ceiling / 2 <= backoff(attempt, None, options, rng) <= ceiling
    for asked, bound in ((20.0, 20.0), (500.0, 500.0), (5000.0, 600.0)):
        assert bound <= backoff(0, asked, options, rng) <= 1.1 * bound
    assert parse_retry_after("7") == 7.0 and parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0
