"""The input assembler against transformers' own positions, embeddings and logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from threedr1.models.inputs import (
    IGNORE,
    IMAGE,
    SCENE,
    TEXT,
    VIEW_DEPTH,
    VIEW_IMAGE,
    RowWriter,
    assemble,
    mrope_positions,
    pad_rows,
)
from threedr1.models.language_model import load_language_model


@pytest.fixture(scope="module")
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32").eval()


@pytest.fixture(scope="module")
def writer(language):
    return RowWriter(language.tokenizer, merge_size=language.merge_size)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(writer, **changes):
    arguments = {
        "system": "See the room.",
        "question": "Where is the chair?",
        "num_proposals": 3,
        "num_layout_tokens": 2,
        "grids": [(1, 4, 6)],
        "target": "<answer>two</answer>",
    }
    return writer.write(**{**arguments, **changes})


def test_row_reads_as_qwen_chat_with_named_scene_tokens(writer, language):
    row = write(writer)
    text = language.tokenizer.decode(row.token_ids)
    assert text == (
        "<|im_start|>system\nSee the room.<|im_end|>\n<|im_start|>user\n"
        "Views: <|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>\n"
        "Objects: <obj0><|vision_pad|><obj1><|vision_pad|><obj2><|vision_pad|>\n"
        "Layout: <|vision_pad|><|vision_pad|>\n"
        "Where is the chair?<|im_end|>\n<|im_start|>assistant\n<answer>two</answer><|im_end|>"
    )
    assert row.num_scene_tokens == 5
    taught = [token for token, label in zip(row.token_ids, row.labels, strict=True) if label != IGNORE]
    assert language.tokenizer.decode(taught) == "<answer>two</answer><|im_end|>"


def test_control_tokens_in_a_question_stay_text(writer, language):
    row = write(writer, question="<|im_end|> <|image_pad|> <|vision_pad|>", grids=[])
    assert row.num_scene_tokens == 5
    control = [language.tokenizer.convert_tokens_to_ids(name) for name in ("<|image_pad|>", "<|vision_pad|>")]
    at = [token for token, kind in zip(row.token_ids, row.kinds, strict=True) if kind == TEXT]
    assert not set(control) & set(at)


def test_mrope_positions_by_hand():
    kinds = [TEXT, TEXT, *[IMAGE] * 6, SCENE, TEXT]
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert mrope_positions(kinds, [(1, 4, 6)]).tolist() == expected


def test_view_tokens_stand_behind_their_view_and_advance_as_text():
    """Two views of 1 x 2 and 2 x 1 merged patches, each with two tokens of its picture and one of its depth."""
    extra = [VIEW_IMAGE, VIEW_IMAGE, VIEW_DEPTH]
    kinds = [TEXT, IMAGE, IMAGE, TEXT, *extra, TEXT, IMAGE, IMAGE, TEXT, *extra, TEXT]
    expected = [
        [0, 1, 1, 3, 4, 5, 6, 7, 8, 8, 10, 11, 12, 13, 14],
        [0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 10, 11, 12, 13, 14],
    ]
    assert mrope_positions(kinds, [(1, 2, 4), (1, 4, 2)]).tolist() == expected


def test_view_tokens_in_a_row(writer, language):
    grids = [(1, 2, 4), (1, 4, 2)]
    row = write(writer, grids=grids, num_view_image_tokens=2, num_view_depth_tokens=1)
    view = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>" + 3 * "<|vision_pad|>"
    assert f"Views: {view}{view}\nObjects: " in language.tokenizer.decode(row.token_ids)
    first = row.kinds.index(IMAGE) - 1
    block = [TEXT, IMAGE, IMAGE, TEXT, VIEW_IMAGE, VIEW_IMAGE, VIEW_DEPTH]
    assert row.kinds[first : first + 15] == [*block, *block, TEXT]
    assert row.num_scene_tokens == 5 and all(label == IGNORE for label in row.labels[: first + 14])
    plain = write(writer, grids=grids)
    kept = [index for index, kind in enumerate(row.kinds) if kind not in (VIEW_IMAGE, VIEW_DEPTH)]
    assert [row.token_ids[index] for index in kept] == plain.token_ids
    assert write(writer, grids=grids, num_view_image_tokens=0, num_view_depth_tokens=0) == plain
    assert write(writer, grids=[], num_view_image_tokens=2, num_view_depth_tokens=1) == write(writer, grids=[])


def test_view_tokens_land_at_their_placeholders(language, writer):
    rows = [
        write(writer, grids=[(1, 2, 4), (1, 4, 2)], num_view_image_tokens=2, num_view_depth_tokens=1),
        write(writer, grids=[(1, 4, 4)], num_view_image_tokens=2, num_view_depth_tokens=1, num_proposals=1),
    ]
    width, pad_id = language.width, language.tokenizer.pad_token_id
    images, depths = torch.randn(6, width), torch.randn(3, width)
    options = {
        "embed_tokens": language.embedding,
        "scene_tokens": torch.randn(8, width),
        "image_tokens": torch.randn(8, width),
        "pad_id": pad_id,
    }
    inputs = assemble(rows, view_image_tokens=images, view_depth_tokens=depths, **options)
    kinds_BL = pad_rows(rows, pad_id).kinds_BL
    for index, (few, more) in enumerate(((slice(0, 2), slice(0, 4)), (slice(2, 3), slice(4, 6)))):
        embeds_LD = inputs.inputs_embeds_BLD[index]
        torch.testing.assert_close(embeds_LD[kinds_BL[index] == VIEW_IMAGE], images[more])
        torch.testing.assert_close(embeds_LD[kinds_BL[index] == VIEW_DEPTH], depths[few])
    with pytest.raises(ValueError, match="6 placeholders of kind 3, but 0 features"):
        assemble(rows, view_depth_tokens=depths, **options)


def test_mrope_positions_name_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match="6 image tokens in a run"):
        mrope_positions([IMAGE] * 6, [(1, 4, 4)])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
def test_mrope_positions_equal_transformers(language, parts):
    kinds, grids = [], []
    for text, height, width in parts:
        kinds += [TEXT] * text + [IMAGE] * (height * width)
        grids.append((1, 2 * height, 2 * width))
    kinds.append(TEXT)
    theirs, _ = language.base.model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        mm_token_type_ids=torch.tensor([[int(kind == IMAGE) for kind in kinds]]),
        image_grid_thw=torch.tensor(grids),
    )
    assert torch.equal(mrope_positions(kinds, grids), theirs[:, 0])


def test_assembled_logits_equal_transformers_forward(language, writer):
    """Images and text only: our embeddings and positions against the model's own forward, batched with padding."""
    pictures = [picture(56, 84, 1), picture(56, 56, 2), picture(84, 56, 3)]
    made = [language.image_processor(images=[image], return_tensors="pt") for image in pictures]
    grids = [tuple(entry["image_grid_thw"][0].tolist()) for entry in made]
    rows = [
        write(writer, num_proposals=0, num_layout_tokens=0, grids=grids[:2]),
        write(writer, num_proposals=0, num_layout_tokens=0, grids=grids[2:], question="How many?"),
    ]
    pixels = torch.cat([entry["pixel_values"] for entry in made])
    grid_tensor = torch.tensor(grids)
    with torch.no_grad():
        inputs = assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=None,
            image_tokens=language.embed_images(pixels, grids),
            pad_id=language.tokenizer.pad_token_id,
        )
        hidden = language.decoder(
            inputs_embeds=inputs.inputs_embeds_BLD,
            attention_mask=inputs.attention_mask_BL,
            position_ids=inputs.position_ids_4BL,
        ).last_hidden_state
        ours = language.base.lm_head(hidden)
        for index, row in enumerate(rows):
            here = slice(0, 2) if index == 0 else slice(2, 3)
            pixel_rows = pixels[: int(grid_tensor[:2].prod(1).sum())] if index == 0 else made[2]["pixel_values"]
            theirs = language.base(
                input_ids=torch.tensor([row.token_ids]),
                pixel_values=pixel_rows,
                image_grid_thw=grid_tensor[here],
                mm_token_type_ids=torch.tensor([[int(kind == IMAGE) for kind in row.kinds]]),
            ).logits[0]
            real = inputs.attention_mask_BL[index].bool()
            torch.testing.assert_close(ours[index, real], theirs, atol=1e-5, rtol=1e-4)


def test_scene_tokens_land_at_their_placeholders(language, writer):
    rows = [write(writer, grids=[]), write(writer, grids=[], num_proposals=1)]
    width = language.width
    tokens = [torch.randn(5, width), torch.randn(3, width)]
    inputs = assemble(
        rows,
        embed_tokens=language.embedding,
        scene_tokens=torch.cat(tokens),
        image_tokens=None,
        pad_id=language.tokenizer.pad_token_id,
    )
    batch = pad_rows(rows, language.tokenizer.pad_token_id)
    for index in range(2):
        torch.testing.assert_close(inputs.inputs_embeds_BLD[index, batch.kinds_BL[index] == SCENE], tokens[index])
    with pytest.raises(ValueError, match="8 placeholders of kind 2, but 7 features"):
        assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=torch.cat(tokens)[:-1],
            image_tokens=None,
            pad_id=0,
        )
