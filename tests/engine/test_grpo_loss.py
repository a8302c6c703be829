"""GRPO against numbers computed by hand, and against a policy small enough to enumerate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.engine.grpo_loss import (
    PAPER,
    RECOMMENDED,
    GrpoLossConfig,
    Normalizer,
    clipped_surrogate,
    decoupled_advantages,
    group_advantages,
    group_statistics,
    grpo_loss,
    informative_groups,
    kl_estimate,
    log_ratios,
    merge_metrics,
    policy_loss,
    ratios,
    token_weights,
)

NAN = float("nan")
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- 1. advantages -------------------------------------------------------------------------------------------------


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


# --- 2. on policy it is REINFORCE with a baseline ------------------------------------------------------------------


def weights_by_hand(mask_BT, loss_type, level, max_length):
    """The weight of A * grad log pi of each token, written once more as loops."""
    weights_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    num_sequences = len(mask_BT)
    for b, row in enumerate(mask_BT):
        for t in range(len(row)):
            if not row[t]:
                continue
            if level == "response":
                weight = 1 / num_sequences
            elif loss_type in ("grpo", "gspo"):
                weight = 1 / num_sequences / int(row.sum())
            elif loss_type == "dr_grpo":
                weight = 1 / num_sequences / max_length
            else:
                weight = 1 / int(mask_BT.sum())
            weights_BT[b, t] = weight
    return weights_BT


def make_batch(seed=0, rows=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask_BT = (torch.arange(width)[None] < lengths[:, None]).double()
    logps_BT = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
    noise_BT = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3
    ref_BT = logps_BT + torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3
    advantages_B = torch.randn(rows, generator=generator, dtype=torch.float64)
    return logps_BT, logps_BT + noise_BT, ref_BT, advantages_B, mask_BT


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [(kind, "token") for kind in LOSS_TYPES] + [("grpo", "sequence"), ("grpo", "response")],
)
def test_on_policy_gradient_is_reinforce(loss_type, level):
    logps_BT, _, _, advantages_B, mask_BT = make_batch()
    logps_BT.requires_grad_()
    got = policy_loss(
        logps_BT,
        logps_BT.detach(),
        advantages_B,
        mask_BT,
        loss_type=loss_type,
        ratio_level=level,
        normalizer=Normalizer.of(mask_BT, max_length=9),
    )
    (grad_BT,) = torch.autograd.grad(got.loss, logps_BT)
    weights_BT = weights_by_hand(mask_BT, loss_type, level, max_length=9)
    torch.testing.assert_close(grad_BT, -advantages_B[:, None] * weights_BT, rtol=0, atol=1e-6)
    if loss_type == "cispo":
        value = -(advantages_B[:, None] * weights_BT * logps_BT).sum()
    elif level == "response":
        value = -advantages_B.mean()
    else:
        value = -(advantages_B[:, None] * weights_BT).sum()
    torch.testing.assert_close(got.loss, value, rtol=0, atol=1e-6)


# --- 3. clipping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "delta", "value", "moves"),
    [
        (2.0, 0.5, None, -1.0, True),  # a good token that became unlikely is pulled back, however far
        (2.0, 1.1, None, -2.2, True),
        (2.0, 1.5, None, -2.6, False),  # 1 + 0.3 times 2
        (-2.0, 0.5, None, 1.6, False),  # 1 - 0.2 times -2
        (-2.0, 0.9, None, 1.8, True),
        (-2.0, 1.5, None, 3.0, True),  # a bad token that became likely is pushed back
        (-2.0, 9.0, None, 18.0, True),
        (-2.0, 9.0, 4.0, 8.0, False),  # bounded by delta
        (-2.0, 3.0, 4.0, 6.0, True),
        (2.0, 9.0, 4.0, -2.6, False),
    ],
)
def test_clipping_table(advantage, ratio, delta, value, moves):
    logps_BT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    got = policy_loss(
        logps_BT,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.3,
        delta=delta,
    )
    assert got.loss.item() == pytest.approx(value)
    (grad,) = torch.autograd.grad(got.loss, logps_BT)
    assert grad.item() == (pytest.approx(-advantage * ratio) if moves else 0.0)


def test_clip_metrics_count_tokens():
    logps_BT = tensor([0.5, 1.5, 1.0], [0.5, 1.5, 9.0]).log()
    got = policy_loss(logps_BT, torch.zeros_like(logps_BT), tensor(1, -1), torch.ones(2, 3), delta=4.0).metrics
    assert got["clip/high"].item() == pytest.approx(1 / 6)  # 1.5 with A > 0
    assert got["clip/low"].item() == pytest.approx(1 / 6)  # 0.5 with A < 0
    assert got["clip/delta"].item() == pytest.approx(1 / 6)
    assert got["ratio/mean"].item() == pytest.approx(14 / 6)
    assert got["ratio/max"].item() == pytest.approx(9.0) and got["ratio/min"].item() == pytest.approx(0.5)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logps_BT = torch.tensor([[math.log(5.0)]], dtype=torch.float64, requires_grad=True)
    got = policy_loss(
        logps_BT,
        torch.zeros(1, 1).double(),
        torch.ones(1).double(),
        torch.ones(1, 1),
        clip_high=1.0,
        loss_type="cispo",
    )
    assert torch.autograd.grad(got.loss, logps_BT)[0].item() == pytest.approx(-2.0)  # weight 5 clipped to 2


def test_ratio_levels_by_hand():
    """Log-ratios ln 2 and ln 8 (and padding): 2 and 8; geometric mean 4; product 16."""
    logps_BT = tensor([2, 8, 1]).log()
    mask_BT = torch.tensor([[1, 1, 0]])
    old_BT = torch.zeros_like(logps_BT)
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "token"), tensor([2, 8, 1]))
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "sequence"), tensor([4, 4, 1]))
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "response"), tensor([16, 16, 1]))


def test_gspo_clips_the_sequence_and_spreads_the_gradient():
    """Ratios 2 and 0.5 of one response: geometric mean 1, inside the clip range, so both tokens move alike."""
    logps_BT = tensor([2, 0.5]).log().requires_grad_()
    arguments = (torch.zeros(1, 2).double(), tensor(1.0), torch.ones(1, 2))
    (grad,) = torch.autograd.grad(policy_loss(logps_BT, *arguments, loss_type="gspo").loss, logps_BT)
    torch.testing.assert_close(grad, tensor([-0.5, -0.5]))
    (grad,) = torch.autograd.grad(policy_loss(logps_BT, *arguments, loss_type="grpo").loss, logps_BT)
    torch.testing.assert_close(grad, tensor([0, -0.25]))  # token level: 2 is clipped, 0.5 moves


def test_extreme_log_ratios_stay_finite():
    logps_BT = tensor([1000.0, -1000.0])
    assert log_ratios(logps_BT, torch.zeros_like(logps_BT), torch.ones(1, 2)).tolist() == [[20.0, -20.0]]
    got = policy_loss(logps_BT, torch.zeros_like(logps_BT), tensor(-1), torch.ones(1, 2))
    assert torch.isfinite(got.loss)


# --- 4. KL ---------------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logps, ref = tensor([math.log(0.5)]), tensor([math.log(0.25)])  # d = ln 2
    log2 = math.log(2)
    assert kl_estimate(logps, ref, "k1").item() == pytest.approx(log2)
    assert kl_estimate(logps, ref, "k2").item() == pytest.approx(log2**2 / 2)
    assert kl_estimate(logps, ref, "k3").item() == pytest.approx(0.5 - 1 + log2)
    assert kl_estimate(logps, ref, "k3", tensor([3.0])).item() == pytest.approx(3 * (log2 - 0.5))


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative_and_zero_at_equality(logp, ref):
    assert kl_estimate(tensor(logp), tensor(ref), "k3").item() >= 0
    assert kl_estimate(tensor(logp), tensor(logp), "k3").item() == 0


def enumerate_policy():
    """A categorical policy over six tokens and its reference."""
    logits_V = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.5, -0.4], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([1.0, 0.2, -0.7, 0.5, 0.1, -1.2], dtype=torch.float64).log_softmax(0)
    return logits_V, logits_V.log_softmax(0), ref_V


@pytest.mark.parametrize(
    ("kind", "with_ratio", "direction"),
    [
        ("k1", False, None),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k3", True, "reverse"),
    ],
)
def test_gradient_of_kl_estimates_on_six_tokens(kind, with_ratio, direction):
    """The expected gradient over all six tokens, weighted by the policy that samples them."""
    logits_V, logps_V, ref_V = enumerate_policy()
    probs_V = logps_V.exp()
    ratio_V = (logps_V - logps_V.detach()).exp() if with_ratio else None
    expected = (probs_V.detach() * kl_estimate(logps_V, ref_V, kind, ratio_V)).sum()
    (grad_V,) = torch.autograd.grad(expected, logits_V, retain_graph=True)
    kl = {
        "reverse": (probs_V * (logps_V - ref_V)).sum(),  # KL(pi || ref), the objective's
        "forward": (ref_V.exp() * (ref_V - logps_V)).sum(),  # KL(ref || pi)
        None: 0.0 * logps_V.sum(),
    }[direction]
    torch.testing.assert_close(grad_V, torch.autograd.grad(kl, logits_V)[0])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased_on_six_tokens(kind):
    _, logps_V, ref_V = enumerate_policy()
    torch.testing.assert_close(
        (logps_V.exp() * kl_estimate(logps_V, ref_V, kind)).sum(), (logps_V.exp() * (logps_V - ref_V)).sum()
    )


def test_off_policy_kl_with_ratio_is_unbiased_on_six_tokens():
    logits_V, logps_V, ref_V = enumerate_policy()
    old_V = torch.tensor([0.0, 0.5, -0.5, 1.0, 0.2, 0.3], dtype=torch.float64).log_softmax(0)
    expected = (old_V.exp() * kl_estimate(logps_V, ref_V, "k3", (logps_V - old_V).exp())).sum()
    exact = (logps_V.exp() * (logps_V - ref_V)).sum()
    torch.testing.assert_close(expected, exact)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits_V, retain_graph=True) for value in (expected, exact))
    )


def test_expected_policy_gradient_on_six_tokens():
    """On policy, the expected gradient of the loss is minus the gradient of the expected reward."""
    logits_V, logps_V, _ = enumerate_policy()
    rewards_V = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    probs_V = logps_V.exp().detach()
    baseline = (probs_V * rewards_V).sum()
    losses = clipped_surrogate(
        (logps_V - logps_V.detach()).exp()[:, None], rewards_V - baseline, clip_low=0.2, clip_high=0.2
    )
    (grad_V,) = torch.autograd.grad((probs_V * losses[:, 0]).sum(), logits_V, retain_graph=True)
    torch.testing.assert_close(-grad_V, torch.autograd.grad((logps_V.exp() * rewards_V).sum(), logits_V)[0])


# --- 5. aggregation ------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    mask_BT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert token_weights(mask_BT, "grpo").tolist() == [[0.25, 0.25, 0, 0], [0.125] * 4]
    assert token_weights(mask_BT, "dr_grpo", Normalizer.of(mask_BT, 8)).tolist() == [
        [1 / 16] * 2 + [0] * 2,
        [1 / 16] * 4,
    ]
    torch.testing.assert_close(token_weights(mask_BT, "dapo"), torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]) / 6)
    # twice the tokens in the whole batch: half the weight
    torch.testing.assert_close(
        token_weights(mask_BT, "dapo", Normalizer(4, torch.tensor(12))), token_weights(mask_BT, "dapo") / 2
    )


CONFIGS = {kind: GrpoLossConfig(loss_type=kind, beta=0.1, kl_ratio=True) for kind in LOSS_TYPES} | {
    "paper": PAPER,
    "recommended": RECOMMENDED,
}
INVARIANT = [name for name in CONFIGS if name != "bnpo"]


def loss_and_grad(batch, config, cut, normalizer):
    """Sum of micro-batch losses, gradient at the log-probabilities, merged metrics."""
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = batch
    logps_BT = logps_BT.clone().requires_grad_()
    parts = [
        grpo_loss(
            logps_BT[rows],
            old_BT[rows],
            ref_BT[rows],
            advantages_B[rows],
            mask_BT[rows],
            config,
            normalizer=normalizer,
        )
        for rows in cut
    ]
    total = torch.stack([part.loss for part in parts]).sum()
    return total, torch.autograd.grad(total, logps_BT)[0], merge_metrics(part.metrics for part in parts)


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("cut", [[slice(0, 2), slice(2, 5)], [slice(i, i + 1) for i in range(5)]])
def test_micro_batches_change_nothing(name, cut):
    batch = make_batch()
    normalizer = Normalizer.of(batch[-1], max_length=9)
    loss, grad, metrics = loss_and_grad(batch, CONFIGS[name], [slice(0, 5)], normalizer)
    cut_loss, cut_grad, cut_metrics = loss_and_grad(batch, CONFIGS[name], cut, normalizer)
    torch.testing.assert_close(cut_loss, loss)
    torch.testing.assert_close(cut_grad, grad)
    assert set(cut_metrics) == set(metrics) and "kl" in metrics and "clip/high" in metrics
    for key in metrics:
        torch.testing.assert_close(cut_metrics[key], metrics[key])


def test_bnpo_is_the_token_mean_of_its_own_micro_batch():
    batch = make_batch()
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = batch
    normalizer = Normalizer.of(mask_BT)
    whole = loss_and_grad(batch, CONFIGS["bnpo"], [slice(0, 5)], normalizer)[0]
    torch.testing.assert_close(whole, loss_and_grad(batch, CONFIGS["dapo"], [slice(0, 5)], normalizer)[0])
    parts = loss_and_grad(batch, CONFIGS["bnpo"], [slice(0, 2), slice(2, 5)], normalizer)[0]
    means = [
        grpo_loss(logps_BT[s], old_BT[s], ref_BT[s], advantages_B[s], mask_BT[s], CONFIGS["bnpo"]).loss
        for s in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(parts, 0.4 * means[0] + 0.6 * means[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing_whatever_it_holds(name):
    batch = make_batch()
    normalizer = Normalizer.of(batch[-1], max_length=9)
    loss, grad, _ = loss_and_grad(batch, CONFIGS[name], [slice(0, 5)], normalizer)
    wider = [torch.nn.functional.pad(value, (0, 3)) for value in (batch[0], batch[1], batch[2], batch[4])]
    hidden = wider[3] == 0
    wider[0][hidden], wider[1][hidden], wider[2][hidden] = float("-inf"), NAN, float("inf")
    padded = (wider[0], wider[1], wider[2], batch[3], wider[3])
    padded_loss, padded_grad, _ = loss_and_grad(padded, CONFIGS[name], [slice(0, 5)], normalizer)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_grad[:, :7], grad)
    assert torch.equal(padded_grad[hidden], torch.zeros(int(hidden.sum()), dtype=torch.float64))


@pytest.mark.parametrize("name", INVARIANT)
def test_ranks_change_nothing_when_ddp_averages(name):
    """Two ranks of unequal work; DDP averages, so each multiplies its loss by 2."""
    batch = make_batch()
    normalizer = Normalizer.of(batch[-1], max_length=9)
    _, grad, _ = loss_and_grad(batch, CONFIGS[name], [slice(0, 5)], normalizer)
    ranks = [[slice(0, 1), slice(1, 3)], [slice(3, 5)]]
    grads = [2 * loss_and_grad(batch, CONFIGS[name], cut, normalizer)[1] for cut in ranks]
    torch.testing.assert_close(sum(grads) / 2, grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_without_tokens_gives_a_differentiable_zero(name):
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    logps_BT.requires_grad_()
    got = grpo_loss(
        logps_BT,
        old_BT,
        ref_BT,
        advantages_B,
        torch.zeros_like(mask_BT),
        CONFIGS[name],
        normalizer=Normalizer(0 + len(mask_BT), torch.tensor(0), 9),
    )
    assert got.loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(got.loss, logps_BT)[0], torch.zeros_like(logps_BT))


def test_constant_reward_moves_nothing_without_kl():
    logps_BT, _, _, _, mask_BT = make_batch(rows=4)
    advantages_B = group_advantages(torch.full((1, 4), 0.3, dtype=torch.float64)).reshape(-1)
    logps_BT.requires_grad_()
    for name, config in CONFIGS.items():
        config = GrpoLossConfig(loss_type=config.loss_type, ratio_level=config.ratio_level, beta=0.0)
        got = grpo_loss(logps_BT, None, None, advantages_B, mask_BT, config, normalizer=Normalizer.of(mask_BT, 9))
        assert torch.equal(torch.autograd.grad(got.loss, logps_BT)[0], torch.zeros_like(logps_BT)), name


# --- the whole loss ------------------------------------------------------------------------------------------------


def test_paper_loss_by_hand():
    """Two responses. The first, A = 1, has token ratios 1.1 and 1.2: the response's ratio is 1.32, clipped to 1.2.
    The second, A = -1, has one token of ratio 1. KL k3 to the reference: d = ln 2 for one token, 0 for the others."""
    old_BT = tensor([-1, -2], [-1, 0])
    logps_BT = old_BT + tensor([1.1, 1.2], [1, 1]).log()
    ref_BT = logps_BT - tensor([2, 1], [1, 1]).log()
    mask_BT = torch.tensor([[1, 1], [1, 0]])
    got = grpo_loss(logps_BT, old_BT, ref_BT, tensor(1, -1), mask_BT, PAPER, entropy_BT=tensor([3, 6], [9, 100]))
    kl = math.log(2) - 0.5
    assert got.loss.item() == pytest.approx((-1.2 + 1) / 2 + 0.02 * kl / 2)
    assert got.metrics["kl"].item() == pytest.approx(kl / 3)
    assert got.metrics["kl_loss"].item() == pytest.approx(0.01 * kl)
    assert got.metrics["entropy"].item() == pytest.approx(6.0)
    assert got.metrics["loss"].item() == pytest.approx(got.loss.item())


def test_on_policy_needs_no_old_logps():
    logps_BT, _, ref_BT, advantages_B, mask_BT = make_batch()
    logps_BT.requires_grad_()
    grads = [
        torch.autograd.grad(grpo_loss(logps_BT, old, ref_BT, advantages_B, mask_BT, RECOMMENDED).loss, logps_BT)[0]
        for old in (None, logps_BT.detach())
    ]
    assert torch.equal(*grads)
    assert not torch.equal(grads[0], torch.zeros_like(grads[0]))


def test_descending_the_loss_raises_the_reward_of_a_small_policy():
    """A bandit over six tokens: GRPO steps on sampled groups find the best token."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.zeros(6, requires_grad=True)
    rewards_V = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 1.0])
    optimizer = torch.optim.Adam([logits_V], lr=0.1)
    config = GrpoLossConfig(loss_type="dapo", beta=0.0)
    for _ in range(60):
        tokens_B = torch.multinomial(logits_V.detach().softmax(0), 16, replacement=True, generator=generator)
        advantages_B = group_advantages(rewards_V[tokens_B].reshape(2, 8)).reshape(-1)
        logps_BT = logits_V.log_softmax(0)[tokens_B][:, None]
        optimizer.zero_grad()
        grpo_loss(logps_BT, None, None, advantages_B, torch.ones(16, 1), config).loss.backward()
        optimizer.step()
    assert logits_V.softmax(0)[5] > 0.9


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"loss_type": "ppo"}, "Unknown loss_type 'ppo'; choose one of grpo"),
        ({"kl": "k4"}, "Unknown kl"),
        ({"scale": "rank"}, "Unknown scale"),
        ({"ratio_level": "word"}, "Unknown ratio_level"),
        ({"ratio_level": "response", "loss_type": "dapo"}, "one term a response"),
        ({"clip_low": 1.0}, "Clip ranges"),
        ({"delta": 1.1}, "delta must lie above"),
        ({"beta": -0.1}, "beta"),
    ],
)
def test_config_refuses_what_it_cannot_mean(settings_, message):
    with pytest.raises(ValueError, match=message):
        GrpoLossConfig(**settings_)


def test_wrong_shapes_are_one_clear_sentence():
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    with pytest.raises(ValueError, match="5 advantages"):
        grpo_loss(logps_BT, old_BT, ref_BT, advantages_B[:3], mask_BT, PAPER)
    with pytest.raises(ValueError, match="ref_logps must have"):
        grpo_loss(logps_BT, old_BT, ref_BT[:, :3], advantages_B, mask_BT, PAPER)
    with pytest.raises(ValueError, match="reference policy"):
        grpo_loss(logps_BT, old_BT, None, advantages_B, mask_BT, PAPER)
    with pytest.raises(ValueError, match="max_length"):
        token_weights(mask_BT, "dr_grpo")
    with pytest.raises(ValueError, match=r"\[P, G\]"):
        group_advantages(torch.zeros(3))
