"""The loss does not depend on how a batch is cut, padded or spread; cut completions, sampler and trainer."""

import math

import pytest
import torch

from threedr1.engine.advantages import group_advantages
from threedr1.engine.grpo_loss import Normalizer, grpo_loss, token_weights
from threedr1.engine.grpo_presets import RECOMMENDED, GrpoLossConfig

from .grpo_batches import CONFIGS, INVARIANT, loss_and_grad, make_batch, sampler_logps, tensor, without_truncated

NAN = float("nan")


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


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("cut", [[slice(0, 2), slice(2, 5)], [slice(i, i + 1) for i in range(5)]])
def test_micro_batches_change_nothing(name, cut):
    batch = make_batch()
    normalizer = Normalizer.of(batch[-1], max_length=9)
    loss, grad, metrics = loss_and_grad(batch, CONFIGS[name], [slice(0, 5)], normalizer)
    cut_loss, cut_grad, cut_metrics = loss_and_grad(batch, CONFIGS[name], cut, normalizer)
    torch.testing.assert_close(cut_loss, loss)
    torch.testing.assert_close(cut_grad, grad)
    assert set(cut_metrics) == set(metrics) and {"kl", "clip/region", "mismatch/mean"} < set(metrics)
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


@pytest.mark.parametrize("sequences", [0, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_batch_without_tokens_gives_a_differentiable_zero(name, sequences):
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    logps_BT.requires_grad_()
    got = grpo_loss(
        logps_BT,
        old_BT,
        ref_BT,
        advantages_B,
        torch.zeros_like(mask_BT),
        CONFIGS[name],
        normalizer=Normalizer(sequences, torch.tensor(0), 9),
        sampler_logps_BT=old_BT,
    )
    assert got.loss.item() == 0.0 and all(value.isfinite() for value in got.metrics.values())
    assert torch.equal(torch.autograd.grad(got.loss, logps_BT)[0], torch.zeros_like(logps_BT))


def test_constant_reward_moves_nothing_without_kl():
    logps_BT, _, _, _, mask_BT = make_batch(rows=4)
    advantages_B = group_advantages(torch.full((1, 4), 0.3, dtype=torch.float64)).reshape(-1)
    logps_BT.requires_grad_()
    for name, config in CONFIGS.items():
        config = GrpoLossConfig(loss_type=config.loss_type, ratio_level=config.ratio_level, beta=0.0)
        got = grpo_loss(logps_BT, None, None, advantages_B, mask_BT, config, normalizer=Normalizer.of(mask_BT, 9))
        assert torch.equal(torch.autograd.grad(got.loss, logps_BT)[0], torch.zeros_like(logps_BT)), name


# --- cut completions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_masked_completion_is_as_if_it_were_not_there(name):
    """Loss, metrics and the gradient of the others are those of the batch without rows 1 and 3."""
    batch = make_batch()
    finished_B = torch.tensor([True, False, True, False, True])
    mask_BT = without_truncated(batch[-1], finished_B)
    normalizer = Normalizer.of(mask_BT, max_length=9)
    assert normalizer.num_sequences == 3 and normalizer.num_tokens == batch[-1][finished_B].sum()
    loss, grad, metrics = loss_and_grad((*batch[:-1], mask_BT), CONFIGS[name], [slice(0, 5)], normalizer)
    rest = tuple(value[finished_B] for value in batch)
    want_loss, want_grad, want_metrics = loss_and_grad(
        rest, CONFIGS[name], [slice(0, 3)], Normalizer.of(rest[-1], max_length=9)
    )
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(grad[finished_B], want_grad)
    assert torch.equal(grad[~finished_B], torch.zeros_like(grad[~finished_B]))
    for key in metrics:
        torch.testing.assert_close(metrics[key], want_metrics[key], check_dtype=False)
    parts, _, _ = loss_and_grad((*batch[:-1], mask_BT), CONFIGS[name], [slice(0, 2), slice(2, 5)], normalizer)
    if name != "bnpo":
        torch.testing.assert_close(parts, loss)


def test_a_masked_completion_still_counts_in_its_groups_statistics():
    """Rewards 1, 0, 0 and the cut one 0: mean 1/4, deviation 1/2. Without it the mean would be 1/3."""
    advantages_B = group_advantages(tensor([1, 0, 0, 0]), eps=0.0).reshape(-1)
    mask_BT = without_truncated(torch.ones(4, 2), torch.tensor([True, True, True, False]))
    logps_BT = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    got = grpo_loss(logps_BT, None, None, advantages_B, mask_BT, GrpoLossConfig(loss_type="dapo", beta=0.0))
    (grad,) = torch.autograd.grad(got.loss, logps_BT)
    torch.testing.assert_close(grad, -tensor([1.5] * 2, [-0.5] * 2, [-0.5] * 2, [0.0] * 2) / 6)


# --- sampler and trainer -------------------------------------------------------------------------------------------


def test_correction_weights_the_policy_terms_alone():
    """Trainer over sampler 2 and 0.5 (sampled elsewhere), cap 1.5; on policy, KL k1 of ln 3 at the first token."""
    logps_BT = tensor([-1.0, -1.0]).requires_grad_()
    sampler_BT = logps_BT.detach() - tensor([2, 0.5]).log()
    ref_BT = logps_BT.detach() - tensor([3, 1]).log()
    config = GrpoLossConfig(beta=0.1, kl="k1", sampler_correction="token_truncate", sampler_cap=1.5)
    got = grpo_loss(logps_BT, None, ref_BT, tensor(4), torch.ones(1, 2), config, sampler_logps_BT=sampler_BT)
    assert got.loss.item() == pytest.approx(-4 * (1.5 + 0.5) / 2 + 0.1 * math.log(3) / 2)
    (grad,) = torch.autograd.grad(got.loss, logps_BT)
    torch.testing.assert_close(grad, tensor([-4 * 1.5 / 2 + 0.05, -4 * 0.5 / 2 + 0.05]))
    metrics = {key: value.item() for key, value in got.metrics.items()}
    assert metrics["mismatch/mean"] == metrics["mismatch/max"] == pytest.approx(math.log(2))
    assert metrics["correction/mean"] == pytest.approx(1.0) and metrics["correction/capped"] == 0.5
    assert (metrics["correction/min"], metrics["correction/max"]) == (pytest.approx(0.5), 1.5)


def test_without_correction_the_sampler_is_only_reported():
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = make_batch()
    arguments = (logps_BT, old_BT, ref_BT, advantages_B, mask_BT, RECOMMENDED)
    plain, watched = grpo_loss(*arguments), grpo_loss(*arguments, sampler_logps_BT=sampler_logps(old_BT))
    assert torch.equal(plain.loss, watched.loss)
    gaps = [abs(0.1 * old + 0.1) for old in old_BT[mask_BT.bool()].tolist()]
    assert watched.metrics["mismatch/mean"].item() == pytest.approx(sum(gaps) / len(gaps))
    assert watched.metrics["mismatch/max"].item() == pytest.approx(max(gaps))
    assert set(watched.metrics) - set(plain.metrics) == {"mismatch/mean", "mismatch/max"}
    agreeing = grpo_loss(*arguments[:-1], CONFIGS["corrected sequences"], sampler_logps_BT=old_BT)
    torch.testing.assert_close(agreeing.metrics["correction/min"], torch.ones((), dtype=torch.float64))
