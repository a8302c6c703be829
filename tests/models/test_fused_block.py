"""Fused blocks against transformers' blocks with peft's adapters: values, gradients, several adapters."""

import pytest
import torch

from threedr1.models.block_parts import gate_back, gate_into, normalize_back, normalize_into, rotate_, rotate_back
from threedr1.models.fused_block import Joined
from threedr1.models.inputs import IGNORE, Row, assemble
from threedr1.models.language_model import (
    active_adapter,
    add_lora,
    copy_lora,
    load_language_model,
    merge_lora,
    save_language_model,
)
from threedr1.models.lm_head import cross_entropy

from .adapted import adapted


def lora_model(folder, *, last_blocks=0, rank=4, dtype="float32"):
    return adapted(folder, rank=rank, alpha=3 * rank, std=0.1, last_blocks=last_blocks, dtype=dtype)


def text_rows(language, lengths=(9, 14, 5)):
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in lengths:
        ids = torch.randint(20, 300, (length,), generator=generator).tolist()
        rows.append(Row(ids, [0] * length, [IGNORE] * 2 + ids[2:], []))
    return rows


def run(language, rows, *, backward=True):
    """Loss, last hidden states, and gradients of the adapters and of what goes in."""
    inputs = assemble(
        rows,
        embed_tokens=language.embedding,
        scene_tokens=None,
        image_tokens=None,
        pad_id=language.pad_id,
        packed_length=40,
    )
    inputs.inputs_embeds_BLD = inputs.inputs_embeds_BLD.detach().requires_grad_()
    hidden = language.hidden(inputs)
    if not backward:
        return hidden.detach()
    loss = cross_entropy(
        hidden.flatten(0, 1)[inputs.predicting_T], language.head_weight_VD, inputs.targets_T, normalizer=1.0
    )
    loss.backward()
    gradients = {name: value.grad for name, value in language.named_parameters() if value.grad is not None}
    for value in language.parameters():
        value.grad = None
    return float(loss.detach()), hidden.detach(), gradients | {"inputs": inputs.inputs_embeds_BLD.grad}


def assert_same(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=tolerance)
    assert ours[2].keys() == theirs[2].keys() and len(theirs[2]) > 14
    for name, gradient in theirs[2].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[2][name], gradient, atol=tolerance * scale, rtol=tolerance, msg=name)


@pytest.mark.parametrize(("last_blocks", "rank"), [(0, 4), (1, 4), (0, 1), (0, 17)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_equal_plain_blocks(tiny_qwen, last_blocks, rank, checkpointing):
    language = lora_model(tiny_qwen, last_blocks=last_blocks, rank=rank).train()
    rows = text_rows(language)
    plain = run(language, rows)
    weights = {name: value.detach().clone() for name, value in language.named_parameters()}
    language.fuse_blocks()
    if checkpointing:
        language.base.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        assert_same(run(language, rows), plain, 2e-5)
    for name, value in language.named_parameters():
        assert torch.equal(value, weights[name]), name


def test_plain_blocks_and_saving_go_on_with_joined_weights(tiny_qwen, tmp_path):
    language = lora_model(tiny_qwen)
    rows = text_rows(language)
    language.eval()
    before = run(language, rows, backward=False)
    language.fuse_blocks()
    fused, language.fused = language.fused, None
    torch.testing.assert_close(run(language, rows, backward=False), before, atol=1e-6, rtol=1e-6)
    language.fused = fused
    # an adapter that moves is followed
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    moved = run(language, rows, backward=False)
    language.fused = None
    torch.testing.assert_close(moved, run(language, rows, backward=False), atol=2e-5, rtol=2e-5)
    assert float((moved - before).abs().max()) > 1e-3


def test_another_adapter_counts_while_it_is_active(tiny_qwen):
    language = lora_model(tiny_qwen)
    copy_lora(language, "policy", "ref")
    rows = text_rows(language)
    language.fuse_blocks()
    start = run(language, rows, backward=False)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_B.policy" in name:
                parameter.add_(0.05)
    moved = run(language, rows, backward=False)
    with active_adapter(language, "ref"):
        assert torch.equal(run(language, rows, backward=False), start)
    assert not torch.allclose(moved, start, atol=1e-3)
    assert torch.equal(run(language, rows, backward=False), moved)
    with language.model.disable_adapter():
        base = run(language, rows, backward=False)
        language.fused = None
        torch.testing.assert_close(run(language, rows, backward=False), base, atol=2e-5, rtol=2e-5)


def test_adapters_of_two_ranks_take_turns(tiny_qwen):
    language = lora_model(tiny_qwen, rank=8)
    add_lora(language, "small", rank=3, alpha=3)
    for name, parameter in language.named_parameters():
        if "lora_B.small" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    rows = text_rows(language)
    language.fuse_blocks()
    for name in ("policy", "small", "policy", "small"):
        with active_adapter(language, name):
            ours = run(language, rows, backward=False)
            fused, language.fused = language.fused, None
            torch.testing.assert_close(ours, run(language, rows, backward=False), atol=2e-5, rtol=2e-5)
            language.fused = fused


def test_only_the_second_factors_may_learn(tiny_qwen):
    language = lora_model(tiny_qwen)
    for name, parameter in language.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    rows = text_rows(language)
    plain = run(language, rows)
    language.fuse_blocks()
    assert_same(run(language, rows), plain, 2e-5)
    assert not any("lora_A" in name for name in plain[2])


def test_an_adapter_that_comes_goes_or_is_merged_is_not_missed(tiny_qwen, tmp_path):
    language = lora_model(tiny_qwen)
    rows = text_rows(language)
    language.fuse_blocks()
    before = run(language, rows, backward=False)
    save_language_model(language, tmp_path / "whole")
    again = load_language_model(tmp_path / "whole", dtype="float32")
    with language.model.disable_adapter():
        base = run(language, rows, backward=False)
    torch.testing.assert_close(run(again, rows, backward=False), base, atol=2e-5, rtol=2e-5)
    fused = language.fused
    add_lora(language, "large", rank=12, alpha=12)
    assert language.fused is None
    with pytest.raises(ValueError, match="came after the blocks were fused"):
        fused.blocks[0].qkv.factors()
    language.model.set_adapter("policy")
    language.fuse_blocks()
    merge_lora(language)
    assert language.fused is None and not language.has_adapter
    torch.testing.assert_close(run(language, rows, backward=False), before, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_fused_is_said(tiny_qwen):
    language = load_language_model(tiny_qwen, dtype="float32")
    with pytest.raises(ValueError, match="weights that learn cannot be fused; set blocks to compiled or plain"):
        language.fuse_blocks()
    layers = [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(2)]
    joined = Joined(layers)
    assert joined.weight.shape == (8, 4), "without adapters there are no columns for them"
    assert joined.factors().down_RK is None and joined.factors().up == []
    merged = lora_model(tiny_qwen)
    merged.fuse_blocks()
    merged.model.merge_adapter()
    with pytest.raises(ValueError, match="take no adapter merged into the weights"):
        run(merged, text_rows(merged), backward=False)


# Pointwise parts against autograd in float64 -----------------------------------------------------------------------


def made(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_norm_and_its_gradient():
    x, weight, grad, add = made(5, 8).requires_grad_(), made(8, seed=1), made(5, 8, seed=2), made(5, 8, seed=3)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-3)
    expected.backward(grad)
    out = torch.empty(5, 8, dtype=torch.float64)
    with torch.no_grad():
        normalize_into(x, weight, 1e-3, out)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(normalize_back(x, weight, 1e-3, grad, None), x.grad)
        torch.testing.assert_close(normalize_back(x, weight, 1e-3, grad, add), x.grad + add)


def test_gate_and_its_gradient():
    x, grad = made(4, 12).requires_grad_(), made(4, 6, seed=1)
    gate, up = x.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad)
    out = torch.empty(4, 6, dtype=torch.float64)
    with torch.no_grad():
        gate_into(x, out)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gate_back(x, grad), x.grad)
        torch.testing.assert_close(grad, expected.detach())


def test_rotation_is_undone_by_its_transpose():
    angles = made(6, 4, seed=4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    queries, keys, values = made(6, 3, 8), made(6, 2, 8, seed=1), made(6, 2, 8, seed=2)
    both = torch.cat([queries, keys], dim=1)
    rotate_(both, cos, sin)
    first, second = queries[..., :4], queries[..., 4:]
    by_hand = torch.cat([first * angles.cos()[:, None, :4] - second * angles.sin()[:, None, :4],
                         second * angles.cos()[:, None, :4] + first * angles.sin()[:, None, :4]], dim=-1)  # fmt: skip
    torch.testing.assert_close(both[:, :3], by_hand)
    back = rotate_back(both[:, :3], both[:, 3:], values, cos, sin)
    torch.testing.assert_close(back, torch.cat([queries, keys, values], dim=1).flatten(1))
