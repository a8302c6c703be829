"""Small random models: names of proposals as tokens, and the spread of the weights."""

from dataclasses import replace

import pytest

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


def test_the_quickstarts_model_has_no_such_tokens(tmp_path):
    language = load_language_model(build_tiny(tmp_path, TEXTS, size=replace(SHAPES["tiny"], vocab_size=400)))
    assert len(pieces(language, "<obj3>")) > 1
