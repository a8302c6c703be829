"""Batches, through the clients, against servers on this machine that speak the two interfaces."""

import json
import logging
from dataclasses import replace

import pytest

from threedr1.datasets.synthesis import Operation, synthesize, synthesize_with
from threedr1.datasets.synthesis.budget import Budget
from threedr1.datasets.synthesis.journal import Journal
from threedr1.datasets.synthesis.prices import BATCH_SHARE, Price, find_price
from threedr1.main import main

from .batch_server import BatchServer, gemini_prompt, make_batches
from .teacher_server import FAST, KEY, KINDS, Server, add_questions, is_check, make_teacher, moody, prompt_of

PRICE = Price(1e6, 1e6, "test", BATCH_SHARE)  # a dollar a token, and half of that in batches


def files(out) -> list[list[bytes]]:
    return [sorted(out.with_name(out.name + ending).read_bytes().splitlines()) for ending in ("", ".rejects.jsonl")]


@pytest.fixture
def calm(root, tmp_path, monkeypatch):
    """What an undisturbed run without batches writes, by the kind of teacher."""
    add_questions(root, 20)

    def write(kind: str):
        out = tmp_path / f"calm-{kind}.jsonl"
        with Server(moody(kind)) as server:
            return out, synthesize_with(make_teacher(kind, server.url, monkeypatch), root, out)

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [5000, 7])
def test_batches_write_what_single_requests_write_and_cost_half(kind, size, root, tmp_path, calm, monkeypatch):
    calm_out, expected = calm(kind)
    out = tmp_path / "out.jsonl"
    with BatchServer(kind) as server:
        report = synthesize_with(make_batches(kind, server.url, monkeypatch, size), root, out, budget=Budget(PRICE))
    assert files(out) == files(calm_out)
    for name in ("kept", "rejected", "requests", "input_tokens", "output_tokens"):
        assert report[name] == expected[name], name
    assert report["kept"] > 0 and report["failed"] == report["unasked"] == 0
    assert set(server.answered.values()) == {1} and server.answered.total() == report["requests"]
    assert report["new_requests"] == report["requests"]
    assert report["cost"] == pytest.approx(0.5 * (report["input_tokens"] + report["output_tokens"]))
    assert report["batches"] == {"submitted": len(server.batches), "failures": {}}
    sizes = [len(batch["rows"]) for batch in server.batches.values()]
    assert max(sizes) <= size and (len(sizes) == 2 if size == 5000 else len(sizes) > 4)
    with BatchServer(kind) as server:  # all is there, so that a second run looks at nothing
        again = synthesize_with(make_batches(kind, server.url, monkeypatch), root, out, budget=Budget(PRICE))
        assert server.paths == [] and again["new_requests"] == 0 and again["cost"] == report["cost"]
    with Server(moody(kind)) as server:  # nor does one without batches, and what was paid stays so
        teacher = make_teacher(kind, server.url, monkeypatch)
        assert synthesize_with(teacher, root, out, budget=Budget(PRICE))["cost"] == report["cost"]
        assert server.requests == []
    assert not list(tmp_path.glob(".*batch-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_ask_for_what_single_requests_ask_for(kind, root, tmp_path, monkeypatch):
    with Server(moody(kind)) as single:
        synthesize_with(make_teacher(kind, single.url, monkeypatch), root, tmp_path / "single.jsonl")
    with BatchServer(kind) as server:
        synthesize_with(make_batches(kind, server.url, monkeypatch), root, tmp_path / "out.jsonl")

    def plain(body: dict) -> str:
        text = json.dumps(
            {**body, "contents": [{**row, "role": "user"} for row in body.get("contents", [])]}, sort_keys=True
        )
        return text.replace("thinking_budget", "thinkingBudget")  # the spelling differs by release

    assert sorted(map(plain, server.bodies)) == sorted(plain(sent["body"]) for sent in single.requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plan", "reason", "paid_twice"),
    [
        ("expired", "batch_expired", 0),
        ("failed", "batch_failed", 0),
        ("cancelled", "batch_cancelled", 0),
        ("half expired", "batch_expired", 0),
        ("gone", "batch_lost", 0),
        ("missing", "batch_row_missing", 1),
        ("malformed", "batch_row_malformed", 1),
        ("error", "batch_row_error", 1),
        ("missing once", "", 0),
        ("malformed once", "", 0),
    ],
)
def test_what_fails_in_a_batch_has_a_reason_and_is_asked_again(
    kind, plan, reason, paid_twice, root, tmp_path, calm, monkeypatch, caplog
):
    calm_out, _ = calm(kind)
    out = tmp_path / "out.jsonl"
    with BatchServer(kind, plan={0: plan, 2: plan}) as server:
        report = synthesize_with(make_batches(kind, server.url, monkeypatch), root, out)
    assert files(out) == files(calm_out) and report["failed"] == 0
    assert set(report["batches"]["failures"]) == ({reason} if reason else set())
    # the server answered these and did not hand the answer over; every other answer was asked for once
    assert sum(count - 1 for count in server.answered.values()) <= 2 * paid_twice
    assert not reason or reason in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_always_fails_is_given_up_and_counted(kind, root, tmp_path, calm, monkeypatch):
    """The reversed rows put the last request first, and a batch of one fails for ever."""
    calm(kind)
    out = tmp_path / "out.jsonl"
    with BatchServer(kind, plan=dict.fromkeys(range(99), "error")) as server:
        report = synthesize_with(make_batches(kind, server.url, monkeypatch), root, out)
    assert report["failed"] >= 1 and report["unasked"] == 0 and report["kept"] > 0
    assert set(report["batches"]["failures"]) == {"batch_row_error"}
    with BatchServer(kind) as server:
        assert synthesize_with(make_batches(kind, server.url, monkeypatch), root, out)["failed"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_all_come_to_nothing_end_the_run(kind, root, tmp_path, monkeypatch):
    plan = dict.fromkeys(range(99), "failed")
    with (
        BatchServer(kind, plan=plan, message=f"bad {KEY}") as server,
        pytest.raises(ValueError, match="3 batches in a row came to nothing.*batch_failed") as caught,
    ):
        synthesize_with(make_batches(kind, server.url, monkeypatch), root, tmp_path / "out.jsonl")
    assert len(server.batches) == 3 and KEY not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "refused",
    [(429, {"Retry-After": "0"}), (503, {}), (0, {}), (500, "started"), (0, "started")],
    ids=["429", "503", "dropped", "500 after the start", "dropped after the start"],
)
def test_a_batch_whose_start_failed_is_looked_for_before_it_is_started_again(
    kind, refused, root, tmp_path, calm, monkeypatch
):
    calm_out, expected = calm(kind)
    out = tmp_path / "out.jsonl"
    with BatchServer(kind, refuse={0: refused, 3: refused}) as server:
        report = synthesize_with(make_batches(kind, server.url, monkeypatch, 9), root, out)
    assert files(out) == files(calm_out)
    assert set(server.answered.values()) == {1} and server.answered.total() == expected["requests"]
    assert report["batches"]["submitted"] == len(server.batches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flaky", [3, 5])
def test_uploads_looks_and_downloads_that_fail_are_tried_again(kind, flaky, root, tmp_path, calm, monkeypatch):
    calm_out, expected = calm(kind)
    out = tmp_path / "out.jsonl"
    with BatchServer(kind, flaky=flaky) as server:
        batches = make_batches(kind, server.url, monkeypatch, 20, retries=replace(FAST, attempts=20))
        synthesize_with(batches, root, out)
    assert files(out) == files(calm_out)
    assert set(server.answered.values()) == {1} and server.answered.total() == expected["requests"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_one_sentence_and_leaves_no_batch_open(kind, root, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with (
        BatchServer(kind, refuse={0: (400, {})}, message=f"bad {KEY}") as server,
        pytest.raises(ValueError, match="status 400") as caught,
    ):
        synthesize_with(make_batches(kind, server.url, monkeypatch), root, out)
    assert KEY not in str(caught.value)
    with Journal(tmp_path / "out.jsonl.journal.jsonl") as journal:
        assert journal.open_batches == {}


def test_a_full_queue_waits_for_batches_of_our_own(root, tmp_path, calm, monkeypatch):
    calm_out, _ = calm("openai")
    out = tmp_path / "out.jsonl"
    plan = {1: "queue full", 2: "queue full"}
    with BatchServer("openai", plan=plan) as server:
        report = synthesize_with(make_batches("openai", server.url, monkeypatch, 9), root, out)
    assert files(out) == files(calm_out)
    assert set(server.answered.values()) == {1}
    assert report["batches"]["failures"].get("batch_failed", 0) <= 9  # the last of them had nothing to wait for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_budget_holds_and_checks_are_paid_before_further_thoughts(kind, share, root, tmp_path, calm, monkeypatch):
    _, expected = calm(kind)
    out = tmp_path / "out.jsonl"
    whole = 9 * expected["requests"]  # dollars: 18 tokens a request at half a dollar
    cap = share * whole
    with BatchServer(kind) as server:
        batches = make_batches(kind, server.url, monkeypatch, 3)
        estimator = exact_estimator()
        budget = Budget(PRICE, max_cost=cap, batched=True)
        report = synthesize_with(batches, root, out, budget=budget, estimator=estimator)
    assert report["cost"] <= cap and report["unasked"] > 0 and report["failed"] == 0
    checks = sum(is_check(gemini_prompt(body) if kind == "gemini" else prompt_of(body)) for body in server.bodies)
    assert checks >= report["kept"] > 0
    with BatchServer(kind) as server:
        last = synthesize_with(
            make_batches(kind, server.url, monkeypatch), root, out, budget=Budget(PRICE, batched=True)
        )
    assert last["unasked"] == 0 and last["kept"] == expected["kept"]
    assert last["cost"] == pytest.approx(whole)


def exact_estimator():
    """Knows what the servers here count: 11 and 7 tokens."""
    from threedr1.datasets.synthesis.limits import Estimator, Usage

    class Exact(Estimator):
        def estimate_many(self, requests: int, characters: int, *, checking: bool) -> Usage:
            return Usage(11.0 * requests, 7.0 * requests)

    return Exact()


@pytest.mark.parametrize("kind", KINDS)
def test_single_requests_do_not_ask_for_what_a_batch_is_asked_for(kind, root, tmp_path, monkeypatch):
    out, looks = tmp_path / "out.jsonl", 0

    class Stop(Exception):
        pass

    with BatchServer(kind, looks=None) as server:
        batches = make_batches(kind, server.url, monkeypatch)
        real = batches.service.look

        async def look(batch_id: str):
            nonlocal looks
            looks += 1
            if looks == 3:
                raise Stop
            return await real(batch_id)

        batches.service.look = look
        with pytest.raises(Stop):
            synthesize_with(batches, root, out)
    with Server(moody(kind)) as single:
        with pytest.raises(ValueError, match="1 batches of this teacher are under way.*--batch.*--cancel-batches"):
            synthesize_with(make_teacher(kind, single.url, monkeypatch), root, out)
        assert single.requests == []


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_batches_keep_what_they_answered(kind, root, tmp_path, calm, monkeypatch, capsys):
    calm_out, expected = calm(kind)
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal.jsonl"
    with BatchServer(kind, looks=None) as server:
        for name, value in (("GEMINI_API_KEY", KEY), ("GOOGLE_GEMINI_BASE_URL", server.url), ("OPENAI_API_KEY", KEY)):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        batches = make_batches(kind, server.url, monkeypatch, 9)

        async def interrupt(batch_id: str):
            raise KeyboardInterrupt

        batches.service.look = interrupt
        with pytest.raises(KeyboardInterrupt):
            synthesize_with(batches, root, out)
        started = len(server.batches)
        assert started > 1 and not out.exists()
        command = ["synthesize", "--root", str(root), "--out", str(out), "--teacher", kind, "--model", "some-model"]
        command += ["--thinking-budget", "128", "--poll-interval", "0.02"]
        assert main([*command, "--cancel-batches"]) == 0
        shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert int(shown["cancelled"]) == started and int(shown["received"]) == server.answered.total() > 0
        assert sum("cancel" in path for path in server.paths) == started
        with Journal(journal) as kept:
            assert kept.open_batches == {} and len(kept) == server.answered.total()
        server.looks = 1
        assert main([*command, "--batch", "--samples", "0"]) == 0
        assert set(server.answered.values()) == {1} and server.answered.total() == expected["requests"]
    assert [json.loads(row) | {"teacher": ""} for row in files(out)[0]] == [
        json.loads(row) | {"teacher": ""} for row in files(calm_out)[0]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_is_in_no_log_error_or_file(kind, root, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    out = tmp_path / "out.jsonl"
    plan = {0: "failed", 1: "error"}
    with BatchServer(kind, plan=plan, refuse={2: (500, {"X-Echo": KEY})}, message=f"bad {KEY}") as server:
        synthesize_with(make_batches(kind, server.url, monkeypatch), root, out)
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err and "batch_failed" in caplog.text
    assert KEY not in "".join(record.getMessage() for record in caplog.records if "threedr1" in record.name)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.glob("out.jsonl*"))
    assert all(KEY.encode() not in content for content in server.files.values())


def test_a_dry_run_of_batches_costs_half(root, tmp_path, monkeypatch):
    for teacher in ("gemini", "openai"):
        single, batch = (
            synthesize(root, tmp_path / "o.jsonl", teacher=teacher, operation=Operation(dry_run=True, batch=batched))
            for batched in (False, True)
        )
        assert batch["requests"] == single["requests"] and batch["price"]["batch_share"] == 0.5
        price = find_price({"gemini": "gemini-2.5-pro", "openai": "gpt-4.1"}[teacher])
        exact = price.cost(batch["input_tokens"], batch["output_tokens"])
        assert single["cost"] == pytest.approx(exact, abs=0.006) and batch["cost"] == pytest.approx(
            exact / 2, abs=0.006
        )
    assert find_price("x", 1.0, 2.0).batch_share == 1.0  # a price that is given holds as it is


def test_what_cannot_be_batched_is_one_sentence(root, tmp_path):
    for operation in (Operation(batch=True), Operation(cancel_batches=True), Operation(batch=True, dry_run=True)):
        with pytest.raises(ValueError, match="rule teacher has no batches"):
            synthesize(root, tmp_path / "o.jsonl", operation=operation)
    for settings in ({"batch_size": 0}, {"batch_size": 60_000}):
        with pytest.raises(ValueError, match="1 to 50000 requests"):
            Operation(**settings)
    with pytest.raises(ValueError, match="--poll-interval"):
        Operation(poll_interval=0.001)
    assert list(tmp_path.glob("o.jsonl*")) == []


def test_a_server_without_batches_is_one_sentence(root, tmp_path, monkeypatch):
    with Server(lambda number, body: (404, {}, {"detail": "Not Found"})) as server:
        batches = make_batches("openai", server.url, monkeypatch)

        async def upload(path):
            return "file-1"

        batches.service.upload = upload
        with pytest.raises(ValueError, match="no batch interface.*leave --batch out"):
            synthesize_with(batches, root, tmp_path / "o.jsonl")
