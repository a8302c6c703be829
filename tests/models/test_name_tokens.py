"""Names given to a model that is trained already: what becomes of its words, and where the names lie among them."""

from dataclasses import replace

import pytest
import torch

from threedr1.models.inputs import RowWriter
from threedr1.models.language_model import LanguageModel, load_language_model
from threedr1.models.name_tokens import add_names, mixtures
from threedr1.models.tiny import SHAPES, build_tiny

TEXTS = ["the chair left of the door <obj3>", "Find this object and point at it: the red chair <obj17> <obj4>."] * 50
SIZE = replace(SHAPES["tiny"], vocab_size=400, width=32, layers=1, heads=2, mlp_width=48, vision_layers=1)


def built(folder, **changes) -> LanguageModel:
    return load_language_model(build_tiny(folder, TEXTS, size=replace(SIZE, **changes)), dtype="float32")


def ids(language: LanguageModel, text: str) -> list[int]:
    return RowWriter(language.tokenizer)._text(text)


def logits(language: LanguageModel, text: str) -> torch.Tensor:
    with torch.no_grad():
        return language.base(input_ids=torch.tensor([ids(language, text)])).logits[0]


@pytest.mark.parametrize("tied", [True, False])
def test_names_become_tokens_and_words_stay_what_they_were(tmp_path, tied):
    language = built(tmp_path, tied=tied)
    before, words = logits(language, "the red chair"), language.embedding.weight.detach().clone()
    assert len(ids(language, "door <obj3>")) > len(ids(language, "door")) + 1
    add_names(language, 20)
    assert len(ids(language, "door <obj3><obj19>")) == len(ids(language, "door")) + 2
    assert len(ids(language, "<obj20>")) > 1
    assert torch.equal(language.embedding.weight[: len(words)], words)
    assert language.text_config.vocab_size == len(language.tokenizer) == len(words) + 20
    torch.testing.assert_close(logits(language, "the red chair")[:, : len(words)], before, rtol=0, atol=1e-6)
    assert (language.base.lm_head.weight is language.embedding.weight) == tied


def test_rows_to_spare_are_used_first(tmp_path):
    language = built(tmp_path, embeddings=450)  # as the published models have
    add_names(language, 20)
    assert len(language.tokenizer) <= 450 == language.embedding.weight.shape[0]
    assert max(ids(language, "<obj0> <obj19>")) == len(language.tokenizer) - 1


def test_names_that_nothing_was_taught_are_told_apart_again(tmp_path):
    language = built(tmp_path, names=20)
    names = torch.tensor([token for name in range(20) for token in ids(language, f"<obj{name}>")])
    with torch.no_grad():
        language.embedding.weight[names] += 3  # what training does to words that no text has
    words = language.embedding.weight.detach().clone()
    size, alike = len(language.tokenizer), torch.nn.functional.cosine_similarity(words[names[0]], words[names[1:]])
    assert alike.min() > 0.95
    add_names(language, 20, redraw=True, seed=3)
    after = language.embedding.weight.detach()
    assert len(language.tokenizer) == size == len(after)
    changed = (after != words).any(1)
    assert changed[names].all() and changed.sum() == 20
    alike = torch.nn.functional.cosine_similarity(after[names[0]], after[names[1:]])
    assert alike.abs().max() < 0.7


def test_names_that_were_taught_are_kept(tmp_path):
    language = built(tmp_path, names=8)
    before, size = language.embedding.weight.detach().clone(), len(language.tokenizer)
    with pytest.raises(ValueError, match="has these 8 names already; ask for more, or draw them anew"):
        add_names(language, 8)
    add_names(language, 12)
    assert len(language.tokenizer) == size + 4
    assert torch.equal(language.embedding.weight[:size], before)


def test_names_beyond_those_asked_for_are_no_words(tmp_path):
    language = built(tmp_path, names=30)
    names = torch.tensor([token for name in range(30) for token in ids(language, f"<obj{name}>")])
    with torch.no_grad():
        language.embedding.weight[names] = 100.0
    add_names(language, 20, redraw=True)
    assert float(language.embedding.weight.detach().abs().max()) < 2  # all were drawn again, none of them of others


def test_what_copies_a_word_copies_a_name(tmp_path):
    language = built(tmp_path, tied=False)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        language.base.lm_head.weight.copy_(language.embedding.weight @ rotation)
    add_names(language, 20)
    embedding, head = language.embedding.weight.detach(), language.base.lm_head.weight.detach()
    torch.testing.assert_close(head, embedding @ rotation, rtol=0, atol=1e-5)


def test_mixtures_have_mean_and_covariance_of_what_they_are_made_of():
    random = torch.Generator().manual_seed(0)
    known = torch.randn(50, 4, generator=random) @ torch.randn(4, 4, generator=random) + torch.tensor([1.0, -2, 0, 5])
    drawn = mixtures(known, torch.randn(200_000, 50, generator=random))
    torch.testing.assert_close(drawn.mean(0), known.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.T.cov(), known.T.cov(correction=0), rtol=0.03, atol=0.05)


def test_the_same_seed_draws_the_same_names(tmp_path):
    rows = []
    for number, seed in enumerate((0, 0, 1)):
        language = built(tmp_path / str(number))
        add_names(language, 5, seed=seed)
        rows.append(language.embedding.weight.detach()[-5:])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
