"""Training of the small dual encoder: what is right for a picture, the loss by hand, the command end to end."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from threedr1 import main as cli
from threedr1.datasets.rooms import generate_room
from threedr1.engine.dual import TrainingSet, cell_batch, cell_loss, fit_images, fit_texts, text_batch, train_dual
from threedr1.engine.dual_data import (
    SHOWN,
    cell_owners,
    cell_weights,
    crop_window,
    fits,
    meant,
    nouns_of,
    phrase_about,
    picture_room,
    random_window,
    shares,
)
from threedr1.engine.dual_retrieval import area_under_curve
from threedr1.models.dual_encoder import DualEncoder
from threedr1.models.image_encoder import load_text_encoder


@pytest.fixture(scope="module")
def pictured():
    return picture_room("train", 0, 0)


def test_what_an_object_may_be_called():
    room = generate_room("scene0000_00", 4, points_only=True)
    known = frozenset({"chair", "office chair", "table"})
    thing = room.objects[0]
    thing.label, thing.class_id, thing.nyu40 = "office chair", 2, 5
    thing.color, thing.material, thing.size_word = "dark brown", "leather", "tall"
    assert nouns_of(thing, known) == {"office chair", "chair"}
    for adjective, expected in (("", 1), ("dark brown", 1), ("brown", 1), ("leather", 1), ("tall", 1), ("dark", 0)):
        assert fits(thing, ("chair", adjective), known) == bool(expected)
    assert not fits(thing, ("table", ""), known)


def test_phrases_name_what_they_are_about():
    room = generate_room("scene0000_00", 4, points_only=True)
    thing = room.objects[0]
    thing.label, thing.class_id, thing.nyu40 = "bookshelf", 7, 10
    thing.color, thing.material, thing.size_word = "dark red", "", "tall"
    generator = np.random.default_rng(0)
    phrases = [phrase_about(thing, frozenset({"bookshelf"}), generator) for _ in range(600)]
    texts = {phrase.text for phrase in phrases}
    assert {"red bookshelf", "Where is the dark red bookshelf?", "How many tall bookshelves are there?"} <= texts
    assert all("bookshel" in text and "{" not in text for text in texts)
    assert {(phrase.label, phrase.color) for phrase in phrases} == {("bookshelf", "dark red")}


def test_a_text_means_the_target_that_it_names_or_else_what_it_names():
    room = generate_room("scene0000_00", 4, points_only=True)
    table, desk, lamp, other = room.objects[:4]
    for thing, label, color in (
        (table, "table", "white"),
        (desk, "coffee table", "brown"),
        (lamp, "lamp", "blue"),
        (other, "lamp", "red"),
    ):
        thing.label, thing.color = label, color
    things = [table, desk, lamp, other]
    assert meant("Where is the blue lamp next to the white table?", [lamp], things) is lamp
    assert meant("What is on the coffee table?", [lamp], things) is desk
    assert meant("What is under the red lamp?", [table], things) is other
    assert meant("What is the largest thing?", [table], things) is table


def test_pictures_know_what_they_show(pictured):
    again = picture_room("train", 0, 0)
    np.testing.assert_array_equal(again.images_VSS3, pictured.images_VSS3)
    assert again.phrases == pictured.phrases and len(pictured.phrases) > 20
    there = {(thing.label, thing.color) for thing in pictured.room.objects}
    assert {(phrase.label, phrase.color) for phrase in pictured.phrases} <= there
    count = len(pictured.room.objects)
    assert pictured.owners_VSS.shape == pictured.images_VSS3.shape[:3]
    assert pictured.owners_VSS.min() == -1 and pictured.owners_VSS.max() < count
    for view in (0, 5):
        share_K = shares(pictured.owners_VSS[view], count)
        for row in range(count):
            assert share_K[row] == pytest.approx((pictured.owners_VSS[view] == row).mean())


def test_windows_lie_inside_and_a_third_is_around_an_object():
    owner = np.full((40, 40), -1, dtype=np.int16)
    owner[30:36, 2:6] = 3
    owner[0, 39] = 5  # too small for a crop
    generator = np.random.default_rng(0)
    around, whole = crop_window(owner == 3), (slice(0, 40), slice(0, 40))
    windows = []
    for _ in range(600):
        rows, columns = random_window(owner, generator)
        assert 0 <= rows.start < rows.stop <= 40 and 0 <= columns.start < columns.stop <= 40
        windows.append((rows, columns))
    assert 0.25 < np.mean([window == around for window in windows]) < 0.35
    assert 0.35 < np.mean([window == whole for window in windows]) < 0.48
    assert random_window(np.full((40, 40), -1, dtype=np.int16), generator)[0].stop <= 40


def test_cells_their_owners_and_weights_by_hand():
    owner = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [-1, -1, 2, 2], [-1, -1, 2, 2]])
    assert cell_owners(owner, 2).tolist() == [0, 1, -1, 2]
    assert cell_owners(owner[:, 1:], 2).tolist() == [0, 1, -1, 2]
    np.testing.assert_allclose(cell_weights(np.array([2, -1, 2, 0, -1, 2, 2, -1])), [0.5, 3**-0.5, 0.5, 1, *_rest()])


def _rest():
    return 3**-0.5, 0.5, 0.5, 3**-0.5


def test_batches_say_what_is_right(pictured):
    data = TrainingSet.of([pictured])
    batch, again = (cell_batch(data, 112, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(batch.pictures_n3SS, again.pictures_n3SS) and torch.equal(batch.name_nL, again.name_nL)
    assert batch.pictures_n3SS.shape[1:] == (3, 112, 112) and batch.name_nL.shape == (12, 196)
    nothing = batch.name_nL == len(data.labels)
    assert torch.equal(nothing, batch.color_nL == -1) and 0.05 < nothing.float().mean() < 0.95
    there = {(thing.label, thing.color) for thing in pictured.room.objects}
    shown = zip(batch.name_nL[~nothing].tolist(), batch.color_nL[~nothing].tolist(), strict=True)
    assert {(data.labels[name], data.colors[color]) for name, color in shown} <= there
    phrases = text_batch(data, np.random.default_rng(3))
    assert phrases == text_batch(data, np.random.default_rng(3)) and len(phrases) == 96
    assert {(phrase.label, phrase.color) for phrase in phrases} <= there
    assert len({phrase.label for phrase in phrases[:48]}) > len(data.labels) / 2
    silent = TrainingSet.of([dataclasses.replace(pictured, phrases=[])])
    assert len(text_batch(silent, np.random.default_rng(3))) == 48


def test_the_loss_of_cells_by_hand():
    names, colors = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 3)
    loss = cell_loss(names, colors, torch.tensor([0, 0, 1]), torch.tensor([1, 0, -1]), torch.tensor([1.0, 2.0, 3.0]))
    of_names = (math.log1p(math.e) + 2 * math.log1p(math.exp(-2)) + 3 * math.log(2)) / 6
    of_colors = (math.log1p(math.e) + 2 * math.log1p(math.exp(-1))) / 3
    assert float(loss) == pytest.approx(of_names + of_colors, abs=1e-5)
    empty = cell_loss(names, colors, torch.ones(3, dtype=torch.long), torch.full((3,), -1), torch.ones(3))
    assert torch.isfinite(empty)


def test_it_learns_one_room(pictured):
    """A small encoder comes to know what a room's texts and pictures are about."""
    torch.manual_seed(0)
    data = TrainingSet.of([pictured])
    encoder = DualEncoder(num_names=len(data.labels), num_colors=len(data.colors), image_width=48, text_width=48)
    cpu = torch.device("cpu")
    start = math.log(len(data.labels)) + math.log(len(data.colors))
    assert fit_texts(encoder, data, steps=60, seed=0, device=cpu) < 0.6 * start
    assert fit_images(encoder, data, steps=60, seed=0, device=cpu) < 0.75 * start
    label = data.labels[0]
    texts = encoder.embed_texts([f"Where is the {label}?", f"the {label}", f"the {data.labels[-1]}"])
    assert texts[0] @ texts[1] > texts[0] @ texts[2] + 0.2


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
        assert (
            report["steps"] == 2
            and len(report["names"]) > 5
            and report["held_out"]["questions"] > 5
            and report["held_out"]["crops"] > 5
        )
        assert all(0 <= report["held_out"][key] <= 1 for key in ("view_first", "view_auc", "crop_first", "crop_five"))
    assert torch.equal(*found)
    assert "view_auc" in capsys.readouterr().out
    assert pytest.approx(100 / 224**2, abs=1e-5) == SHOWN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_trained_and_tested_alike(tmp_path):
    found = [
        train_dual(tmp_path / device, rooms=1, held_out=1, steps=2, seed=3, device=device)["held_out"]
        for device in ("cuda", "cpu")
    ]
    assert found[0]["questions"] == found[1]["questions"] > 5 and found[0]["crops"] == found[1]["crops"] > 5
    assert all(0 <= found[0][key] <= 1 for key in ("view_first", "view_auc", "crop_first", "crop_five"))
