"""Advantages against numbers computed by hand and against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.engine.advantages import (
    decoupled_advantages,
    group_advantages,
    group_statistics,
    informative_groups,
)

NAN = float("nan")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_by_hand():
    """Rewards 1, 2, 3, 6: mean 3, deviations -2 -1 0 3, unbiased variance 14/3."""
    advantages_PG = group_advantages(tensor([1, 2, 3, 6]), eps=0.0)
    std = math.sqrt(14 / 3)
    torch.testing.assert_close(advantages_PG, tensor([-2 / std, -1 / std, 0, 3 / std]))
    with_eps = group_advantages(tensor([1, 2, 3, 6]), eps=0.5)
    torch.testing.assert_close(with_eps, tensor([-2, -1, 0, 3]) / (std + 0.5))


def test_advantages_of_two():
    """Two samples: deviations -d and d, unbiased deviation d * sqrt 2, whatever d is."""
    advantages_PG = group_advantages(tensor([0, 1], [5, 3]), eps=0.0)
    torch.testing.assert_close(advantages_PG, tensor([-1, 1], [1, -1]) / math.sqrt(2))


def test_group_without_variance_is_exactly_zero():
    # the mean of eight 0.1 is not 0.1 in float32; divided by eps alone the difference would matter
    rewards_PG = torch.full((3, 8), 0.1)
    rewards_PG[1] = 0.7
    for scale in ("group", "batch", "none"):
        assert torch.equal(group_advantages(rewards_PG, scale), torch.zeros(3, 8))


def test_failed_rewards_are_excluded():
    advantages_PG = group_advantages(tensor([1, NAN, 3, NAN], [NAN, NAN, NAN, NAN], [2, NAN, NAN, NAN]), eps=0.0)
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(advantages_PG, tensor([-half, 0, half, 0], [0, 0, 0, 0], [0, 0, 0, 0]))


def test_batch_and_no_scaling_by_hand():
    """Groups (0, 2) and (10, 14): centred -1 1 and -2 2; all four rewards have mean 6.5 and variance 131/3."""
    rewards_PG = tensor([0, 2], [10, 14])
    centred_PG = tensor([-1, 1], [-2, 2])
    torch.testing.assert_close(group_advantages(rewards_PG, "none"), centred_PG)
    torch.testing.assert_close(group_advantages(rewards_PG, "batch", eps=0.0), centred_PG / math.sqrt(131 / 3))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4).filter(lambda r: max(r) - min(r) > 0.01),
    st.floats(-10, 10),
    st.floats(0.1, 10),
)
def test_advantages_ignore_shift_and_scale(rewards, shift, scale):
    rewards_PG = tensor(rewards)
    moved = group_advantages(rewards_PG * scale + shift, eps=0.0)
    torch.testing.assert_close(moved, group_advantages(rewards_PG, eps=0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_do_not_depend_on_the_order_over_ranks(scale):
    rewards_PG = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(group_advantages(rewards_PG[order], scale), group_advantages(rewards_PG, scale)[order])


def test_decoupled_advantages_by_hand():
    """A reward on the scale of 1000 does not drown one on the scale of 1."""
    rewards_RPG = torch.stack([tensor([0, 1]), tensor([1000, 0])])
    half = 1 / math.sqrt(2)
    # each normalised to -half, half and half, -half; weights 2 and 1 leave -half, half, of deviation 1
    got = decoupled_advantages(rewards_RPG, torch.tensor([2.0, 1.0], dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(got, tensor([-half, half]))
    summed = group_advantages(2 * rewards_RPG[0] + rewards_RPG[1], eps=0.0)
    assert summed[0, 0] > 0 > got[0, 0]


def test_decoupled_advantages_of_flat_and_failed_rewards():
    rewards_RPG = torch.stack([tensor([0.1, 0.1, 0.1], [0, 1, NAN]), tensor([NAN, NAN, NAN], [NAN, NAN, NAN])])
    got = decoupled_advantages(rewards_RPG, torch.ones(2, dtype=torch.float64))
    assert torch.equal(got[0], torch.zeros(3, dtype=torch.float64))
    assert got[1, 2] == 0 and got[1, 0] < 0 < got[1, 1]


def test_group_statistics():
    rewards_PG = tensor([1, 1, 1], [0, 2, NAN])
    assert informative_groups(rewards_PG).tolist() == [False, True]
    got = group_statistics(rewards_PG)
    assert got["reward"] == pytest.approx(1.0)
    assert got["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    assert got["frac_reward_zero_std"] == 0.5
    assert got["frac_reward_missing"] == pytest.approx(1 / 6)


# --- against a loop ------------------------------------------------------------------------------------------------


def mean_and_std(values):
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def advantages_by_loop(groups, scale, eps):
    """Lists of rewards, None for a failure."""
    everything = [value for group in groups for value in group if value is not None]
    rows = []
    for group in groups:
        known = [value for value in group if value is not None]
        if len(set(known)) < 2:
            rows.append([0.0] * len(group))
            continue
        mean, std = mean_and_std(known)
        divisor = {"group": std + eps, "batch": mean_and_std(everything)[1] + eps, "none": 1.0}[scale]
        rows.append([0.0 if value is None else (value - mean) / divisor for value in group])
    return rows


def as_tensor(groups):
    return torch.tensor(
        [[NAN if value is None else value for value in group] for group in groups], dtype=torch.float64
    )


# eighths, so that sums are exact and equal rewards are equal
reward = st.one_of(st.none(), st.integers(-8, 8).map(lambda eighths: eighths / 8))
reward_groups = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(reward, min_size=size, max_size=size), min_size=1, max_size=4)
)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(max_examples=60, deadline=None)
@given(reward_groups, st.sampled_from([1e-4, 0.1]))
def test_advantages_equal_a_loop(scale, groups, eps):
    want_PG = torch.tensor(advantages_by_loop(groups, scale, eps), dtype=torch.float64)
    torch.testing.assert_close(group_advantages(as_tensor(groups), scale, eps), want_PG)


@settings(max_examples=60, deadline=None)
@given(reward_groups, st.data())
def test_decoupled_advantages_equal_a_loop(first, data):
    second = [[data.draw(reward) for _ in group] for group in first]
    weights = (0.7, -0.2)
    tables = [advantages_by_loop(groups, "group", 1e-4) for groups in (first, second)]
    summed, known = [], []
    for p, group in enumerate(first):
        summed.append(
            [sum(w * table[p][g] for w, table in zip(weights, tables, strict=True)) for g in range(len(group))]
        )
        known += [value for g, value in enumerate(summed[p]) if first[p][g] is not None or second[p][g] is not None]
    std = mean_and_std(known)[1] if known else 0.0
    want_PG = torch.tensor(summed, dtype=torch.float64) / (std + 1e-4)
    rewards_RPG = torch.stack([as_tensor(first), as_tensor(second)])
    got_PG = decoupled_advantages(rewards_RPG, torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(got_PG, want_PG, rtol=1e-6, atol=1e-9)


def test_wrong_shapes_are_one_clear_sentence():
    with pytest.raises(ValueError, match=r"\[P, G\]"):
        group_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match="scale is 'rank'; choose one of group, batch, none"):
        group_advantages(torch.zeros(3, 2), "rank")
    with pytest.raises(ValueError, match=r"\[R, P, G\]"):
        decoupled_advantages(torch.zeros(2, 3, 4), torch.ones(3))
