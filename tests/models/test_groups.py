"""Completions that share their prompt in a pack, against separate rows and brute force: values and gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.attention import Groups
from threedr1.models.inputs import IGNORE, TEXT, RowWriter, assemble
from threedr1.models.language_model import load_language_model
from threedr1.models.lm_head import token_logprobs

from .adapted import adapted

QUESTIONS = ["Where is the chair?", "How many tables are there in this room, all counted?", "Why?"]
# ragged, one of a single token, one of none, and a prompt that nothing goes on from
COMPLETIONS = [[[11, 12, 13, 14, 15], [21]], [], [[31, 32], [], [41, 42, 43, 44, 45, 46, 47, 48, 49]]]


def brute_force(query, key, value, prompts, completions, after, scale):
    """Every token of every head by itself, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    starts = [sum(prompts[:index]) for index in range(len(prompts) + 1)]
    seen, start = [], starts[-1]
    for prompt, length in zip(starts, prompts, strict=False):
        seen += [range(prompt, prompt + place + 1) for place in range(length)]
    for length, its in zip(completions, after, strict=True):
        before = [] if its < 0 else list(range(starts[its], starts[its + 1]))
        seen += [[*before, *range(start, start + place + 1)] for place in range(length)]
        start += length
    out = torch.zeros_like(query)
    for token, tokens in enumerate(seen):
        at = torch.tensor(list(tokens))
        for head in range(query.shape[1]):
            scores = key[at, head // group] @ query[token, head] * scale
            out[token, head] = scores.softmax(0) @ value[at, head // group]
    return out


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_attention_and_its_gradient_equal_brute_force(prompts, data):
    after = sorted(data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=4)))
    completions = data.draw(st.lists(st.integers(0, 4), min_size=len(after), max_size=len(after)))
    completions, after = [*completions, 3], [*after, -1]  # padding goes on from nothing
    length = sum(prompts) + sum(completions)
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, 4, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(length, 2, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(length, 4, 8, generator=generator)
    groups = Groups.of(prompts, completions, after, "cpu")
    ours = groups.attend(0, query, key, value, 0.3)
    expected = brute_force(query, key, value, prompts, completions, after, 0.3)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    mine = torch.autograd.grad((ours * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def model(folder, *, lora=True):
    return (adapted(folder) if lora else load_language_model(folder, dtype="float32")).train()


def prompts(language):
    writer = RowWriter(language.tokenizer, merge_size=language.merge_size)
    grids = [[(1, 4, 6), (1, 4, 4)], [], [(1, 2, 4)]]
    rows = [
        writer.write(system="See.", question=question, num_proposals=2, num_layout_tokens=1, grids=its)
        for question, its in zip(QUESTIONS, grids, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    scene_tokens = [torch.randn(3, language.width, generator=generator) for _ in rows]
    return rows, scene_tokens, list(torch.randn(12, language.width, generator=generator).split([10, 0, 2]))


def assembled(language, rows, scene_tokens, image_tokens, **layout):
    return assemble(
        rows,
        embed_tokens=language.embedding,
        scene_tokens=torch.cat(scene_tokens),
        image_tokens=torch.cat(image_tokens),
        pad_id=language.pad_id,
        **layout,
    )


def logprobs(language, inputs):
    hidden = language.hidden(inputs).flatten(0, 1)[inputs.predicting_T]
    return token_logprobs(hidden, language.head_weight_VD, inputs.targets_T, temperature=0.7).logps_T


def separate_rows(language, rows, scene_tokens, image_tokens):
    """Log-probabilities of every completion, its whole row by itself."""
    found = []
    for row, scene, images, texts in zip(rows, scene_tokens, image_tokens, COMPLETIONS, strict=True):
        for ids in texts:
            whole = replace(
                row,
                token_ids=[*row.token_ids, *ids],
                kinds=[*row.kinds, *[TEXT] * len(ids)],
                labels=[*[IGNORE] * len(row.labels), *ids],
            )
            found.append(logprobs(language, assembled(language, [whole], [scene], [images])))
    return torch.cat(found)


def gradients(language, logps_T):
    weights_T = torch.linspace(-1, 2, len(logps_T))
    (logps_T * weights_T).sum().backward()
    found = {name: value.grad.clone() for name, value in language.named_parameters() if value.grad is not None}
    for value in language.parameters():
        value.grad = None
    return found


@pytest.mark.parametrize("kind", ["plain", "fused", "checkpointed", "full"])
@pytest.mark.parametrize("length", [0, 300])
def test_a_shared_prompt_equals_separate_rows(tiny_qwen, kind, length):
    language = model(tiny_qwen, lora=kind != "full")
    given = prompts(language)
    expected = separate_rows(language, *given)
    expected_gradients = gradients(language, expected)
    if kind == "fused":
        language.fuse_blocks()
    elif kind == "checkpointed":
        language.base.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = assembled(language, *given, packed_length=length, completions=COMPLETIONS)
    # each prompt is there once
    used = sum(len(row.token_ids) for row in given[0]) + sum(len(ids) for its in COMPLETIONS for ids in its)
    assert inputs.inputs_embeds_BLD.shape[1] == max(used, length)
    assert inputs.targets_T.tolist() == [token for its in COMPLETIONS for ids in its for token in ids]
    ours = logprobs(language, inputs)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    found = gradients(language, ours)
    assert found.keys() == expected_gradients.keys() and len(found) > 14
    for name, gradient in found.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5 * scale, rtol=1e-4, msg=name)


def test_what_a_prompt_teaches_is_left_out(tiny_qwen):
    language = model(tiny_qwen)
    row = RowWriter(language.tokenizer).write(
        system="See.", question="Why?", num_proposals=0, num_layout_tokens=0, target="So."
    )
    inputs = assemble(
        [row],
        embed_tokens=language.embedding,
        scene_tokens=None,
        image_tokens=None,
        pad_id=language.pad_id,
        packed_length=0,
        completions=[[[7, 8]]],
    )
    assert inputs.targets_T.tolist() == [7, 8]
    assert inputs.predicting_T.tolist() == [len(row.token_ids) - 1, len(row.token_ids)]


def test_other_attention_says_what_to_set(tiny_qwen):
    language = load_language_model(tiny_qwen, dtype="float32", attention="sdpa")
    inputs = assembled(language, *prompts(language), packed_length=0, completions=COMPLETIONS)
    with pytest.raises(ValueError, match="set attention to packed"):
        language.hidden(inputs)
