"""Decoding and shared prompts on a CUDA device in bfloat16: Triton kernels, CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from threedr1.models.attention import Documents, Groups, attend_documents
from threedr1.models.decoding import Decoder
from threedr1.models.inputs import IGNORE, Mentions, Row, assemble
from threedr1.models.kv_cache import KVCache, _KernelSteps, _PlainSteps
from threedr1.models.lm_head import token_logprobs

from .adapted import adapted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (37, 5, 640, 256, 1)


def random(*shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def test_steps_by_the_kernel_equal_plain_ones():
    prompt_of = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    caches = []
    for _ in range(2):
        cache = KVCache(2, 28, 4, 128, dtype=torch.bfloat16, device=torch.device("cuda"))
        assert isinstance(cache._steps, _KernelSteps)
        if caches:
            cache._steps = _PlainSteps(cache)
            cache.said = cache._steps.empty_said(0, 0)
        cache.start(LENGTHS, len(prompt_of), 9)
        query, key, value = (random(sum(LENGTHS), heads, 128, seed=heads) for heads in (28, 4, 4))
        cache.prefill(Documents.of(LENGTHS, "cuda"), 0).attend(1, query, key, -value, 0.1)
        cache.set_rows(prompt_of)
        caches.append(cache)
    rows = len(prompt_of)
    for step in range(9):
        query, key = random(rows, 28, 128, seed=100 + step), random(rows, 4, 128, seed=200 + step)
        found = []
        for cache in caches:
            cache.advance(step)
            found.append(cache.attend(1, query, key, key, 0.1).float())
        torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=2e-2)
        if step == 4:
            kept = [0, 2, 3, 5, 8, 10]
            rows = len(kept)
            for cache in caches:
                cache.keep(kept)


def test_a_shared_prompt_equals_separate_documents_and_so_do_gradients():
    prompts, completions, after = [70, 9], [30, 1, 65, 12], [0, 0, 1, 1]
    length = sum(prompts) + sum(completions)
    tensors = [random(length, heads, 128, seed=heads).requires_grad_() for heads in (28, 4, 4)]
    weight = random(length, 28, 128, seed=3)
    ours = Groups.of(prompts, completions, after, "cuda").attend(0, *tensors, 0.1)
    mine = torch.autograd.grad((ours * weight).sum(), tensors)

    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]  # no kernel: SDPA in float32
    theirs = Groups.of(prompts, completions, after, "cuda").attend(0, *wide, 0.1)
    expected = torch.autograd.grad((theirs * weight.float()).sum(), wide)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)
    for own, other in zip(mine, expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(own.float(), other, atol=1e-2 * scale, rtol=2e-2)
    alone = attend_documents(*tensors, *Documents.of([length], "cuda"), causal=True, scale=0.1)
    assert not torch.allclose(alone.float(), theirs, atol=2e-2)


def language_and_prompts(tiny_qwen, kind):
    language = adapted(tiny_qwen, dtype="bfloat16").eval().cuda()
    if kind == "fused":
        language.fuse_blocks()
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in (37, 5, 64, 128):
        ids = torch.randint(20, 300, (length,), generator=generator).tolist()
        rows.append(Row(ids, [0] * length, [IGNORE] * length, []))
    return language, rows


def assembled(language, rows, **more):
    with torch.no_grad():
        return assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=None,
            image_tokens=None,
            pad_id=language.pad_id,
            packed_length=0,
            **more,
        )


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_graphs_give_what_steps_give_one_by_one(tiny_qwen, kind):
    language, rows = language_and_prompts(tiny_qwen, kind)
    inputs = assembled(language, rows)

    def sampled(decoder, **changes):
        options = {"max_new_tokens": 40, "group_size": 8, "temperature": 1.0, "eos_ids": range(0, 400, 9)}
        generators = [torch.Generator().manual_seed(row) for row in range(32)]
        return decoder(inputs, [len(row.token_ids) for row in rows], generators=generators, **{**options, **changes})

    graphs, steps = Decoder(language), Decoder(language, graphs=False)
    ours, theirs = sampled(graphs), sampled(steps)
    assert len(graphs._graphs) > 1 and not steps._graphs  # rows left, so there are graphs of several sizes
    assert ours.token_ids == theirs.token_ids and ours.logps == theirs.logps
    assert len({len(ids) for ids in ours.token_ids}) > 2
    # what the graphs read is what the optimizer moves
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    before = dict(graphs._graphs)
    ours, moved = sampled(graphs), sampled(steps)
    assert ours.token_ids == moved.token_ids != theirs.token_ids
    assert all(graphs._graphs[key] is graph for key, graph in before.items())
    # another limit, other ends, greedy
    for changes in ({"max_new_tokens": 7}, {"eos_ids": []}, {"temperature": 0.0}, {"temperature": 0.7}):
        assert sampled(graphs, **changes).token_ids == sampled(steps, **changes).token_ids

    # the trainer's log-probabilities of the same tokens
    ours = sampled(graphs)
    groups = assembled(language, rows, completions=[ours.token_ids[at : at + 8] for at in range(0, 32, 8)])
    with torch.no_grad():
        hidden = language.hidden(groups)[0][groups.predicting_T]
        logps = token_logprobs(hidden, language.head_weight_VD, groups.targets_T).logps_T.float()
    kept = torch.tensor([value for its in ours.logps for value in its], device="cuda")
    assert float((logps - kept).abs().mean()) < 0.02


def test_graphs_carry_what_names_carry(tiny_qwen):
    """Batches with names and without, of few prompts and of many: the table moves, and graphs are made anew."""
    language, rows = language_and_prompts(tiny_qwen, "fused")
    name_of_V = torch.full((language.embedding.num_embeddings,), 200)
    name_of_V[20:220] = torch.arange(200)
    generator = torch.Generator().manual_seed(5)
    carried_BPD = 0.3 * torch.randn(4, 201, language.width, generator=generator)
    carried_BPD[:, -1] = 0
    mentions = Mentions(carried_BPD.cuda(), name_of_V.cuda(), name_of_V)
    graphs, steps = Decoder(language), Decoder(language, graphs=False)

    def sampled(decoder, some, carried):
        inputs = assembled(language, rows[:some], mentions=carried)
        options = {"max_new_tokens": 20, "group_size": 4, "temperature": 1.0, "eos_ids": range(220, 400, 9)}
        generators = [torch.Generator().manual_seed(row) for row in range(4 * some)]
        return decoder(inputs, [len(row.token_ids) for row in rows[:some]], generators=generators, **options).token_ids

    few = replace(mentions, carried_BPD=mentions.carried_BPD[:2])
    found = [sampled(graphs, 2, few), sampled(graphs, 4, mentions), sampled(graphs, 4, None), sampled(graphs, 2, few)]
    assert found[:3] == [sampled(steps, 2, few), sampled(steps, 4, mentions), sampled(steps, 4, None)]
    assert found[3] == found[0]
    assert found[1] != found[2]


def test_streaming_hears_what_is_said(tiny_qwen):
    language, rows = language_and_prompts(tiny_qwen, "fused")
    heard: dict[int, list[int]] = {row: [] for row in range(4)}
    said = Decoder(language)(
        assembled(language, rows),
        [len(row.token_ids) for row in rows],
        max_new_tokens=20,
        on_token=lambda row, token: heard[row].append(token),
    )
    assert [heard[row] for row in range(4)] == said.token_ids
