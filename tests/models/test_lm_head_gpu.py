"""The LM head on a CUDA device, in its kernels and in plain PyTorch, against float64 on the same device."""

import importlib.util

import pytest
import torch

from threedr1.models import lm_head, lm_head_torch
from threedr1.models.lm_head import cross_entropy, token_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# the gradient of a tile is rounded to the dtype of the input, and so is the result
GRADIENT_ERROR = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["triton", "torch"], autouse=True)
def passes(request, monkeypatch):
    """Every test runs with both kinds of passes; the kernels are what a GPU takes where nothing is said."""
    if request.param == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        monkeypatch.delenv("THREEDR1_LM_HEAD", raising=False)
        assert lm_head._tile_passes(True, torch.float32)[0] is not lm_head_torch.fold_tile
    else:
        monkeypatch.setenv("THREEDR1_LM_HEAD", "torch")
    return request.param


def make(shape, dtype, scale=1.0, seed=0):
    """hidden [T, D] (logits have a spread of 3 `scale`), weight [V, D], bias [V], targets [T], on the device."""
    tokens, width, vocabulary = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"generator": generator, "device": "cuda"}
    hidden_TD = (torch.randn(tokens, width, **options) * scale).to(dtype)
    weight_VD = (torch.randn(vocabulary, width, **options) * 3 * width**-0.5).to(dtype)
    bias_V = torch.randn(vocabulary, **options).to(dtype)
    return hidden_TD, weight_VD, bias_V, torch.randint(vocabulary, (tokens,), **options)


def exact(hidden_TD, weight_VD, bias_V, targets_T, temperature=1.0):
    """Log-probability and entropy, each [T], from all logits."""
    logits_TV = hidden_TD @ weight_VD.T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logps_TV = (logits_TV / temperature).log_softmax(-1)
    return logps_TV.gather(1, targets_T[:, None])[:, 0], -(logps_TV.exp() * logps_TV).sum(-1)


def leaves(values, dtype=None):
    """Copies that want a gradient; None stays."""
    return [None if value is None else value.detach().to(dtype or value.dtype).requires_grad_() for value in values]


def assert_near(got, want, error):
    """Relative distance of two tensors as vectors."""
    distance = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)
    assert distance <= error, f"{float(distance):.2e} > {error:.0e}"


def assert_gradients(loss, inputs, expected_loss, wide, dtype):
    inputs, wide = ([value for value in values if value is not None] for values in (inputs, wide))
    grads = torch.autograd.grad(loss, inputs)
    for grad, want, value in zip(grads, torch.autograd.grad(expected_loss, wide), inputs, strict=True):
        assert grad.dtype == dtype and grad.shape == value.shape
        assert_near(grad, want, GRADIENT_ERROR[dtype])


SHAPES = [(1, 64, 1000), (1, 8, 1), (37, 72, 9001), (300, 128, 20000), (130, 33, 4097)]


@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("temperature", "with_bias"), [(1.0, False), (0.6, False), (1.3, True)])
def test_logprobs_and_entropy_equal_float64(dtype, shape, temperature, with_bias):
    *inputs, targets_T = make(shape, dtype)
    if not with_bias:
        inputs[2] = None
    ours, wide = leaves(inputs), leaves(inputs, torch.float64)
    got = token_logprobs(
        ours[0], ours[1], targets_T, temperature=temperature, bias=ours[2], chunk_size=128, vocab_chunk_size=4500
    )
    want = exact(*wide, targets_T, temperature)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    weights_T = torch.linspace(-1, 2, shape[0], device="cuda")
    if shape[2] > 1:  # of a single word all gradients are 0
        loss, expected = ((weights_T * logps_T).sum() + entropy_T.square().sum() for logps_T, entropy_T in (got, want))
        assert_gradients(loss, ours, expected, wide, dtype)


@pytest.mark.parametrize("use", ["logps", "entropy"])
def test_each_result_alone_has_its_gradient(use):
    *inputs, targets_T = make((50, 64, 5000), torch.bfloat16)
    ours, wide = leaves(inputs), leaves(inputs, torch.float64)
    got = token_logprobs(ours[0], ours[1], targets_T, bias=ours[2], vocab_chunk_size=3000)
    want = exact(*wide, targets_T)
    index = ["logps", "entropy"].index(use)
    assert_gradients(got[index].sum(), ours, want[index].sum(), wide, torch.bfloat16)


@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR), ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_equals_float64(dtype, shape, with_bias):
    *inputs, labels_T = make(shape, dtype)
    if not with_bias:
        inputs[2] = None
    if shape[0] > 1:
        labels_T[::3] = -100
    ours, wide = leaves(inputs), leaves(inputs, torch.float64)
    got = cross_entropy(ours[0], ours[1], labels_T, bias=ours[2], chunk_size=48)
    logits_TV = wide[0] @ wide[1].T
    want = torch.nn.functional.cross_entropy(logits_TV if wide[2] is None else logits_TV + wide[2], labels_T)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(ours[0], ours[1], labels_T, bias=ours[2]), got, rtol=1e-5, atol=1e-5)
    assert_gradients(got, ours, want, wide, dtype)
    if shape[0] > 1:
        (grad,) = torch.autograd.grad(cross_entropy(ours[0], ours[1], labels_T), ours[0])
        assert not grad[::3].any() and grad[1::3].any()


def test_a_small_vocabulary_takes_more_tokens_at_a_time():
    hidden_TD, weight_VD, _, targets_T = make((5000, 64, 1000), torch.float32)
    ours, chunked = leaves((hidden_TD, weight_VD)), leaves((hidden_TD, weight_VD))
    got, want = cross_entropy(*ours, targets_T), cross_entropy(*chunked, targets_T, chunk_size=1024)
    torch.testing.assert_close(got, want)
    for own, other in zip(torch.autograd.grad(got, ours), torch.autograd.grad(want, chunked), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


def test_extreme_logits_stay_finite_and_right():
    hidden_TD, weight_VD, _, targets_T = make((40, 64, 9001), torch.bfloat16, scale=1e4)
    hidden = hidden_TD.requires_grad_()
    got = token_logprobs(hidden, weight_VD, targets_T, vocab_chunk_size=4500)
    want = exact(hidden.detach().double(), weight_VD.double(), None, targets_T)
    # float32 logits of 1e5 are known to 1e-2
    torch.testing.assert_close(got.logps_T.double(), want[0], rtol=1e-6, atol=0.1)
    torch.testing.assert_close(got.entropy_T.double(), want[1], rtol=0.1, atol=0.1)
    for loss in (got.logps_T.sum() + got.entropy_T.sum(), cross_entropy(hidden, weight_VD, targets_T)):
        (grad,) = torch.autograd.grad(loss, hidden)
        assert torch.isfinite(grad).all() and grad.any()


def test_no_tokens_and_all_ignored():
    hidden_TD, weight_VD, bias_V, _ = make((5, 64, 1000), torch.bfloat16)
    inputs = leaves((hidden_TD, weight_VD, bias_V))
    labels_T = torch.full((5,), -100, device="cuda")
    nothing = token_logprobs(inputs[0][:0], inputs[1], labels_T[:0], bias=inputs[2])
    assert nothing.logps_T.shape == nothing.entropy_T.shape == (0,)
    loss = cross_entropy(inputs[0], inputs[1], labels_T, bias=inputs[2])
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss + nothing.logps_T.sum(), inputs):
        assert not grad.any()


def test_a_target_outside_the_vocabulary_is_nan():
    hidden_TD, weight_VD, _, targets_T = make((6, 64, 1000), torch.bfloat16)
    targets_T[2], targets_T[4] = 1000, -100
    hidden = hidden_TD.requires_grad_()
    got = token_logprobs(hidden, weight_VD, targets_T, vocab_chunk_size=300)
    loss = cross_entropy(hidden, weight_VD, targets_T, ignore_index=None)
    assert got.logps_T.isnan().nonzero()[:, 0].tolist() == [2, 4] and loss.isnan()
    for value in (got.logps_T.sum(), loss):
        (grad,) = torch.autograd.grad(value, hidden)
        assert grad.isnan().any(1).nonzero()[:, 0].tolist() == [2, 4]


@pytest.mark.parametrize("shape", [(200, 128, 20000)], ids=str)
def test_nothing_waits_for_the_device(shape):
    hidden_TD, weight_VD, _, targets_T = make(shape, torch.bfloat16)

    def steps():
        hidden = hidden_TD.detach().requires_grad_()
        got = token_logprobs(hidden, weight_VD, targets_T, temperature=0.9)
        (got.logps_T.mean() + got.entropy_T.mean()).backward()
        cross_entropy(hidden, weight_VD, targets_T, ignore_index=None).backward()

    steps()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_takes_one_tile_and_its_gradients(passes):
    """Tile, float32 gradient of the hidden states, its copy in bfloat16; the plain passes need tiles beside it."""
    hidden_TD, weight_VD, _, targets_T = make((2048, 256, 32000), torch.bfloat16)
    hidden = hidden_TD.requires_grad_()
    gradients = 6 * hidden.numel() + 2**20

    def peak(step):
        step()  # compiles, and cuBLAS takes its workspace
        hidden.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def logprobs():
        got = token_logprobs(hidden, weight_VD, targets_T, chunk_size=1024, vocab_chunk_size=16384)
        (got.logps_T.sum() + got.entropy_T.sum()).backward()

    def loss():
        cross_entropy(hidden, weight_VD, targets_T, ignore_index=None, chunk_size=512).backward()

    copies = 1 if passes == "triton" else 4
    assert peak(logprobs) <= copies * 1024 * 16384 * 4 + gradients
    assert peak(loss) <= copies * 512 * 32000 * 4 + gradients


def test_strides_other_dtypes_and_autocast_change_nothing():
    hidden_TD, weight_VD, _, targets_T = make((64, 128, 9001), torch.bfloat16)
    want = token_logprobs(hidden_TD, weight_VD, targets_T)
    strided_TD = torch.stack([hidden_TD, hidden_TD], 1)[:, 1]
    columns_VD = weight_VD.T.contiguous().T
    assert not strided_TD.is_contiguous() and not columns_VD.is_contiguous()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for hidden, weight in ((strided_TD, columns_VD), (hidden_TD, weight_VD.float())):
            hidden = hidden.detach().requires_grad_()
            got = token_logprobs(hidden, weight, targets_T.to(torch.int32))
            for value, expected in zip(got, want, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
            loss = cross_entropy(hidden, weight, targets_T)
            torch.testing.assert_close(loss, -want.logps_T.mean(), rtol=1e-5, atol=1e-5)
            grads = [torch.autograd.grad(value, hidden)[0] for value in (loss, -got.logps_T.mean())]
            assert_near(*grads, 1e-2)


def test_the_size_of_qwen2_5_7b():
    """Default tiles, with tokens left over; some targets are the last word of a tile."""
    hidden_TD, weight_VD, _, targets_T = make((1100, 3584, 152064), torch.bfloat16)
    targets_T[:9] = torch.arange(1, 10, device="cuda") * 16896 - 1
    hidden, wide = hidden_TD.requires_grad_(), hidden_TD.detach().double().requires_grad_()
    got = token_logprobs(hidden, weight_VD, targets_T)
    loss = cross_entropy(hidden, weight_VD, targets_T)
    (grad,) = torch.autograd.grad(loss, hidden)
    (grad_logps,) = torch.autograd.grad(-got.logps_T.mean(), hidden)
    weight_VD = weight_VD.double()
    for span in (slice(0, 64), slice(1000, 1064)):
        logps_C, entropy_C = exact(wide[span], weight_VD, None, targets_T[span])
        torch.testing.assert_close(got.logps_T[span].double(), logps_C, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got.entropy_T[span].double(), entropy_C, rtol=1e-5, atol=1e-4)
        (want,) = torch.autograd.grad(-logps_C.sum() / len(targets_T), wide)
        assert_near(grad[span], want[span], 1e-2)
        assert_near(grad_logps[span], want[span], 1e-2)
