"""The fused LM head against plain float32 log_softmax: values, gradients, chunking, masking."""

import pytest
import torch

from threedr1.models import lm_head, lm_head_torch
from threedr1.models.lm_head import cross_entropy, summed_loss, token_logprobs
from threedr1.utils import kernels

T, D, V = 11, 5, 23


def make(dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = (torch.randn(T, D, generator=generator) * scale).to(dtype)
    weight_VD = torch.randn(V, D, generator=generator).to(dtype)
    bias_V = torch.randn(V, generator=generator).to(dtype)
    targets_T = torch.randint(0, V, (T,), generator=generator)
    return hidden_TD, weight_VD, bias_V, targets_T


def plain(hidden_TD, weight_VD, targets_T, temperature=1.0, bias=None):
    logits_TV = (
        hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
        @ weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32)).T
    )
    if bias is not None:
        logits_TV = logits_TV + bias
    log_probs_TV = (logits_TV / temperature).log_softmax(-1)
    return log_probs_TV.gather(1, targets_T[:, None])[:, 0], -(log_probs_TV.exp() * log_probs_TV).sum(-1)


@pytest.mark.parametrize(("chunk_size", "vocab_chunk_size"), [(1, 1), (4, 7), (3, 23), (11, 5), (64, 64)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_equal_log_softmax(chunk_size, vocab_chunk_size, temperature, with_bias):
    hidden_TD, weight_VD, bias_V, targets_T = make(scale=3.0)
    bias = bias_V if with_bias else None
    got = token_logprobs(
        hidden_TD,
        weight_VD,
        targets_T,
        temperature=temperature,
        chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size,
        bias=bias,
    )
    logps_T, entropy_T = plain(hidden_TD, weight_VD, targets_T, temperature, bias)
    torch.testing.assert_close(got.logps_T, logps_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy_T, entropy_T, rtol=1e-5, atol=1e-5)


def test_hand_computed_value():
    """Logits (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8."""
    weight_VD = torch.tensor([[1.0], [2.0], [5.0]]).log()
    got = token_logprobs(torch.ones(1, 1), weight_VD, torch.tensor([1]), chunk_size=1, vocab_chunk_size=2)
    assert got.logps_T.item() == pytest.approx(-1.3862943, abs=1e-6)  # ln(1/4)
    assert got.entropy_T.item() == pytest.approx(0.9002560, abs=1e-6)  # 1/8 ln 8 + 2/8 ln 4 + 5/8 ln 8/5


@pytest.mark.parametrize(("chunk_size", "vocab_chunk_size"), [(4, 7), (3, 10), (64, 64)])
def test_gradcheck_in_double(chunk_size, vocab_chunk_size):
    hidden_TD, weight_VD, bias_V, targets_T = make(torch.float64)
    inputs = [value.requires_grad_() for value in (hidden_TD, weight_VD, bias_V)]

    def head(hidden, weight, bias):
        result = token_logprobs(
            hidden,
            weight,
            targets_T,
            temperature=0.7,
            chunk_size=chunk_size,
            vocab_chunk_size=vocab_chunk_size,
            bias=bias,
        )
        return result.logps_T, result.entropy_T

    assert torch.autograd.gradcheck(head, inputs)


@pytest.mark.parametrize("use_entropy", [False, True])
def test_gradients_equal_autograd_through_log_softmax(use_entropy):
    hidden_TD, weight_VD, _, targets_T = make()
    coefficients_T = torch.linspace(-1, 2, T)
    grads = []
    for head in (lambda h, w: token_logprobs(h, w, targets_T, chunk_size=4, vocab_chunk_size=6), None):
        hidden, weight = hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        logps_T, entropy_T = head(hidden, weight) if head else plain(hidden, weight, targets_T)
        loss = (coefficients_T * logps_T).sum() + (entropy_T.square().sum() if use_entropy else 0)
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_input_keeps_float32_products():
    hidden_TD, weight_VD, _, targets_T = make(torch.bfloat16, scale=4.0)
    got = token_logprobs(hidden_TD, weight_VD, targets_T, chunk_size=4, vocab_chunk_size=6)
    logps_T, entropy_T = plain(hidden_TD, weight_VD, targets_T)
    assert got.logps_T.dtype == torch.float32
    torch.testing.assert_close(got.logps_T, logps_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy_T, entropy_T, rtol=1e-5, atol=1e-5)
    hidden = hidden_TD.requires_grad_()
    token_logprobs(hidden, weight_VD, targets_T).logps_T.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_autocast_does_not_round_the_products():
    hidden_TD, weight_VD, _, targets_T = make(scale=4.0)
    want = token_logprobs(hidden_TD, weight_VD, targets_T).logps_T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden_TD, weight_VD, targets_T).logps_T
    assert torch.equal(got, want)


def test_large_logits_stay_finite():
    hidden_TD, weight_VD, _, targets_T = make(scale=1e4)
    got = token_logprobs(hidden_TD, weight_VD, targets_T, vocab_chunk_size=5)
    assert torch.isfinite(got.logps_T).all()
    torch.testing.assert_close(got.logps_T, plain(hidden_TD, weight_VD, targets_T)[0])


def test_frozen_weight_gets_no_gradient_product(monkeypatch):
    hidden_TD, weight_VD, _, targets_T = make()
    shapes = []
    add_product = lm_head._add_product

    def spy(total, *factors, **scales):
        shapes.append(tuple(total.shape))
        add_product(total, *factors, **scales)

    monkeypatch.setattr(lm_head, "_add_product", spy)
    hidden = hidden_TD.requires_grad_()
    token_logprobs(hidden, weight_VD, targets_T).logps_T.sum().backward()
    assert (V, D) not in shapes and shapes.count((T, D)) == 1
    assert weight_VD.grad is None
    shapes.clear()
    weight = weight_VD.requires_grad_()
    token_logprobs(hidden_TD, weight, targets_T).logps_T.sum().backward()
    assert (V, D) in shapes


def test_never_makes_more_than_one_tile_of_logits(monkeypatch):
    hidden_TD, weight_VD, _, targets_T = make()
    sizes = []
    tile_logits = lm_head._tile_logits

    def spy(*arguments):
        logits_CW = tile_logits(*arguments)
        sizes.append(tuple(logits_CW.shape))
        return logits_CW

    monkeypatch.setattr(lm_head, "_tile_logits", spy)
    token_logprobs(hidden_TD, weight_VD, targets_T, chunk_size=4, vocab_chunk_size=7)
    assert max(c for c, _ in sizes) == 4 and max(w for _, w in sizes) == 7
    assert sum(c * w for c, w in sizes) == T * V


def test_cross_entropy_equals_torch_and_ignores_masked_positions():
    hidden_TD, weight_VD, bias_V, targets_T = make()
    labels_T = targets_T.clone()
    labels_T[[0, 3, 4, 10]] = -100
    hidden = hidden_TD.requires_grad_()
    got = cross_entropy(hidden, weight_VD, labels_T, bias=bias_V, chunk_size=3)
    want = torch.nn.functional.cross_entropy(hidden @ weight_VD.T + bias_V, labels_T)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(want, hidden)[0])
    assert torch.equal(grad[[0, 3, 4, 10]], torch.zeros(4, D))


def test_cross_entropy_takes_batches_and_sums_over_micro_batches():
    hidden_TD, weight_VD, _, targets_T = make()
    hidden_BTD, labels_BT = hidden_TD[:10].reshape(2, 5, D), targets_T[:10].reshape(2, 5)
    labels_BT[0, :4] = -100
    whole = cross_entropy(hidden_BTD, weight_VD, labels_BT)
    parts = sum(cross_entropy(hidden_BTD[i], weight_VD, labels_BT[i], normalizer=6) for i in range(2))
    torch.testing.assert_close(parts, whole)


def test_all_masked_batch_gives_a_differentiable_zero():
    hidden_TD, weight_VD, _, _ = make()
    hidden, weight = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    with torch.no_grad():
        hidden[0] = float("inf")  # a zero made by multiplying would be NaN here
    loss = cross_entropy(hidden, weight, torch.full((T,), -100))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros(T, D)) and torch.equal(weight.grad, torch.zeros(V, D))


def test_a_vocabulary_of_several_blocks_and_a_single_token():
    """Wider than what a kernel holds at a time (4,096), in tiles that it does not divide; one token; one word."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, D, generator=generator).requires_grad_()
    weight_VD = torch.randn(9001, D, generator=generator)
    targets_T = torch.tensor([8999])
    got = token_logprobs(hidden, weight_VD, targets_T, temperature=0.8, vocab_chunk_size=4500)
    want = plain(hidden, weight_VD, targets_T, 0.8)
    torch.testing.assert_close(got.logps_T, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy_T, want[1], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(got.logps_T + got.entropy_T, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(want[0] + want[1], hidden)[0], rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(cross_entropy(hidden, weight_VD, targets_T), hidden)
    want = torch.nn.functional.cross_entropy(hidden @ weight_VD.T, targets_T)
    torch.testing.assert_close(grad, torch.autograd.grad(want, hidden)[0], rtol=1e-4, atol=1e-5)
    assert token_logprobs(hidden, weight_VD[:1], torch.tensor([0])) == (torch.zeros(1), torch.zeros(1))


def test_a_target_outside_the_vocabulary_makes_nan_where_nobody_looked(monkeypatch):
    """On a GPU targets are not looked at; the loss must not look healthy, nor the gradient be used."""
    hidden_TD, weight_VD, _, targets_T = make()
    targets_T[4] = V
    monkeypatch.setattr(lm_head, "_check", lambda *_: None)
    hidden = hidden_TD.requires_grad_()
    got = token_logprobs(hidden, weight_VD, targets_T, chunk_size=4, vocab_chunk_size=7)
    assert got.logps_T.isnan().nonzero().tolist() == got.entropy_T.isnan().nonzero().tolist() == [[4]]
    loss = cross_entropy(hidden, weight_VD, targets_T, chunk_size=4)
    assert loss.isnan()
    for value in (loss, got.logps_T.sum()):
        (grad,) = torch.autograd.grad(value, hidden)
        assert grad.isnan().any(1).tolist() == [row == 4 for row in range(T)]


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_gradcheck_of_cross_entropy_in_double(chunk_size):
    hidden_TD, weight_VD, bias_V, targets_T = make(torch.float64)
    targets_T[2] = -100
    inputs = [value.requires_grad_() for value in (hidden_TD, weight_VD, bias_V)]

    def head(hidden, weight, bias):
        return cross_entropy(hidden, weight, targets_T, bias=bias, chunk_size=chunk_size, normalizer=0.3)

    assert torch.autograd.gradcheck(head, inputs)


def test_cross_entropy_makes_its_logits_once(monkeypatch):
    hidden_TD, weight_VD, _, targets_T = make()
    sizes = []
    add_product = lm_head._add_product

    def spy(total, *factors, **scales):
        sizes.append(tuple(total.shape))
        add_product(total, *factors, **scales)

    monkeypatch.setattr(lm_head, "_add_product", spy)
    loss = cross_entropy(hidden_TD.requires_grad_(), weight_VD, targets_T, chunk_size=8)
    loss.backward()
    assert sizes == [(8, V), (8, D), (3, V), (3, D)]
    sizes.clear()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden_TD, weight_VD, targets_T), loss)
    assert sizes == [(T, V)]


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_sum_of_losses_comes_with_each_tokens_own(chunk_size):
    hidden_TD, weight_VD, bias_V, targets_T = make()
    hidden = hidden_TD.requires_grad_()
    loss, losses_T = summed_loss(hidden, weight_VD, targets_T, bias=bias_V, chunk_size=chunk_size)
    want_T = torch.nn.functional.cross_entropy(hidden @ weight_VD.T + bias_V, targets_T, reduction="none")
    torch.testing.assert_close(losses_T, want_T.detach())
    torch.testing.assert_close(loss, want_T.sum())
    assert loss.requires_grad and not losses_T.requires_grad
    (got,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (want,) = torch.autograd.grad(want_T.sum(), hidden)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        again, again_T = summed_loss(hidden, weight_VD, targets_T, bias=bias_V)
    torch.testing.assert_close((again, again_T), (loss.detach(), losses_T))


def test_what_comes_behind_cross_entropy_scales_its_gradient():
    hidden_TD, weight_VD, bias_V, targets_T = make()
    inputs = [value.requires_grad_() for value in (hidden_TD, weight_VD, bias_V)]
    got = cross_entropy(hidden_TD, weight_VD, targets_T, bias=bias_V, normalizer=torch.tensor(7.0), chunk_size=4)
    want = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T + bias_V, targets_T, reduction="sum") / 7
    for _ in range(2):
        grads = torch.autograd.grad(got.square(), inputs, retain_graph=True)
        for grad, expected in zip(grads, torch.autograd.grad(want.square(), inputs, retain_graph=True), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_bfloat16_rounds_gradients_only():
    hidden_TD, weight_VD, _, targets_T = make(torch.bfloat16, scale=2.0)
    wide = hidden_TD.float().requires_grad_()
    hidden = hidden_TD.requires_grad_()
    got, want = (cross_entropy(value, weight_VD, targets_T, ignore_index=None) for value in (hidden, wide))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(got, hidden)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, torch.autograd.grad(want, wide)[0].bfloat16(), rtol=1e-2, atol=1e-4)


def test_no_tokens():
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = torch.ones(V, D, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    result = token_logprobs(hidden, weight, nothing)
    assert result.logps_T.shape == result.entropy_T.shape == (0,)
    loss = cross_entropy(hidden, weight, nothing)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss + result.logps_T.sum(), (hidden, weight))
    assert grads[0].shape == (0, D) and torch.equal(grads[1], torch.zeros(V, D))


def test_the_variable_chooses_the_passes(monkeypatch):
    passes = (lm_head_torch.fold_tile, lm_head_torch.gradient_tile)
    monkeypatch.setenv("THREEDR1_LM_HEAD", "torch")
    assert lm_head._tile_passes(True, torch.float32) == passes
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    monkeypatch.setenv("THREEDR1_LM_HEAD", "triton")
    with pytest.raises(ValueError, match="pip install triton"):
        lm_head._tile_passes(True, torch.float32)
    monkeypatch.setenv("THREEDR1_LM_HEAD", "fast")
    with pytest.raises(ValueError, match="set it to torch or triton"):
        lm_head._tile_passes(False, torch.float32)
    monkeypatch.delenv("THREEDR1_LM_HEAD")
    assert lm_head._tile_passes(True, torch.float32) == lm_head._tile_passes(False, torch.float32) == passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_T": torch.full((T,), V)}, r"\[0, 23\)"),
        ({"targets_T": torch.full((T,), -100)}, "masked positions"),
        ({"targets_T": torch.zeros(T - 1, dtype=torch.long)}, "targets must be 11 integers"),
        ({"weight_VD": torch.zeros(V, D + 1)}, "hidden must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_size": 0}, "at least 1"),
        ({"vocab_chunk_size": 0}, "at least 1"),
        ({"bias": torch.zeros(V + 1)}, "bias must be"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, message):
    hidden_TD, weight_VD, _, targets_T = make()
    arguments = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "targets_T": targets_T} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_bad_labels_of_cross_entropy_are_one_clear_sentence():
    hidden_TD, weight_VD, _, targets_T = make()
    targets_T[3] = -1
    for hidden in (hidden_TD, hidden_TD.requires_grad_()):
        with pytest.raises(ValueError, match=r"\[-1, "):
            cross_entropy(hidden, weight_VD, targets_T)
    with pytest.raises(ValueError, match="do not belong together"):
        cross_entropy(hidden_TD, weight_VD, targets_T[:4])
