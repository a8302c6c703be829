"""Greedy choice that counts what is shown already."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.view_redundancy import already_shown, choose_spread, question_weights


def test_weights_of_objects_by_hand():
    classes = torch.eye(3)
    probs = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]])
    # cosines 1, 0, 1/sqrt(2)
    weights = question_weights(torch.tensor([1.0, 0, 0]), probs, classes)
    np.testing.assert_allclose(weights, np.exp([0, -2, 2 * (0.5**0.5 - 1)]), rtol=1e-6)
    assert question_weights(torch.ones(3), torch.zeros(0, 3), classes).shape == (0,)
    np.testing.assert_array_equal(question_weights(torch.ones(3), probs[:1], classes), [1])


def test_share_already_shown_by_hand():
    visible = np.array([[0.5, 0.0], [0.25, 0.5], [0.0, 0.0], [1.0, 0.0]])
    weight = np.array([1.0, 0.5])
    np.testing.assert_array_equal(already_shown(visible, weight, []), [0, 0, 0, 0])
    # view 1 shows .25 of worth .5 again; view 3 half of what it shows
    np.testing.assert_allclose(already_shown(visible, weight, [0]), [1, 0.5, 0, 0.5])
    np.testing.assert_allclose(already_shown(visible, weight, [0, 1]), [1, 1, 0, 0.5])


def test_a_copy_gives_way_to_something_new():
    """Two copies of the best view against one that shows another object of the asked kind a little less well."""
    utility = np.array([0.9, 0.9, 0.5, 0.1])
    visible = np.array([[0.8, 0.0], [0.8, 0.0], [0.0, 0.8], [0.0, 0.0]])
    weight = np.ones(2)
    assert choose_spread(utility, visible, weight, count=2, redundancy=0.0)[0] == [0, 1]
    chosen, taken_off = choose_spread(utility, visible, weight, count=2, redundancy=2.0)
    assert chosen == [0, 2] and taken_off == pytest.approx([0, 2 * utility.std(), 0, 0])
    assert choose_spread(utility, visible, weight, count=9, redundancy=2.0)[0] == [0, 2, 1, 3]


def test_nothing_detected_leaves_the_plain_order():
    chosen, taken_off = choose_spread(
        np.array([0.1, 0.3, 0.2]), np.zeros((3, 0)), np.zeros(0), count=2, redundancy=5.0
    )
    assert chosen == [1, 2] and not taken_off.any()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(0, 5), st.floats(0, 6))
def test_the_chosen_are_the_highest_marginal_utilities(seed, num_views, num_objects, redundancy):
    """What the relaxed top-k rests on; and each step is the best there is, by brute force."""
    generator = np.random.default_rng(seed)
    utility, weight = generator.normal(size=num_views), generator.random(num_objects) + 0.1
    visible = generator.random((num_views, num_objects)) * (generator.random((num_views, num_objects)) < 0.6)
    count = int(generator.integers(1, num_views + 1))
    chosen, taken_off = choose_spread(utility, visible, weight, count=count, redundancy=redundancy)
    marginal = utility - taken_off
    others = [view for view in range(num_views) if view not in chosen]
    assert all(marginal[one] >= marginal[other] - 2e-6 for one, other in itertools.product(chosen, others))
    for step, view in enumerate(chosen):
        shown = visible[chosen[:step]].max(0) if step else np.zeros(num_objects)
        values = []
        for candidate in range(num_views):
            whole = sum(w * v for w, v in zip(weight, visible[candidate], strict=True))
            again = sum(w * min(v, s) for w, v, s in zip(weight, visible[candidate], shown, strict=True))
            share = again / whole if whole else 0.0
            values.append(
                -np.inf if candidate in chosen[:step] else utility[candidate] - redundancy * utility.std() * share
            )
        assert values[view] >= max(values) - 2e-6
