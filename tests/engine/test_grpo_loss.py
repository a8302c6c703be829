"""The GRPO loss against numbers computed by hand, and against a loop over its formulae."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from threedr1.engine.advantages import group_advantages
from threedr1.engine.grpo_loss import (
    Normalizer,
    grpo_loss,
    policy_loss,
    token_weights,
)
from threedr1.engine.grpo_presets import PAPER, GrpoLossConfig
from threedr1.models.lm_head import token_logprobs

from .grpo_batches import CONFIGS, LOSS_TYPES, make_batch, sampler_logps, tensor, without_truncated

# --- on policy it is REINFORCE with a baseline ---------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [(kind, level) for kind in LOSS_TYPES for level in ("token", "sequence")] + [("grpo", "response")],
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


# --- clipping ------------------------------------------------------------------------------------------------------


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
        (-2.0, 0.5, 4.0, 1.6, False),
        (-2.0, 0.9, 4.0, 1.8, True),
        (2.0, 0.5, 4.0, -1.0, True),
        (2.0, 1.1, 4.0, -2.2, True),
        (2.0, 3.0, 4.0, -2.6, False),
        (2.0, 9.0, 4.0, -2.6, False),
        (0.0, 9.0, 4.0, 0.0, False),
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
    assert got["clip/region"].item() == pytest.approx(2 / 6)
    assert got["clip/delta"].item() == pytest.approx(1 / 6)
    assert got["ratio/mean"].item() == pytest.approx(14 / 6)
    assert got["ratio/max"].item() == pytest.approx(9.0) and got["ratio/min"].item() == pytest.approx(0.5)


def test_clip_metrics_of_cispo_count_lowered_weights():
    """Ratios 0.5, 1.5 and 1 with either sign: one weight in three is lowered, none is raised."""
    logps_BT = tensor([0.5, 1.5, 1.0], [0.5, 1.5, 1.0]).log()
    got = policy_loss(logps_BT, torch.zeros_like(logps_BT), tensor(1, -1), torch.ones(2, 3), loss_type="cispo").metrics
    assert got["clip/low"] == 0 and got["clip/high"].item() == got["clip/region"].item() == pytest.approx(1 / 3)


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


def test_gspo_clips_the_sequence_and_spreads_the_gradient():
    """Ratios 2 and 0.5 of one response: geometric mean 1, inside the clip range, so both tokens move alike."""
    logps_BT = tensor([2, 0.5]).log().requires_grad_()
    arguments = (torch.zeros(1, 2).double(), tensor(1.0), torch.ones(1, 2))
    (grad,) = torch.autograd.grad(policy_loss(logps_BT, *arguments, loss_type="gspo").loss, logps_BT)
    torch.testing.assert_close(grad, tensor([-0.5, -0.5]))
    (grad,) = torch.autograd.grad(policy_loss(logps_BT, *arguments, loss_type="grpo").loss, logps_BT)
    torch.testing.assert_close(grad, tensor([0, -0.25]))  # token level: 2 is clipped, 0.5 moves


@pytest.mark.parametrize("level", ["sequence", "response"])
def test_a_clipped_response_moves_none_of_its_tokens(level):
    """Token ratios 1.5 and 1.2: mean and product are above 1.3. Unlikely, they are below 0.8 turned over."""
    mask_BT = torch.ones(1, 2)
    for sign, moves in ((1, False), (-1, True)):
        for direction in (1, -1):
            logps_BT = (direction * tensor([1.5, 1.2]).log()).requires_grad_()
            advantage = tensor(sign * direction)
            got = policy_loss(
                logps_BT, torch.zeros(1, 2).double(), advantage, mask_BT, clip_high=0.3, ratio_level=level
            )
            (grad,) = torch.autograd.grad(got.loss, logps_BT)
            assert (grad != 0).tolist() == [[moves, moves]]


def test_extreme_log_ratios_stay_finite():
    logps_BT = tensor([1000.0, -1000.0])
    got = policy_loss(logps_BT, torch.zeros_like(logps_BT), tensor(-1), torch.ones(1, 2))
    assert torch.isfinite(got.loss)


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


def loss_by_loop(logps, frozen, batch, config, max_length):
    """The loss once more, in numbers. `frozen` are the log-probabilities where no gradient flows."""
    old, ref, advantages, mask, sampler = batch
    level = "sequence" if config.loss_type == "gspo" else config.ratio_level
    rows = [(b, [t for t, there in enumerate(row) if there]) for b, row in enumerate(mask)]
    rows = [(b, places) for b, places in rows if places]
    num_tokens = sum(len(places) for _, places in rows)

    def spread(logs, level):
        pooled = {"sequence": sum(logs) / len(logs), "response": sum(logs)}
        return [math.exp(log) for log in logs] if level == "token" else [math.exp(pooled[level])] * len(logs)

    total = 0.0
    for b, places in rows:
        token_ratios = spread([logps[b][t] - old[b][t] for t in places], "token")
        policy_ratios = spread([logps[b][t] - old[b][t] for t in places], level)
        frozen_ratios = spread([frozen[b][t] - old[b][t] for t in places], level)
        kind, _, above = config.sampler_correction.partition("_")
        gaps = [old[b][t] - sampler[b][t] for t in places]
        factors = {"none": [1.0] * len(gaps), "token": spread(gaps, "token"), "sequence": spread(gaps, "response")}[
            kind
        ]
        cap = config.sampler_cap
        factors = [factor if factor <= cap else cap * (above == "truncate") for factor in factors]
        for i, t in enumerate(places):
            A, ratio = advantages[b], policy_ratios[i]
            if config.loss_type == "cispo":
                term = -min(frozen_ratios[i], 1 + config.clip_high) * A * logps[b][t]
            else:
                clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                term = -min(min(ratio, config.delta or math.inf) * A, clipped * A)
            d = logps[b][t] - ref[b][t]
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl]
            kl *= token_ratios[i] if config.kl_ratio else 1.0
            if config.loss_type in ("grpo", "gspo"):
                weight = 1 / len(rows) / len(places)
            elif config.loss_type == "dr_grpo":
                weight = 1 / len(rows) / max_length
            else:
                weight = 1 / num_tokens
            total += weight * (factors[i] * term)
            total += config.beta * kl * weight * (len(places) if level == "response" else 1)
    return total


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_combination_equals_a_loop_and_its_differences(data):
    options = {
        "loss_type": data.draw(st.sampled_from(LOSS_TYPES)),
        "ratio_level": data.draw(st.sampled_from(["token", "sequence", "response"])),
        "clip_low": data.draw(st.sampled_from([0.1, 0.2])),
        "clip_high": data.draw(st.sampled_from([0.1, 0.28])),
        "delta": data.draw(st.sampled_from([None, 1.4])),
        "beta": data.draw(st.sampled_from([0.0, 0.3])),
        "kl": data.draw(st.sampled_from(["k1", "k2", "k3"])),
        "kl_ratio": data.draw(st.booleans()),
        "sampler_correction": data.draw(
            st.sampled_from(["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
        ),
        "sampler_cap": 1.05,
    }
    assume(options["ratio_level"] != "response" or options["loss_type"] == "grpo")
    assume(options["delta"] is None or options["loss_type"] != "cispo")
    assume(options["kl"] != "k2" or not options["kl_ratio"])
    config = GrpoLossConfig(**options)
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch(data.draw(st.integers(0, 50)), rows=4, width=3)
    mask_BT[data.draw(st.integers(0, 3))] = 0  # a cut completion
    sampler_BT = sampler_logps(old_BT)
    got = grpo_loss(
        logps_BT.requires_grad_(),
        old_BT,
        ref_BT,
        advantages_B,
        mask_BT,
        config,
        normalizer=Normalizer.of(mask_BT, max_length=5),
        sampler_logps_BT=sampler_BT,
    )
    frozen = logps_BT.tolist()
    batch = [value.tolist() for value in (old_BT, ref_BT, advantages_B, mask_BT, sampler_BT)]
    # float32 against float64, in a sum whose parts may cancel
    assert got.loss.item() == pytest.approx(loss_by_loop(frozen, frozen, batch, config, 5), rel=1e-5, abs=1e-7)
    (grad_BT,) = torch.autograd.grad(got.loss, logps_BT)
    step = 1e-6
    for b in range(4):
        for t in range(3):
            sides = []
            for sign in (1, -1):
                moved = logps_BT.tolist()
                moved[b][t] += sign * step
                sides.append(loss_by_loop(moved, frozen, batch, config, 5))
            assert grad_BT[b, t].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_through_the_fused_head_equals_log_softmax(name):
    """Gradients at hidden states and head; where every response is cut, both are zero."""
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(20, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight_VD = torch.randn(13, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets_T = torch.randint(0, 13, (20,), generator=generator)
    advantages_B = torch.randn(4, generator=generator, dtype=torch.float64)
    mask_BT = (torch.arange(5) < torch.tensor([[5], [2], [1], [3]])).double()
    noise_BT = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * 0.2
    fused = token_logprobs(hidden_TD, weight_VD, targets_T, chunk_size=7, vocab_chunk_size=5).logps_T
    plain = (hidden_TD @ weight_VD.T).log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    old_BT, ref_BT, sampler_BT = plain.detach().reshape(4, 5) + noise_BT
    for finished_B in (torch.tensor([True, True, False, True]), torch.zeros(4)):
        kept_BT = without_truncated(mask_BT, finished_B)
        normalizer = Normalizer.of(kept_BT, 9)
        results = []
        for logps_T in (fused, plain):
            logps_BT = logps_T.reshape(4, 5)
            got = grpo_loss(
                logps_BT,
                old_BT,
                ref_BT,
                advantages_B,
                kept_BT,
                CONFIGS[name],
                normalizer=normalizer,
                sampler_logps_BT=sampler_BT,
            )
            results.append((got.loss, *torch.autograd.grad(got.loss, (hidden_TD, weight_VD), retain_graph=True)))
        torch.testing.assert_close(*results)
        assert any((value != 0).any() for value in results[0][1:]) == bool(finished_B.any())


@pytest.mark.parametrize("name", CONFIGS)
def test_on_policy_needs_no_old_logps(name):
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    logps_BT.requires_grad_()
    grads = []
    for old in (None, logps_BT.detach()):
        got = grpo_loss(
            logps_BT,
            old,
            ref_BT,
            advantages_B,
            mask_BT,
            CONFIGS[name],
            normalizer=Normalizer.of(mask_BT, 9),
            sampler_logps_BT=sampler_logps(old_BT),
        )
        grads.append(torch.autograd.grad(got.loss, logps_BT)[0])
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


def test_wrong_shapes_are_one_clear_sentence():
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    with pytest.raises(ValueError, match="5 advantages"):
        grpo_loss(logps_BT, old_BT, ref_BT, advantages_B[:3], mask_BT, PAPER)
    with pytest.raises(ValueError, match="ref_logps must have"):
        grpo_loss(logps_BT, old_BT, ref_BT[:, :3], advantages_B, mask_BT, PAPER)
    with pytest.raises(ValueError, match="reference policy"):
        grpo_loss(logps_BT, old_BT, None, advantages_B, mask_BT, PAPER)
    with pytest.raises(ValueError, match="sampler_logps must have"):
        grpo_loss(logps_BT, old_BT, ref_BT, advantages_B, mask_BT, PAPER, sampler_logps_BT=old_BT[:2])
    with pytest.raises(ValueError, match="sampler_correction is token_truncate, so"):
        grpo_loss(logps_BT, old_BT, ref_BT, advantages_B, mask_BT, CONFIGS["corrected"])
    with pytest.raises(ValueError, match="max_length"):
        token_weights(mask_BT, "dr_grpo")
