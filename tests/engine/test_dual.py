"""Training of the small dual encoder: what is right for a picture, the loss by hand, the command end to end."""

import json
import math

import numpy as np
import pytest
import torch

from threedr1 import main as cli
from threedr1.datasets.rooms import generate_room
from threedr1.engine.dual import DualLoss, TrainingSet, cell_owners, make_batch, pick_cells
from threedr1.engine.dual_data import (
    SHOWN,
    attributes_of,
    fits,
    known_nouns,
    nouns_of,
    phrase_about,
    picture_room,
    random_window,
    shares,
)
from threedr1.engine.dual_retrieval import area_under_curve, crop_window
from threedr1.models.image_encoder import load_text_encoder


@pytest.fixture(scope="module")
def pictured():
    return picture_room("train", 0, 0)


def test_nouns_and_attributes_of_an_object():
    room = generate_room("scene0000_00", 4, points_only=True)
    known = frozenset({"chair", "office chair", "table"})
    thing = room.objects[0]
    thing.label, thing.class_id, thing.nyu40 = "office chair", 2, 5
    thing.color, thing.material, thing.size_word = "dark brown", "leather", "tall"
    assert nouns_of(thing, known) == {"office chair", "chair"}
    for adjective, expected in (("", 1), ("dark brown", 1), ("brown", 1), ("leather", 1), ("tall", 1), ("dark", 0)):
        assert fits(thing, ("chair", adjective), known) == bool(expected)
    assert not fits(thing, ("table", ""), known)
    assert all(fits(thing, key, known) for key in attributes_of(thing, known))
    assert ("office chair", "brown") in attributes_of(thing, known)


def test_phrases_name_what_they_are_about():
    generator = np.random.default_rng(0)
    texts = {phrase_about(("bookshelf", "red"), generator).text for _ in range(200)}
    assert {"red bookshelf", "Where is the red bookshelf?", "How many red bookshelves are there?"} <= texts
    assert all("red bookshel" in text and "{" not in text for text in texts)
    assert "the bed" in {phrase_about(("bed", ""), generator).text for _ in range(200)}


def test_pictures_know_what_they_show(pictured):
    again = picture_room("train", 0, 0)
    np.testing.assert_array_equal(again.images_VSS3, pictured.images_VSS3)
    assert again.phrases == pictured.phrases and len(pictured.phrases) > 20
    count = len(pictured.room.objects)
    assert pictured.owners_VSS.shape == pictured.images_VSS3.shape[:3]
    assert pictured.owners_VSS.min() == -1 and pictured.owners_VSS.max() < count
    for view in (0, 5):
        share_K = shares(pictured.owners_VSS[view], count)
        for row in range(count):
            assert share_K[row] == pytest.approx((pictured.owners_VSS[view] == row).mean())


def test_windows_lie_inside_and_are_square():
    owner = np.full((40, 40), -1, dtype=np.int16)
    owner[30:34, 2:5] = 3
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        rows, columns = random_window(owner, generator)
        assert 0 <= rows.start < rows.stop <= 40 and 0 <= columns.start < columns.stop <= 40
        assert rows.stop - rows.start == columns.stop - columns.start >= 12
        hits += bool((owner[rows, columns] == 3).any())
    assert hits > 150


def test_cells_and_their_owners_by_hand():
    owner = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [-1, -1, 2, 2], [-1, -1, 2, 2]])
    assert cell_owners(owner, 2).tolist() == [0, 1, -1, 2]
    picked = pick_cells(np.array([-1] * 100 + [4]), np.random.default_rng(0))
    assert len(picked) == 16 and (picked[:12] == 100).all()
    assert len(pick_cells(np.full(9, -1), np.random.default_rng(0))) == 16


def test_a_batch_says_what_is_right(pictured):
    data = TrainingSet.of([pictured])
    batch = make_batch(data, 112, np.random.default_rng(3))
    again = make_batch(data, 112, np.random.default_rng(3))
    assert torch.equal(batch.pictures_n3SS, again.pictures_n3SS) and batch.texts == again.texts
    pictures, phrases = batch.truth_nP.shape
    assert batch.pictures_n3SS.shape == (pictures, 3, 112, 112) and len(batch.texts) == phrases == len(
        set(batch.texts)
    )
    assert batch.cell_truth_nRP.shape == (pictures, 16, phrases)
    assert set(batch.truth_nP.unique().tolist()) <= {-1, 0, 1} and (batch.truth_nP == 1).any()
    # a cell shows a part of what its picture shows; at least as much as counts, or nearly so
    wrong = (batch.cell_truth_nRP.amax(1) == 1) & (batch.truth_nP == 0)
    assert wrong.float().mean() < 0.01
    known = known_nouns([pictured.room])
    named = {noun for thing in pictured.room.objects for noun in nouns_of(thing, known)}
    assert all(any(noun in text or noun[:-1] in text for noun in named) for text in batch.texts)


def test_the_loss_by_hand():
    loss = DualLoss()
    with torch.no_grad():
        loss.log_scale.fill_(math.log(2.0))
        loss.bias.fill_(-1.0)
    cosine = torch.tensor([[1.0, 0.3], [0.5, 0.2], [-1.0, 0.1], [0.0, 0.9]])
    truth = torch.tensor([[1, 1], [1, 1], [0, 1], [-1, 1]])  # the second phrase is right everywhere: not asked

    def logistic(value):
        return math.log1p(math.exp(-value))

    paired = (logistic(2 - 1) + logistic(1 - 1)) / 2 + logistic(-(-2 - 1))
    ranked = (math.log(math.exp(2) + math.exp(-2)) - 2 + math.log(math.exp(1) + math.exp(-2)) - 1) / 2
    assert float(loss(cosine, truth).detach()) == pytest.approx(paired + ranked, abs=1e-5)
    nothing = loss(cosine.requires_grad_(), torch.ones(4, 2, dtype=torch.long))
    assert float(nothing.detach()) == 0 and torch.isfinite(torch.autograd.grad(nothing, cosine)[0]).all()


def test_gradients_are_finite_where_phrases_are_right_or_wrong_once():
    cosine = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    truth = torch.full((5, 7), -1)
    truth[0], truth[1] = 1, 0
    DualLoss()(cosine, truth).backward()
    assert cosine.grad is not None and torch.isfinite(cosine.grad).all()
    assert (cosine.grad[0] < 0).all() and (cosine.grad[1] > 0).all() and (cosine.grad[2:] == 0).all()


def test_area_under_curve_counts_pairs():
    scores, truth = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 1, 0, 1])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth == 1] for b in scores[truth == 0]]
    assert area_under_curve(scores, truth) == pytest.approx(np.mean(pairs))


def test_crop_windows_are_square_around_the_object():
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:20, 15:19] = True
    rows, columns = crop_window(mask)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (8, 22, 10, 24)
    mask[:] = True
    assert crop_window(mask) == (slice(0, 40), slice(0, 40))


def test_the_command_trains_tests_and_repeats(tmp_path, capsys):
    found = []
    for name in ("a", "b"):
        words = ["--rooms", "1", "--held-out", "1", "--steps", "2", "--device", "cpu", "--seed", "3"]
        assert cli.main(["dual", "--out", str(tmp_path / name), *words]) == 0
        encoder = load_text_encoder(str(tmp_path / name))
        found.append(encoder.embed_texts(["Where is the red chair?"]))
        report = json.loads((tmp_path / name / "dual.json").read_text())
        assert report["steps"] == 2 and report["held_out"]["questions"] > 5 and report["held_out"]["crops"] > 5
        assert all(0 <= report["held_out"][key] <= 1 for key in ("view_first", "view_auc", "crop_first", "crop_five"))
    assert torch.equal(*found)
    assert "view_auc" in capsys.readouterr().out
    assert pytest.approx(100 / 224**2, abs=1e-5) == SHOWN
