"""Small random models: names of proposals as tokens, and the spread of the weights."""

from dataclasses import replace

import pytest
import torch

from threedr1.models.inputs import RowWriter
from threedr1.models.language_model import load_language_model
from threedr1.models.tiny import SHAPES, build_tiny

TEXTS = ["the chair left of the door <obj3>", "Find this object and point at it: the red chair <obj17> <obj4>."] * 50
SMALLER = {
    "width": 64,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 96,
    "vision_width": 48,
    "vision_layers": 1,
}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    size = replace(SHAPES["small"], vocab_size=500, **SMALLER)
    return load_language_model(build_tiny(tmp_path_factory.mktemp("small"), TEXTS, size=size), dtype="float32")


def pieces(language, text: str) -> list[str]:
    return [language.tokenizer.decode([token]) for token in RowWriter(language.tokenizer)._text(text)]


def test_a_name_is_one_token_right_behind_its_word(language):
    assert len(language.tokenizer) <= 500 and SHAPES["small"].names == 100
    assert pieces(language, "door <obj3>, <obj99> <obj0>")[-4:] == ["<obj3>", ",", "<obj99>", "<obj0>"]
    assert " " not in pieces(language, "door <obj3>")
    assert language.decode(RowWriter(language.tokenizer)._text("the chair <obj17>.")) == "the chair<obj17>."


def test_other_names_and_control_tokens_in_a_text_stay_text(language):
    assert len(pieces(language, "<obj100>")) > 1
    found = pieces(language, "<|im_end|> <|image_pad|>")
    assert "<|im_end|>" not in found and "<|image_pad|>" not in found


def test_weights_spread_as_the_shape_says(language):
    assert float(language.embedding.weight.detach().std()) == pytest.approx(0.05, rel=0.05)


def test_its_attentions_start_as_look_ups(language):
    width = SMALLER["width"]
    for layer in language.base.model.language_model.layers:
        attention = layer.self_attn
        head, (half, rest) = attention.head_dim, (width // 2, width - width // 2)
        keys, values = (part.weight.detach().double() for part in (attention.k_proj, attention.v_proj))
        queries, out = attention.q_proj.weight.detach().double(), attention.o_proj.weight.detach().double()
        alike = queries.unflatten(0, (-1, head)).transpose(1, 2) @ keys.unflatten(0, (-1, head)).repeat_interleave(
            2, 0
        )
        for matrix in alike:  # of rank `head`: a token alike in all of its directions
            assert float(matrix.trace()) == pytest.approx(head, rel=0.2)
        taken = out @ values.unflatten(0, (-1, head)).repeat_interleave(2, 0).flatten(0, 1)
        # heads that share their values add up to four times a projection on half of all directions
        eigenvalues = torch.linalg.eigvals(taken).real.sort().values
        assert eigenvalues[rest:].mean() == pytest.approx(4, rel=0.1) and eigenvalues[:half].abs().mean() < 0.5


def test_the_quickstarts_model_has_no_such_tokens(tmp_path):
    language = load_language_model(build_tiny(tmp_path, TEXTS, size=replace(SHAPES["tiny"], vocab_size=400)))
    assert len(pieces(language, "<obj3>")) > 1
