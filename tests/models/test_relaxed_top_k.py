"""The relaxed top-k, its gradient through the hard choice, and weights that find a planted optimum."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from threedr1.models.relaxed_top_k import gate_views, soft_top_k, straight_through
from threedr1.models.view_selector import top_views, utility

UTILITIES = st.lists(st.floats(-3, 3), min_size=2, max_size=12)


def as_double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the relaxation ----------------------------------------------------------------------------------------------


def test_by_hand():
    # two views, one chosen: p = sigmoid((u1 - u2) / (2 tau))
    p = soft_top_k(as_double([0.7, 0.3]), 1, 0.1)
    torch.testing.assert_close(p, torch.sigmoid(as_double([2.0, -2.0])))
    torch.testing.assert_close(soft_top_k(torch.full((5,), 0.4), 2, 0.1), torch.full((5,), 0.4))
    assert soft_top_k(torch.tensor([0.1, 0.9]), 2, 0.1).tolist() == [1, 1] == soft_top_k(torch.zeros(2), 6, 1).tolist()
    with pytest.raises(ValueError, match="must be above 0"):
        soft_top_k(torch.zeros(3), 1, 0.0)


@settings(deadline=None, max_examples=60)
@given(UTILITIES, st.integers(1, 11), st.floats(0.01, 5))
@example(values=[0.0, 0.0, 0.0, 1.5, 2.5, 1.0, 2.0, 0.125, 0.125], count=1, temperature=1.0)  # the ninth stood alone
def test_sums_to_the_count_and_keeps_the_order(values, count, temperature):
    count = min(count, len(values) - 1)
    u = as_double(values)
    p = soft_top_k(u, count, temperature)
    assert float(p.sum()) == pytest.approx(count, abs=1e-8) and p.min() >= 0 and p.max() <= 1
    order = torch.argsort(u)
    assert (p[order].diff() >= 0).all()


def test_hard_as_the_temperature_falls():
    u = as_double([0.1, 0.9, 0.4, 0.6, -0.2])
    torch.testing.assert_close(soft_top_k(u, 2, 1e-3), as_double([0, 1, 0, 1, 0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(soft_top_k(u, 2, 1e4), as_double([0.4] * 5), atol=1e-4, rtol=0)


def test_it_maximises_the_entropy_regularised_objective():
    """No feasible step away from p, in any direction that keeps the sum, does better."""
    generator = torch.Generator().manual_seed(0)
    u, temperature = torch.randn(7, generator=generator, dtype=torch.float64), 0.4

    def objective(p):
        return p @ u + temperature * -(p * p.log() + (1 - p) * (1 - p).log()).sum()

    p = soft_top_k(u, 3, temperature)
    for _ in range(200):
        step = torch.randn(7, generator=generator, dtype=torch.float64)
        step -= step.mean()
        step *= 0.5 * torch.minimum(p.min(), 1 - p.max()) / step.abs().max()
        assert objective(p) > objective(p + step)


@settings(deadline=None, max_examples=25)
@given(UTILITIES, st.integers(1, 11), st.floats(0.2, 2))
def test_jacobian_is_the_derivative(values, count, temperature):
    count = min(count, len(values) - 1)
    u = as_double(values).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: soft_top_k(u, count, temperature), (u,), eps=1e-5, atol=1e-6)
    slope = (lambda p: p * (1 - p))(soft_top_k(u, count, temperature).detach())
    closed = (torch.diag(slope) - torch.outer(slope, slope) / slope.sum()) / temperature
    found = torch.autograd.functional.jacobian(lambda u: soft_top_k(u, count, temperature), u.detach())
    torch.testing.assert_close(found, closed, atol=1e-9, rtol=1e-6)


# -- straight through --------------------------------------------------------------------------------------------


def test_gates_leave_every_bit_of_the_tokens(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(5, generator=generator).requires_grad_()
    chosen = top_views(u, 3)
    tokens = [torch.randn(4, 8, generator=generator).to(dtype) for _ in chosen]
    gates = straight_through(soft_top_k(u, 3, 0.5), chosen)
    assert gates.tolist() == [1, 1, 1]
    gated = gate_views(tokens, gates)
    assert all(torch.equal(one, other) and other.dtype == dtype for one, other in zip(tokens, gated, strict=True))
    sum(part.float().square().sum() for part in gated).backward()
    assert u.grad is not None and u.grad.abs().min() > 0
    assert gate_views([], torch.ones(0)) == []


def test_gradient_of_the_weights_equals_finite_differences_of_the_relaxed_objective():
    """In float64: the loss is a function of tokens that fade to their mean as their inclusion falls."""
    generator = torch.Generator().manual_seed(2)
    names, count, temperature = ("text_to_3d", "image_to_3d", "clip"), 3, 0.3
    scores = {name: torch.rand(8, generator=generator, dtype=torch.float64) for name in names}
    tokens = torch.randn(8, 4, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def loss(rows) -> torch.Tensor:
        return torch.tanh(torch.cat(rows) @ mix).square().sum().sqrt()

    def inclusion(weights_2):
        return soft_top_k(utility(scores, weights_2[0], weights_2[1]), count, temperature)

    start = as_double([0.3, 0.5])
    chosen = top_views(utility(scores, start[0], start[1]), count)
    blank = tokens[chosen].mean((0, 1))

    def relaxed(weights_2) -> torch.Tensor:
        gates = 1 + (inclusion(weights_2) - inclusion(start))[chosen]
        return loss([blank + gate * (tokens[view] - blank) for gate, view in zip(gates, chosen, strict=True)])

    weights = start.clone().requires_grad_()
    gates = straight_through(inclusion(weights), chosen)
    loss(gate_views([tokens[view] for view in chosen], gates)).backward()
    assert weights.grad is not None
    for index in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[index] = 1e-5
        difference = (relaxed(start + step) - relaxed(start - step)) / 2e-5
        assert abs(float(difference)) > 1e-3
        assert float(weights.grad[index]) == pytest.approx(float(difference), rel=1e-6)


# -- a planted optimum -------------------------------------------------------------------------------------------


def learn(planted: str, seed: int, steps: int = 120) -> tuple[float, float]:
    """w_text and w_image after training with a small Qwen2 where only one score says which views hold the answer.

    Two of eight views show the answer's tokens, the others tokens of random answers; the planted score is higher for
    these two, the other two scores are noise. The language model learns to read from scratch, beside the weights.
    """
    num_views, count, num_tokens, width, answers, rows = 8, 2, 3, 32, 6, 16
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    decoder, head, ask = Qwen2Model(config), nn.Linear(width, answers), nn.Parameter(torch.randn(1, width))
    words = torch.randn(answers, num_tokens, width, generator=generator)
    w_text, w_image = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))
    readers = [*decoder.parameters(), *head.parameters(), ask]
    adam = torch.optim.Adam([{"params": readers, "lr": 3e-3}, {"params": [w_text, w_image], "lr": 1e-2}])
    for _ in range(steps):
        embedded, targets = [], torch.randint(answers, (rows,), generator=generator)
        for target in targets:
            shown, right = torch.randint(answers, (num_views,), generator=generator), torch.zeros(num_views)
            right[torch.randperm(num_views, generator=generator)[:count]] = 1
            shown[right > 0] = target
            scores = {
                name: torch.rand(num_views, generator=generator) * 0.6
                for name in ("text_to_3d", "image_to_3d", "clip")
            }
            scores[planted] = 0.2 * torch.rand(num_views, generator=generator) + 0.4 * right
            found = utility(scores, w_text, w_image)
            chosen = top_views(found, count)
            gates = straight_through(soft_top_k(found, count, 0.5 * float(found.detach().std())), chosen)
            noise = 0.1 * torch.randn(count, num_tokens, width, generator=generator)
            embedded.append(torch.cat([*gate_views(list(words[shown[chosen]] + noise), gates), ask]))
        hidden = decoder(inputs_embeds=torch.stack(embedded)).last_hidden_state[:, -1]
        adam.zero_grad()
        (F.cross_entropy(head(hidden), targets) + 0.1 * (w_text - 0.3) ** 2).backward()
        adam.step()
        with torch.no_grad():
            w_image.clamp_(0, 1)
    return w_text.item(), w_image.item()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_move_to_a_planted_optimum(seed):
    """From (0.3, 0.5): to w_image 1 where only that score tells, to 0 where only S_CLIP tells, w_text up or not."""
    w_text, w_image = learn("text_to_3d", seed)
    assert w_text > 0.45 and 0.3 < w_image < 0.7
    w_text, w_image = learn("image_to_3d", seed)
    assert w_image > 0.65 and w_text < 0.4
    w_text, w_image = learn("clip", seed)
    assert w_image < 0.35 and w_text < 0.4
