"""Means over runs: what their intervals must be where that is known without them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.utils.metrics.result import bootstrap_interval
from threedr1.utils.metrics.seeds import Estimate, difference_over_seeds, over_seeds


def test_one_run_has_the_interval_of_its_questions():
    values = [1.0] * 60 + [0.0] * 140
    found = over_seeds([values], resamples=20_000)
    low, high = bootstrap_interval(values, 1, resamples=20_000)
    assert (found.mean, found.runs, found.questions) == (0.3, 1, 200)
    assert found.low == pytest.approx(low, abs=0.006) and found.high == pytest.approx(high, abs=0.006)


def test_runs_that_agree_are_as_sure_as_one():
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0] * 10
    one, three = over_seeds([values], resamples=8000), over_seeds([values] * 3, resamples=8000)
    assert three.low == pytest.approx(one.low, abs=0.01) and three.high == pytest.approx(one.high, abs=0.01)


def test_runs_that_differ_alone_vary_as_the_mean_of_new_runs_would():
    """Every question answered alike: the interval is Student's of the runs' mean, t s / sqrt(S) to both sides."""
    levels = np.linspace(0.2, 0.8, 12)
    found = over_seeds([[level] * 5 for level in levels], resamples=20_000)
    deviation = levels.std(ddof=1) / np.sqrt(len(levels))
    assert found.mean == pytest.approx(0.5)
    assert (found.high - found.low) / 2 == pytest.approx(2.201 * deviation, rel=0.05)  # of 11 degrees of freedom


def test_scenes_are_drawn_with_all_their_questions():
    """Questions of a scene all alike: as sure as one question a scene, whatever their number."""
    rng = np.random.default_rng(3)
    of_scenes = rng.random(40)
    repeated = over_seeds([np.repeat(of_scenes, 25)], np.repeat(np.arange(40), 25), resamples=20_000)
    alone = over_seeds([of_scenes], resamples=20_000)
    assert repeated.mean == pytest.approx(alone.mean) and repeated.questions == 1000
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), abs=0.004)
    assert over_seeds([np.repeat(of_scenes, 25)]).high - repeated.mean < (repeated.high - repeated.mean) / 3


def test_scenes_of_unequal_size_weigh_by_their_questions():
    """The mean is over questions, and the spread that of a ratio: sum of sums over sum of counts (delta method)."""
    counts = np.array([1, 2, 3, 4, 10, 20] * 10)
    rng = np.random.default_rng(5)
    rates = rng.random(60)
    clusters = np.repeat(np.arange(60), counts)
    values = (rng.random(len(clusters)) < rates[clusters]).astype(float)
    found = over_seeds([values], clusters, resamples=20_000)
    sums = np.bincount(clusters, weights=values)
    residuals = sums - values.mean() * counts
    deviation = np.sqrt(60 / 59 * (residuals**2).sum()) / counts.sum()
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(2.001 * deviation, rel=0.05)  # t of 59 degrees of freedom


def test_questions_of_one_scene_are_drawn_themselves():
    values = [1.0] * 30 + [0.0] * 10
    assert over_seeds([values], [7] * 40) == over_seeds([values])
    with pytest.raises(ValueError, match="39 questions have a scene, 40 have a score"):
        over_seeds([values], [7] * 39)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 1000))
def test_the_mean_lies_in_its_interval_and_units_change_nothing(runs, questions, seed):
    values = np.random.default_rng(seed).random((runs, questions))
    found = over_seeds(values.tolist())
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert over_seeds((100 * values).tolist()).low == pytest.approx(100 * found.low)
    assert found.scaled(100).high == pytest.approx(100 * found.high)


def test_a_difference_is_taken_question_by_question():
    """Where ours is right whenever the other is, and on four questions more, no resample has it behind."""
    others = [[1.0, 0.0] * 20, [0.0, 1.0] * 20] * 3
    ours = [[*row[:-8], *[1.0] * 8] for row in others]
    found = difference_over_seeds(ours, others)
    assert found.mean == pytest.approx(0.1) and found.low > 0 and found.certain
    assert difference_over_seeds(others, others) == Estimate(0.0, 0.0, 0.0, 6, 40)
    assert not difference_over_seeds(others, others).certain


@pytest.mark.parametrize("rows", [[], [[]], [[1.0], [1.0, 0.0]]])
def test_what_cannot_be_compared_is_refused(rows):
    with pytest.raises(ValueError, match="nothing to take a mean of|on the same ones"):
        over_seeds(rows)


def test_sides_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="compare the same seeds and questions"):
        difference_over_seeds([[1.0]], [[1.0], [0.0]])
