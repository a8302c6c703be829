"""The Triton passes over a tile against the plain ones.

Without a GPU the kernels run in Triton's interpreter. It must be on before Triton is imported, so one test starts a
process that runs the others, and all of the LM head's own tests, through the kernels.
"""

from pathlib import Path

import pytest
import torch

from threedr1.models import lm_head_torch

from ..triton_interpreter import inside, needs_triton, outside, run_through_interpreter

pytestmark = needs_triton


@outside
def test_the_head_through_the_interpreter():
    here = Path(__file__)
    run_through_interpreter([here.with_name("test_lm_head.py"), here], "THREEDR1_LM_HEAD")


def tile(width, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits_CW = torch.randn(5, width, generator=generator) * scale
    # before, first and last column, somewhere, behind
    targets_C = torch.tensor([99, 100, 100 + width - 1, 100 + width // 2, 100 + width])
    state_4C = torch.tensor([float("-inf"), 0.0, 0.0, float("nan")])[:, None].repeat(1, 7)[:, 1:6]
    return logits_CW, targets_C, state_4C


# columns of a block are 4,096
@inside
@pytest.mark.parametrize("width", [1, 37, 4096, 9001])
def test_fold_equals_the_plain_one_over_two_tiles(width):
    from threedr1.models import lm_head_triton

    states = []
    for passes in (lm_head_triton, lm_head_torch):
        logits_CW, targets_C, state_4C = tile(width)
        assert not state_4C.is_contiguous()
        passes.fold_tile(logits_CW, targets_C, state_4C, 100)
        assert state_4C[3].isnan().tolist() == [True, False, False, False, True]
        passes.fold_tile(tile(width, seed=1)[0] + 4, targets_C, state_4C, 100 + width)
        assert state_4C[3].isnan().tolist() == [True, False, False, False, False]
        states.append(state_4C)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5, equal_nan=True)


@inside
@pytest.mark.parametrize("width", [1, 37, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_equals_the_plain_one_and_lies_on_the_logits(width, dtype, with_entropy):
    from threedr1.models import lm_head_triton

    generator = torch.Generator().manual_seed(2)
    grad_logps_C, grad_entropy_C = torch.randn(2, 5, generator=generator)
    gradients = []
    for passes in (lm_head_triton, lm_head_torch):
        logits_CW, targets_C, _ = tile(width)
        mean_C = (logits_CW.softmax(1) * logits_CW).sum(1)
        gradient_CW = passes.gradient_tile(
            logits_CW,
            targets_C,
            logits_CW.logsumexp(1),
            mean_C,
            grad_logps_C,
            grad_entropy_C if with_entropy else None,
            100,
            dtype,
        )
        assert gradient_CW.dtype == dtype and gradient_CW.shape == (5, width)
        if passes is lm_head_triton:
            assert gradient_CW.data_ptr() == logits_CW.data_ptr()
        gradients.append(gradient_CW)
    # where float32 values differ in their last digits, rounding may part them by one step
    torch.testing.assert_close(*gradients, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@inside
def test_the_kernels_serve_float32_and_less():
    from threedr1.models import lm_head, lm_head_triton

    assert lm_head._tile_passes(False, torch.float32)[0] is lm_head_triton.fold_tile
    assert lm_head._tile_passes(False, torch.float64)[0] is lm_head_torch.fold_tile
