"""The kernels of a decoding step, in Triton's interpreter: every test of decoding with them, and long prompts."""

from pathlib import Path

import pytest
import torch

from threedr1.models.attention import Documents
from threedr1.models.kv_cache import KVCache, _KernelSteps, _PlainSteps

from ..triton_interpreter import inside, needs_triton, outside, run_through_interpreter

HERE = Path(__file__)


@outside
@needs_triton
@pytest.mark.slow
def test_decoding_in_the_interpreter():
    run_through_interpreter([HERE, HERE.with_name("test_decoding.py")], "THREEDR1_DECODING")


def filled(width=16, heads=14, kv_heads=2, dtype=torch.float32):
    cache = KVCache(2, heads, kv_heads, width, dtype=dtype, device=torch.device("cpu"))
    assert isinstance(cache._steps, _KernelSteps) and not cache.fits_graphs
    return cache


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("piece", [100, 256])
def test_prompts_in_pieces_and_long_completions(dtype, piece, monkeypatch):
    """Several tiles of queries, of pieces and of keys; strides of a joined product; rows that leave."""
    from threedr1.models import decode_attention_triton as kernels

    monkeypatch.setattr(kernels, "PIECE", piece)
    lengths, prompt_of = [250, 3, 101], [0] * 10 + [1] + [2] * 2
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, 16, generator=generator).to(dtype)

    ours, theirs = filled(dtype=dtype), filled(dtype=dtype)
    theirs._steps = _PlainSteps(theirs)
    theirs.said = theirs._steps.empty_said(0, 0)
    prompt = random(sum(lengths), 14), random(sum(lengths), 2), random(sum(lengths), 2)
    said = random(2, 13, 80, 2)
    for cache in (ours, theirs):
        cache.start(lengths, len(prompt_of), 80)
        cache.prefill(Documents.of(lengths, "cpu"), 0).attend(1, *prompt, 0.3)
        cache.set_rows(prompt_of)
        cache.said[:, 1] = said if cache is ours else said.transpose(2, 3)
    for step, kept in ((70, [0, 3, 4, 10, 12]), (71, [0, 1, 2]), (72, None)):
        joined = random(len(ours.prompt_of), 14 + 2 + 2)
        query, key, value = joined.split([14, 2, 2], dim=1)
        found = []
        for cache in (ours, theirs):
            cache.advance(step)
            found.append(cache.attend(1, query, key, value, 0.3).float())
            if kept:
                cache.keep(kept)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)
        assert not found[0].isnan().any()


@inside
def test_longer_prompts_get_more_slots():
    cache = filled()
    for length, slots in ((5, 2), (256, 2), (257, 4), (700, 4), (769, 8), (3, 8)):
        moved = cache._steps.slots != slots
        assert cache.start([length], 1, 4) >= moved and len(cache._steps.lse_ZRH) == cache._steps.slots == slots


@inside
@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (8, torch.float32), (16, torch.float64)])
def test_other_heads_and_float64_take_plain_products(width, dtype):
    cache = KVCache(1, 4, 2, width, dtype=dtype, device=torch.device("cpu"))
    assert isinstance(cache._steps, _PlainSteps)
