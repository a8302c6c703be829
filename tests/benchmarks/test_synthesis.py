"""The engine's benchmark: small runs measure what they say."""

import pytest

from threedr1.benchmarks import synthesis


def test_rates_are_shares_of_their_peers(monkeypatch):
    pytest.importorskip("google.genai")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    slow, fast = synthesis.measure_rates(num_slow=32, num_fast=64, repeats=1)
    assert slow.name == "synthesis.rate_share" and fast.name == "synthesis.rate_share_50ms"
    # 64 requests in two rounds of half a second: at most one second's worth of the ideal
    assert 0 < slow.value <= 0.51 and slow.value == slow.ratio
    assert 0 < fast.value < 3 and "requests a second" in fast.note


def test_memory_is_the_growth_after_a_tenth_of_the_questions():
    row = synthesis.measure_memory(1000)
    assert row.name == "synthesis.memory_mib_1k" and row.unit == "MiB"
    assert 0 <= row.value < 50 and "from 100 to 1000" in row.note


def test_questions_are_made_when_asked_for():
    questions = synthesis.Questions(3)
    assert [one.question_id for one in questions] == ["q0", "q1", "q2"] and questions[1:] == [*questions][1:]
    assert len({(one.scene_id, one.text) for one in synthesis.Questions(2500)}) == 2500
