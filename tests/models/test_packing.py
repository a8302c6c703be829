"""Packed rows against padded ones and against brute force: values, gradients, and no way between documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.attention import Documents, attend_documents
from threedr1.models.inputs import IGNORE, Row, RowWriter, assemble, pack_rows
from threedr1.models.language_model import add_lora, load_language_model
from threedr1.models.lm_head import cross_entropy
from threedr1.models.packs import plan_packs

QUESTIONS = ["Where is the chair?", "How many tables are there in this room, all counted?", "Why?"]


def text_row(token_ids, taught=0):
    labels = [IGNORE] * (len(token_ids) - taught) + list(token_ids[len(token_ids) - taught :])
    return Row(list(token_ids), [0] * len(token_ids), labels, [])


# What goes into a pack ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(10, 100), st.integers(0, 4))
def test_packs_hold_each_row_once_within_the_budget(lengths, budget, max_rows):
    packs = plan_packs(lengths, budget, max_rows)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        assert pack == sorted(pack)
        assert sum(lengths[row] for row in pack) <= budget or len(pack) == 1
        assert not max_rows or len(pack) <= max_rows
    if not max_rows:
        # of two packs that would fit into one, first fit makes one
        totals = sorted(sum(lengths[row] for row in pack) for pack in packs)
        assert len(totals) < 2 or totals[0] + totals[1] > budget


def test_packs_by_hand():
    assert plan_packs([50, 30, 70, 20, 30, 120], 100) == [[0, 3, 4], [1, 2], [5]]
    assert plan_packs([10, 10, 10], 100, max_rows=2) == [[0, 1], [2]]
    assert plan_packs([], 100) == []


def test_a_pack_by_hand():
    layout, lengths = pack_rows([text_row([7, 8, 9], 1), text_row([5, 6], 1)], 0, length=8)
    assert lengths == [3, 2, 3]
    assert layout.token_ids_BL.tolist() == [[7, 8, 9, 5, 6, 0, 0, 0]]
    assert layout.labels_BL.tolist() == [[IGNORE, IGNORE, 9, IGNORE, 6, IGNORE, IGNORE, IGNORE]]
    assert layout.position_ids_4BL.tolist() == [[[0, 1, 2, 0, 1, 0, 1, 2]]] * 4
    layout, lengths = pack_rows([text_row([7, 8, 9])], 0)
    assert layout.token_ids_BL.shape == (1, 3) and lengths == [3]


# Attention ---------------------------------------------------------------------------------------------------------


def attend_one_by_one(query, key, value, lengths, causal, scale):
    """Every token of every head by itself, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    start = 0
    for length in lengths:
        for token in range(start, start + length):
            end = token + 1 if causal else start + length
            for head in range(query.shape[1]):
                scores = key[start:end, head // group] @ query[token, head] * scale
                out[token, head] = scores.softmax(0) @ value[start:end, head // group]
        start += length
    return out


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.sampled_from([1, 2, 4]))
def test_attention_equals_brute_force(lengths, causal, kv_heads):
    generator = torch.Generator().manual_seed(sum(lengths))
    query = torch.randn(sum(lengths), 4, 8, generator=generator)
    key, value = (torch.randn(sum(lengths), kv_heads, 8, generator=generator) for _ in range(2))
    documents = Documents.of(lengths, "cpu")
    assert documents.longest >= max(lengths)
    ours = attend_documents(query, key, value, *documents, causal=causal, scale=0.3)
    expected = attend_one_by_one(query, key, value, lengths, causal, 0.3)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


# The whole decoder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_and_images(tiny_qwen):
    """Three rows of different lengths, two of them with images."""
    language = load_language_model(tiny_qwen, dtype="float32")
    writer = RowWriter(language.tokenizer, merge_size=language.merge_size)
    grids = [[(1, 4, 6), (1, 4, 4)], [], [(1, 2, 4)]]
    rows = [
        writer.write(
            system="See the room.",
            question=question,
            num_proposals=2,
            num_layout_tokens=1,
            grids=its,
            target=f"<answer>{question}</answer>",
        )
        for question, its in zip(QUESTIONS, grids, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    scene_tokens = [torch.randn(3, language.width, generator=generator) for _ in rows]
    return rows, scene_tokens, torch.randn(12, language.width, generator=generator)


def loss_and_gradients(language, rows, scene_tokens, image_tokens, packs, **layout):
    """Summed loss of all packs and the gradient of every trained parameter and of what was put in."""
    scene_tokens = [tokens.clone().requires_grad_() for tokens in scene_tokens]
    image_tokens = image_tokens.clone().requires_grad_()
    split = list(image_tokens.split([10, 0, 2]))
    total = 0.0
    for pack in packs:
        inputs = assemble(
            [rows[index] for index in pack],
            embed_tokens=language.embedding,
            scene_tokens=torch.cat([scene_tokens[index] for index in pack]),
            image_tokens=torch.cat([split[index] for index in pack]),
            pad_id=language.pad_id,
            **layout,
        )
        hidden = language.hidden(inputs).flatten(0, 1)[inputs.predicting_T]
        loss = cross_entropy(hidden, language.head_weight_VD, inputs.targets_T, normalizer=1.0)
        loss.backward(retain_graph=True)
        total += float(loss.detach())
    named = dict(language.named_parameters())
    gradients = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    for name in gradients:
        named[name].grad = None
    return total, gradients | {"images": image_tokens.grad} | {
        f"scene {index}": tokens.grad for index, tokens in enumerate(scene_tokens)
    }


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_packed_equals_padded_and_one_by_one(tiny_qwen, rows_and_images, attention, train):
    language = load_language_model(tiny_qwen, dtype="float32", attention=attention)
    assert language.attention == attention
    if train == "lora":
        add_lora(language, "policy", rank=4, alpha=8)
        for name, parameter in language.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    apart = loss_and_gradients(language, *rows_and_images, [[0], [1], [2]])
    layouts = [([[0, 1, 2]], {}), ([[0, 1, 2]], {"packed_length": 0}), ([[0, 2], [1]], {"packed_length": 256})]
    for packs, layout in layouts:
        loss, gradients = loss_and_gradients(language, *rows_and_images, packs, **layout)
        assert loss == pytest.approx(apart[0], rel=1e-6)
        assert gradients.keys() == apart[1].keys() and len(gradients) > 10
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, apart[1][name], atol=2e-5, rtol=1e-4, msg=name)


def test_no_document_sees_another(tiny_qwen, rows_and_images):
    language = load_language_model(tiny_qwen, dtype="float32").eval()
    rows, scene_tokens, image_tokens = rows_and_images
    changed = [scene_tokens[0] + 1, *scene_tokens[1:]]
    with torch.no_grad():
        both = [
            language.hidden(
                assemble(
                    rows,
                    embed_tokens=language.embedding,
                    scene_tokens=torch.cat(tokens),
                    image_tokens=image_tokens,
                    pad_id=language.pad_id,
                    packed_length=0,
                )
            )[0]
            for tokens in (scene_tokens, changed)
        ]
    first = len(rows[0].token_ids)
    assert not torch.equal(both[0][:first], both[1][:first])
    assert torch.equal(both[0][first:], both[1][first:])
