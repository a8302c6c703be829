"""Pace and money: token buckets by a hand-held clock, estimates that learn, budgets that wait, prices."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.datasets.synthesis import synthesize_with
from threedr1.datasets.synthesis.budget import Budget, BudgetSpent, build_budget
from threedr1.datasets.synthesis.limits import Estimator, Limits, TokenBucket, Usage
from threedr1.datasets.synthesis.prices import Price, find_price
from threedr1.datasets.synthesis.teacher import Reply, Request

from .teacher_server import KINDS, Server, add_questions, make_teacher, oracle, question


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    limit=st.integers(1, 3000),
    gaps=st.lists(st.floats(0, 90), min_size=1, max_size=60),
    amounts=st.lists(st.integers(1, 50), min_size=60, max_size=60),
)
def test_no_minute_holds_more_than_the_limit_and_one_taker(limit, gaps, amounts):
    """Used from `now + wait` on, whoever comes first; one request may be larger than the limit itself."""
    clock, used = Clock(), []
    bucket = TokenBucket(limit, clock)
    for gap, amount in zip(gaps, amounts, strict=False):
        clock.now += gap
        used.append((clock.now + bucket.take(amount), amount))
    assert [when for when, _ in used] == sorted(when for when, _ in used)
    for first, (start, largest) in enumerate(used):
        inside = sum(amount for when, amount in used[first:] if when < start + 60 - 1e-6)
        # what opens the window and is larger than the bucket was saved up before the window
        assert inside <= limit + max(0.0, largest - max(1.0, limit / 60)) + 1e-6


def test_a_bucket_by_hand():
    """120 a minute: two at once, the rest at 118 / 60 a second."""
    clock = Clock()
    bucket = TokenBucket(120, clock)
    assert [bucket.take(1), bucket.take(1)] == [0.0, 0.0]
    assert bucket.take(1) == pytest.approx(60 / 118) and bucket.take(1) == pytest.approx(2 * 60 / 118)
    clock.now = 10.0
    assert bucket.take(2) == 0.0
    bucket.correct(5)
    assert bucket.take(1) == pytest.approx(6 * 60 / 118)
    bucket.correct(-100)  # never more than a full bucket
    assert bucket.take(3) == pytest.approx(60 / 118)
    assert TokenBucket(0, clock).take(1e9) == 0.0
    once = TokenBucket(1, clock)
    assert once.take(1) == 0.0 and once.take(1) == pytest.approx(60)


def test_charges_are_corrected_by_what_was_used():
    clock = Clock()
    limits = Limits(0, 600_000, clock=clock)
    request = Request(question(), "p" * 40)

    async def use(reply: Reply | None) -> Usage:
        charged = await limits.admit(request)
        limits.settle(charged, request, reply)
        return charged

    limits.estimator.learn(request, Reply("", "", 10, 20))
    first = asyncio.run(use(Reply("", "", 10, 10)))
    assert first.input_tokens == pytest.approx(10) and first.output_tokens > 1000
    # all but 20 tokens came back: the next request need not wait, and neither does one that used nothing
    assert limits._tokens.take(0) == 0.0
    charged = limits.estimator.estimate(request)
    limits.settle(charged, request, None)
    assert limits.estimator.estimate(request) == charged


def test_estimates_start_from_characters_and_follow_what_is_counted():
    estimator, request = Estimator(), Request(question(), "p" * 400)
    check = Request(question(), "p" * 400, "thought")
    assert estimator.estimate(request) == Usage(100, 1500) and estimator.estimate(check) == Usage(100, 300)
    for _ in range(300):
        estimator.learn(request, Reply("", "", 200, 50))
        estimator.learn(check, Reply("blocked", "blocked"))
    assert estimator.estimate(request).input_tokens == pytest.approx(200, rel=0.01)
    assert estimator.estimate(request).output_tokens == pytest.approx(50, rel=0.01)
    assert estimator.estimate(check) == Usage(100, 300)
    assert estimator.estimate_many(3, 1200, checking=True) == Usage(300, 900)


def test_a_reservation_waits_for_those_in_flight_and_fails_where_they_cannot_help():
    price = Price(1.0, 1.0, "test")

    async def run() -> None:
        budget = Budget(price, max_tokens=100, max_cost=1.0)
        await budget.reserve(Usage(30, 30))
        second = asyncio.create_task(budget.reserve(Usage(30, 30)))
        await asyncio.sleep(0.01)
        assert not second.done()
        budget.add(5, 5)
        budget.release(Usage(30, 30))
        await second
        budget.add(30, 30)
        budget.release(Usage(30, 30))
        with pytest.raises(BudgetSpent):
            await budget.reserve(Usage(16, 15))
        await budget.reserve(Usage(15, 15))
        assert budget.spent == pytest.approx(70e-6)

    asyncio.run(run())


def test_prices_come_from_the_user_then_the_table():
    assert find_price("gemini-2.5-pro").cost(1e6, 1e6) == pytest.approx(11.25)
    assert find_price("models/gemini-2.5-pro") == find_price("gemini-2.5-pro")
    assert "2026" in find_price("gemini-2.5-flash").source
    assert find_price("my-model") is None and find_price("my-model", 1.0, 2.0).cost(2e6, 1e6) == 4.0
    for prices in ((1.0, None), (None, 1.0)):
        with pytest.raises(ValueError, match="two parts"):
            find_price("gpt-4.1", *prices)
    with pytest.raises(ValueError, match="negative"):
        find_price("gpt-4.1", -1.0, 1.0)
    with pytest.raises(ValueError, match="no price for the model 'my-model'"):
        build_budget(None, "my-model", max_cost=1.0)
    assert build_budget(None, "my-model", max_tokens=10).describe() == "10 tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_its_requests_a_minute(kind, root, tmp_path, monkeypatch):
    """1200 a minute: a second's 20 at once, then 19.67 a second."""
    add_questions(root, 20)
    with Server(oracle(kind)) as server:
        teacher = make_teacher(kind, server.url, monkeypatch, limits=Limits(1200))
        start = time.monotonic()
        report = synthesize_with(teacher, root, tmp_path / "out.jsonl")
        seconds = time.monotonic() - start
    assert report["requests"] == len(server.requests) > 40
    assert seconds >= (report["requests"] - 20) / 19.7
    times = [sent["time"] for sent in server.requests]
    assert all(sum(1 for when in times if start <= when < start + 0.5) <= 20 + 12 for start in times)
