"""The small dual encoder: what it reads, that it loads by folder, and what it refuses."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.dual_encoder import DualEncoder, prepare_pictures, text_pieces, word_pieces
from threedr1.models.image_encoder import load_text_encoder
from threedr1.models.view_selector import ViewSelector


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder().eval().requires_grad_(False)


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "dual")
    return tmp_path / "dual"


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pieces_of_a_word_by_hand():
    expected = [2 + zlib.crc32(piece) % 98 for piece in (b"<bed>", b"<be", b"bed", b"ed>")]
    assert list(word_pieces("bed", 100)) == expected
    assert len(word_pieces("a" * 500, 100)) == 12


def test_texts_begin_with_a_start_token_and_are_cut():
    pieces = text_pieces(["", "Red BED!", "red bed", "word " * 100], 100, 5)
    assert pieces.shape == (4, 6, 12)
    assert (pieces[0, 0, 0], pieces[0, 1:].max()) == (1, 0)
    torch.testing.assert_close(pieces[1], pieces[2])
    assert pieces[1, 3:].max() == 0 and (pieces[3, :, 0] > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_has_one_embedding_whatever_stands_beside_it(texts):
    torch.manual_seed(0)
    small = DualEncoder(
        num_names=4, num_colors=2, text_width=8, text_heads=2, num_buckets=64, image_width=8, image_size=16
    ).eval()
    together = small.embed_texts(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))
    torch.testing.assert_close(together, small.embed_texts(texts, batch_size=1), atol=1e-5, rtol=1e-4)


def test_long_texts_other_languages_and_nothing_at_all(encoder):
    rows = encoder.embed_texts(["chair " * 10_000, "椅子在哪里?", "Wo ist der Stuhl?", "", "?!", "x" * 100_000])
    assert torch.isfinite(rows).all() and rows.shape == (6, 1024)
    torch.testing.assert_close(rows[3], rows[4])
    assert (rows[1] - rows[2]).norm() > 1e-3
    assert encoder.embed_texts([]).shape == (0, 1024) == encoder.embed_images([]).shape


def test_pictures_of_any_size_and_batching(encoder):
    images = [picture(0), picture(1, 224, 224), picture(2, 5, 3), picture(3, 112, 112)]
    rows = encoder.embed_images(images)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(rows, encoder.embed_images(images, batch_size=1), atol=1e-5, rtol=1e-4)
    pixel = torch.tensor(images[3][4, 7] / 127.5 - 1.0).float()
    torch.testing.assert_close(prepare_pictures(images[3:], 112)[0, :, 4, 7], pixel)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be .H, W, 3. of uint8"):
            encoder.embed_images([wrong])


def test_cells_are_counted_row_by_row(encoder):
    """Changing a corner of a picture moves the cell there and not the one at the other corner."""
    before = prepare_pictures([picture(0, 112, 112)], 112)
    after = before.clone()
    after[..., :4, -4:] = 1.0
    (old, old_colors), (new, new_colors) = (encoder.cell_logits(one) for one in (before, after))
    assert old.shape == (1, 196, 65) and old_colors.shape == (1, 196, 16)
    for moved in ((old - new).norm(dim=2)[0], (old_colors - new_colors).norm(dim=2)[0]):
        assert moved[13] > 1e-4 and moved[14 * 13] == pytest.approx(0, abs=1e-6)


def test_embeddings_by_hand():
    """Two cells of red chairs and one of a blue table in four; a text about red things, mostly chairs."""
    sure = 50.0
    small = DualEncoder(num_names=2, num_colors=2, text_width=8, text_heads=2, num_buckets=64, image_width=8)
    chair, table, nothing = ([sure, 0, 0], [0, sure, 0], [0, 0, sure])
    cells = [chair + [sure, 0], chair + [sure, 0], table + [0, sure], nothing + [0, 0]]
    small.image.forward = lambda pictures: torch.tensor([cells])
    small.text.forward = lambda pieces: torch.tensor([[math.log(3), 0.0, sure, 0.0]])
    expected = torch.tensor([0.5, 0, 0, 0.25]).sqrt()
    torch.testing.assert_close(
        small.pictures(torch.zeros(1, 3, 8, 8))[0], expected / expected.norm(), atol=2e-3, rtol=0
    )
    texts = torch.tensor([0.75, 0, 0.25, 0])
    torch.testing.assert_close(small.texts(["red things"])[0], texts / texts.norm(), atol=1e-5, rtol=0)


def test_saved_and_loaded_by_folder(encoder, folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    loaded = load_text_encoder(str(folder))
    assert isinstance(loaded, DualEncoder) and loaded.has_images and loaded.class_template == "{}"
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.embed_texts(["a chair"]), encoder.embed_texts(["a chair"]))
    assert torch.equal(loaded.embed_images([picture(0)]), encoder.embed_images([picture(0)]))
    selector = ViewSelector.from_settings({"encoder": str(folder), "w_image": 0.5, "w_clip": 0.5})
    assert ViewSelector.from_settings(selector.settings()).settings() == selector.settings()


def test_broken_folders_are_one_sentence(folder):
    weights, config = folder / "dual_encoder.safetensors", folder / "dual_encoder.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="is broken"):
        load_text_encoder(str(folder))
    weights.write_bytes(whole)
    text = config.read_text()
    for changed, match in (
        (text.replace('"num_names": 64', '"num_names": 32'), "does not fit"),
        ("{", "is broken"),
        (json.dumps({"depth": 3}), "keys that no dual encoder has"),
        ("[]", "keys that no dual encoder has"),
    ):
        config.write_text(changed)
        with pytest.raises(ValueError, match=match):
            load_text_encoder(str(folder))
    config.write_text(text)
    weights.unlink()
    with pytest.raises(ValueError, match=r"dual_encoder.safetensors is missing; run `python main.py dual`"):
        load_text_encoder(str(folder))


@pytest.mark.parametrize(
    "options", [{"num_names": 0}, {"image_size": 100}, {"image_width": 7}, {"num_buckets": 2}, {"max_words": 0}]
)
def test_sizes_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        DualEncoder(**options)
