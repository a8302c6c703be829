"""KL estimates, and the gradients of KL and policy on a policy small enough to enumerate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from threedr1.engine.grpo_loss import clipped_surrogate, kl_estimate

from .grpo_batches import enumerate_policy, tensor


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
