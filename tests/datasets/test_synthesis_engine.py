"""The Scene-30K engine: a journal that survives, runs that go on, budgets that hold, estimates that ask nothing."""

import asyncio
import json
import os
import threading
from dataclasses import replace

import pytest

from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.synthesis import FilterOptions, Operation, synthesize, synthesize_with
from threedr1.datasets.synthesis.budget import Budget
from threedr1.datasets.synthesis.filters import near_duplicates
from threedr1.datasets.synthesis.journal import Journal
from threedr1.datasets.synthesis.limits import Estimator
from threedr1.datasets.synthesis.outcomes import Outcome, OutcomeSpool
from threedr1.datasets.synthesis.prices import Price
from threedr1.datasets.synthesis.rule_teacher import RuleTeacher
from threedr1.datasets.synthesis.teacher import Reply, Request, TeacherUnavailable
from threedr1.main import main

from .teacher_server import THINK, add_questions, question


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


@pytest.mark.parametrize(
    ("said", "reason"),
    [("It is nothing.", "gold_"), ("{gold} <box>9, 9, 9, 1, 1, 1</box>", "box_unknown")],
)
def test_what_a_free_filter_rejects_is_not_asked_again(root, tmp_path, said, reason):
    class Wrong(CountingTeacher):
        async def ask(self, request: Request) -> Reply:
            reply = await super().ask(request)
            think, _, answer = reply.text.partition("<answer>")
            gold = answer.removesuffix("</answer>")
            return replace(reply, text=f"{think}<answer>{said.format(gold=gold)}</answer>")

    teacher = Wrong()
    report = synthesize_with(teacher, root, tmp_path / "out.jsonl")
    assert all(code.startswith(reason) for code in report["rejected"]) and report["kept"] == 0
    assert len(teacher.prompts) == report["requests"] == report["questions"]
    skipping = FilterOptions(skipped=("gold", "box_unknown"))
    again = synthesize_with(Wrong(), root, tmp_path / "out.jsonl", options=skipping)
    assert again["requests"] == 2 * again["questions"]


def add(journal: Journal, key: str, reply: Reply) -> None:
    asyncio.run(journal.add(key, reply))


def test_the_journal_drops_a_torn_row_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        add(journal, "a", Reply("one", input_tokens=1))
        add(journal, "b", Reply("two", "truncated"))
        with pytest.raises(ValueError, match="Another run"):
            Journal(path)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n"), -7):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            assert journal.get("a") == Reply("one", input_tokens=1) and journal.get("b") is None
            add(journal, "b", Reply("two", "truncated"))
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


def test_many_waiting_rows_share_a_sync_and_none_returns_before_its_own(tmp_path, monkeypatch):
    synced, lengths, real = [], [], os.fsync
    path = tmp_path / "j.jsonl"

    def fsync(file: int) -> None:
        lengths.append(path.stat().st_size)
        real(file)
        synced.append(lengths[-1])

    async def fill(journal: Journal) -> None:
        async def one(number: int) -> None:
            await journal.add(f"{number:032x}", Reply(f"text {number}"))
            row = f'"text {number}"'.encode()
            assert path.read_bytes().index(row) + len(row) <= synced[-1]

        await asyncio.gather(*(one(number) for number in range(200)))

    with Journal(path) as journal:
        monkeypatch.setattr("threedr1.datasets.synthesis.journal.os.fsync", fsync)
        asyncio.run(fill(journal))
    assert path.read_bytes().count(b"\n") == 200 and 1 <= len(synced) <= 10


def test_a_wait_for_a_sync_that_is_cancelled_leaves_the_others_with_theirs(tmp_path, monkeypatch):
    begun, released, lengths, real = threading.Event(), threading.Event(), [], os.fsync
    path = tmp_path / "j.jsonl"

    def fsync(file: int) -> None:
        begun.set()
        assert released.wait(10)
        lengths.append(path.stat().st_size)
        real(file)

    async def fill(journal: Journal) -> list[BaseException | None]:
        waits = [asyncio.create_task(journal.add(f"{number:032x}", Reply(f"text {number}"))) for number in range(4)]
        assert await asyncio.to_thread(begun.wait, 10)
        waits[0].cancel()  # the one whose sync is under way
        waits[2].cancel()
        await asyncio.sleep(0)
        released.set()
        return await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 10)

    with Journal(path) as journal:
        monkeypatch.setattr("threedr1.datasets.synthesis.journal.os.fsync", fsync)
        ends = asyncio.run(fill(journal))
    assert [type(end) for end in ends] == [asyncio.CancelledError, type(None), asyncio.CancelledError, type(None)]
    assert len(lengths) == 2 and lengths[-1] == path.stat().st_size


def test_replies_are_found_again_among_many_and_the_newest_row_of_a_key_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("threedr1.datasets.synthesis.journal.MERGE_EVERY", 7)
    path = tmp_path / "j.jsonl"
    keys = [f"{number * 2654435761 % 2**64:016x}{number:016x}" for number in range(50)]

    async def fill(journal: Journal, text: str) -> None:
        for key in keys:
            await journal.add(key, Reply(text + key, input_tokens=1))

    with Journal(path) as journal:
        asyncio.run(fill(journal, "old"))
        asyncio.run(fill(journal, "new"))
        assert [journal.get(key).text for key in keys] == ["new" + key for key in keys]
    with Journal(path, read_only=True) as journal:
        assert [journal.get(key).text for key in keys] == ["new" + key for key in keys]
        assert journal.get("f" * 32) is None and journal.get(keys[0][:16] + "f" * 16) is None
        assert journal.input_tokens == 100


def test_a_full_disk_ends_the_run_and_leaves_whole_rows(tmp_path, monkeypatch):
    real, path = os.write, tmp_path / "j.jsonl"

    def half(file: int, data: bytes) -> int:
        if b"second" not in data:
            return real(file, data)
        if len(data) > 40:
            return real(file, data[:20])
        raise OSError(28, "No space left on device")

    with Journal(path) as journal:
        add(journal, "a", Reply("first"))
        monkeypatch.setattr("threedr1.datasets.synthesis.journal.os.write", half)
        monkeypatch.setattr("threedr1.datasets.synthesis.journal.orjson.dumps", lambda row: b"second" * 8)
        with pytest.raises(OSError, match="No space"):
            add(journal, "b", Reply("x"))
        monkeypatch.undo()
        add(journal, "c", Reply("third"))
        assert journal.get("b") is None and journal.get("c") == Reply("third")
    assert path.read_bytes().count(b"\n") == 2
    assert b"second" not in path.read_bytes()


# ---- outcomes on the disk


def test_outcomes_come_back_in_order_with_near_duplicates_marked(tmp_path):
    asked = [
        question(question_id=str(number), text=text, object_ids=(target,))
        for number, (text, target) in enumerate(
            [("what is left?", 1), ("what is left ?", 1), ("what is left?", 2), ("bad", 1), ("unasked", 1)]
            + [("where is the lamp?", 1), ("what is left??", 1)]
        )
    ]
    options = FilterOptions()
    with OutcomeSpool(tmp_path) as spool:
        for position in (6, 0, 5, 2, 3, 1):
            spool.put(position, Outcome(asked[position], "format" if position == 3 else "", "t", "The lamp.", "r", 2))
        spool.mark_near_duplicates(asked, options)
        reasons = {outcome.question.question_id: outcome.reason for outcome in spool.all(asked)}
        assert list(reasons) == ["0", "1", "2", "3", "5", "6"]
        kept = [0, 1, 2, 5, 6]
        repeated = near_duplicates([(asked[position], "The lamp.") for position in kept], options)
        assert {kept[number] for number in repeated} == {1, 6}
        assert {int(name) for name, reason in reasons.items() if reason == "near_duplicate"} == {1, 6}
        assert spool.tally.kept == 3 and spool.tally.reasons == {"format": 1, "near_duplicate": 2}
        assert spool.tally.requests == 12
    assert list(tmp_path.iterdir()) == []


# ---- budget and estimate


@pytest.mark.parametrize("caps", [{"max_tokens": 200}, {"max_cost": 0.0014}])
def test_a_budget_stops_before_it_is_exceeded_and_a_raised_one_goes_on(root, tmp_path, caps, caplog):
    """A question takes 10 + 5 tokens, and 3 + 2 for its check: at $2 and $20 a million, $0.000166."""
    estimator, price = Estimator(), Price(2.0, 20.0, "test")
    out, teacher = tmp_path / "out.jsonl", CountingTeacher()
    add_questions(root, 40)
    for _ in range(200):  # what replies are like is known by then
        for think, reply in (("", Reply("", "", 10, 5)), ("t", Reply("", "", 3, 2))):
            estimator.learn(Request(question(), "p" * 500, think), reply)
    report = synthesize_with(teacher, root, out, workers=4, budget=Budget(price, **caps), estimator=estimator)
    assert report["unasked"] > 0 and report["kept"] > 0
    spent = (report["input_tokens"] + report["output_tokens"], report["cost"])
    assert spent[0] <= caps.get("max_tokens", spent[0]) and report["cost"] <= caps.get("max_cost", 1)
    assert "budget" in caplog.text and f"{report['unasked']} questions were not asked" in caplog.text
    rows = out.read_bytes().splitlines()
    assert len(rows) == report["kept"]
    again = CountingTeacher()
    tight = synthesize_with(again, root, out, workers=4, budget=Budget(price, **caps), estimator=estimator)
    assert tight["cost"] <= caps.get("max_cost", 1) and len(again.prompts) <= 2  # a rest may fit one more
    last = CountingTeacher()
    whole = synthesize_with(last, root, out, workers=4, budget=Budget(price))
    assert whole["unasked"] == 0 and not set(last.prompts) & set(teacher.prompts)


def test_a_cap_in_dollars_needs_a_price(root, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match=r"no price for the model 'my-model'.*--input-price and --output-price"):
        synthesize(root, tmp_path / "o.jsonl", teacher="openai", model="my-model", operation=Operation(max_cost=1.0))
    with pytest.raises(ValueError, match="two parts"):
        synthesize(root, tmp_path / "o.jsonl", operation=Operation(input_price=1.0))
    assert list(tmp_path.glob("o.jsonl*")) == []


def test_a_dry_run_needs_no_key_asks_nothing_and_writes_nothing(root, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    out = tmp_path / "out.jsonl"
    command = ["synthesize", "--root", str(root), "--out", str(out), "--teacher", "gemini", "--dry-run"]
    assert main([*command, "--rpm", "2"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    questions = int(shown["questions"])
    assert questions > 0 and int(shown["requests"]) == 2 * questions
    # 1500 tokens a first reply and 300 a check, at $10 a million; prompts at $1.25
    assert float(shown["output_tokens"]) == 1800 * questions
    expected = (float(shown["input_tokens"]) * 1.25 + 1800 * questions * 10) / 1e6
    assert float(shown["cost"]) == pytest.approx(expected, abs=0.006)
    assert float(shown["minutes_at_limits"]) == pytest.approx(questions, abs=0.1)
    assert list(tmp_path.glob("out.jsonl*")) == []


def test_an_estimate_counts_what_is_left_and_learns_from_what_was_received(root, tmp_path):
    out, dry = tmp_path / "out.jsonl", Operation(dry_run=True)
    before = synthesize(root, out, operation=dry)
    with pytest.raises(Stopped):
        synthesize_with(RulesThatStop(root, 3), root, out, workers=1)
    after = synthesize(root, out, operation=dry)
    assert after["received"] == 3 and after["requests"] < before["requests"]
    synthesize(root, out)
    done = synthesize(root, out, operation=dry)
    assert done["requests"] == done["input_tokens"] == done["output_tokens"] == 0 and done["cost"] == 0


class RulesThatStop:
    """The rule teacher, up to some request."""

    def __init__(self, root, after: int):
        self._rules, self._left = RuleTeacher(SceneStore(root / "prepared").index), after
        self.identity = self._rules.identity

    async def ask(self, request: Request) -> Reply:
        if self._left == 0:
            raise Stopped
        self._left -= 1
        return await self._rules.ask(request)

    async def close(self) -> None:
        pass


def test_the_bar_shows_what_is_kept_what_it_cost_and_why_the_rest_was_not(root, tmp_path, capsys):
    synthesize_with(CountingTeacher(), root, tmp_path / "out.jsonl", budget=Budget(Price(1e6, 0, "test")))
    shown = capsys.readouterr().err
    assert "kept" in shown and "$" in shown and "question" in shown
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert f"${report['cost']:,.2f}" in shown
