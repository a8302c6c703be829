"""Names drawn for a sample: prompt, target and token agree on them, and nothing but the names changes."""

import json
import re

import numpy as np
import pytest
import torch

from threedr1.datasets.scene import Sample
from threedr1.engine import sft
from threedr1.engine.build import build_model, check_settings
from threedr1.engine.config import load_config
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.predict import detected_objects, world_boxes
from threedr1.engine.runtime import Runtime
from threedr1.engine.sft_data import Batches, NameStreams, write_targets
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.streams import stream
from threedr1.utils.text import format_box

from .test_object_token import build, settings  # noqa: F401


def caption(box_7) -> Sample:
    return Sample("c-0", "object_caption", "own", "scene0000_00", "", "a thing", query_box_7=np.asarray(box_7))


@pytest.fixture(scope="module")
def model(rooms_root) -> SceneVLM:
    return build(rooms_root, "model.language.name_pool=30")


@pytest.fixture(scope="module")
def observation(model, rooms_root):
    config = settings(rooms_root)
    samples, store = load_split(config.data, "train", 0)
    observation = model.observe(store[samples[0].scene_id])
    model.encode([observation])
    return observation


def test_prompt_target_and_question_use_the_same_names(model, observation):
    boxes = observation.encoded.named
    names = model.prompts.draw_names(observation.encoded.told, stream(3))
    assert len(set(names)) == len(boxes) and set(names) <= set(range(30)) and names != sorted(names)
    world = observation.scene.to_world(boxes)
    row, _ = model.write_row(caption(world[2]), observation, "direct", None, names)
    text = model.language.decode(row.token_ids)
    said = [int(number) for number in re.findall(r"<obj(\d+)>", text.partition("Objects: ")[2])]
    assert said[: len(names)] == names and said[len(names) :] == [names[2]]
    assert row.names == tuple(names)
    target = observation.encoded.told.pointed(f"It is {format_box(boxes[1].tolist())}.", names)
    assert target == f"It is <obj{names[1]}>."


def test_an_answer_tells_the_boxes_of_all_names_it_says(model, observation):
    world = observation.scene.to_world(observation.encoded.named)
    text = "<think>The desk <obj2> and the desk <obj2> and <obj9999>.</think><answer>A chair <obj1>.</answer>"
    said = model.read_answer(text, observation)
    assert list(said.named) == ["<obj2>", "<obj1>"]
    np.testing.assert_allclose(list(said.named.values()), world[[2, 1]], atol=1e-5)
    np.testing.assert_allclose(said.boxes, world[[1]], atol=1e-5)
    nothing = model.read_answer("<answer>A chair.</answer>", observation)
    assert nothing.named == {} and nothing.boxes == []


def test_a_thought_points_by_name_alone_and_an_answer_in_numbers_too(model, observation):
    found, nowhere = (
        format_box(observation.encoded.named[1].tolist()),
        "<box>90.00, 0.00, 0.00, 1.00, 1.00, 1.00</box>",
    )
    sample = Sample(
        "t-0", "qa", "own", "scene0000_00", "?", f"it {found} or {nowhere}.", think=f"A desk {found}, a bed {nowhere}."
    )
    (named,), (numbers,) = (
        write_targets(model, [sample], [observation], pointers=pointers, naming=stream) for pointers in ("name", "box")
    )
    name = f"<obj{named.row.names[1]}>"
    text = model.language.decode(named.row.token_ids)
    assert f"<think>A desk {name}, a bed.</think><answer>it {name} or {nowhere}.</answer>" in text
    said = model.language.decode(numbers.row.token_ids)
    assert f"<think>{sample.think}</think><answer>{sample.answer}</answer>" in said
    assert named.sample is sample


@torch.no_grad()
def test_a_token_carries_its_own_name_and_is_the_same_thing(model, observation):
    encoded = observation.encoded
    count = len(encoded.named)
    names = list(range(29, 29 - count, -1))
    plain, called, both = (
        model.scene_tokens([encoded] * many, its)[0] for many, its in ((1, None), (1, [names]), (2, [None, names]))
    )
    expected = model.connector.objects(
        encoded.features_KE[None], encoded.boxes_K7[None], encoded.class_probs_KC[None], encoded.colors_K6[None]
    )[0, encoded.valid_n]
    for tokens, numbers in ((plain, list(range(count))), (called, names)):
        torch.testing.assert_close(tokens[:count], model.connector.named(expected, torch.tensor(numbers)))
    torch.testing.assert_close(plain[count:], called[count:])  # the layout
    torch.testing.assert_close(both, torch.cat([plain, called]))


def test_names_follow_from_seed_and_step_alone(model, rooms_root):
    config = settings(rooms_root)
    samples, store = load_split(config.data, "train", 0)
    cache = ObservationCache(store, model, seed=0)

    def rows(step: int, naming) -> list[tuple[int, ...] | None]:
        batches = Batches(model, lambda _: samples[:4], cache, pointers="name", num_steps=9, naming=naming)
        return [entry.row.names for entry in batches[step]]

    drawn = rows(5, lambda *at: stream(0, *at))
    assert drawn == rows(5, lambda *at: stream(0, *at)) != rows(6, lambda *at: stream(0, *at))
    assert len(set(drawn)) == 4
    assert rows(5, None) == [None] * 4


def test_ranks_draw_the_names_that_one_process_draws():
    def numbers(step, rank, world_size):
        runtime = Runtime(torch.device("cpu"), rank, world_size, rank)
        naming = NameStreams(3, 8, runtime)
        return [naming(step, place).integers(10**9) for place in range(8 // world_size)]

    alone = numbers(2, 0, 1)
    assert numbers(2, 0, 2) + numbers(2, 1, 2) == alone != numbers(3, 0, 1)
    assert len({*alone, *numbers(3, 0, 1)}) == 16


def test_without_a_pool_names_are_in_order(rooms_root, observation):
    plain = build(rooms_root)
    assert plain.prompts.draw_names(observation.encoded.told, stream(0)) is None
    assert plain.connector.place_embedding.num_embeddings == plain.connector.num_proposals
    sample = Sample(
        "g-0", "grounding", "own", "scene0000_00", "it", f"it {format_box(observation.encoded.named[0].tolist())}"
    )
    (taught,) = write_targets(plain, [sample], [plain.observe(observation.scene)], pointers="name", naming=stream)
    assert taught.row.names is None


def test_a_pool_smaller_than_the_proposals_is_refused():
    with pytest.raises(
        ValueError, match=r"model.language.name_pool is 7; it must be 0, or num_proposals \(8\) or more"
    ):
        load_config("sft", None, ["model.language.num_proposals=8", "model.language.name_pool=7"])


def test_a_trained_models_pool_is_kept_and_asked_for(rooms_root, tmp_path):
    config = settings(rooms_root, "model.language.name_pool=30", "run.steps=1", run_dir=tmp_path / "run")
    checkpoint = sft.train(config)
    loaded = SceneVLM.from_pretrained(checkpoint / "model")
    assert loaded.connector.name_pool == 30 and loaded.connector.place_embedding.num_embeddings == 30
    with pytest.raises(ValueError, match="made with name_pool 30, but the configuration says 0"):
        sft.train(settings(rooms_root, f"init={checkpoint / 'model'}", run_dir=tmp_path / "other"))
    assert build_model(config.model, config.data).connector.name_pool == 30


@torch.no_grad()
def test_a_tokens_name_may_be_the_language_models_own_words(rooms_root, observation):
    """Of two proposals that swap their names, what is added is exactly the difference of the names' embeddings."""
    made = build(rooms_root, "model.language.name_pool=30", "model.language.name_in_token=true")
    words_PD = made.writer.embed_names(made.language.embedding, 30)
    ids = made.writer._text("<obj17>")
    torch.testing.assert_close(words_PD[17], made.language.embedding.weight[torch.tensor(ids)].mean(0))
    assert words_PD.shape == (30, made.language.width)
    objects_ND, names_N = torch.randn(2, made.language.width), torch.tensor([17, 4])
    with_words, without = (made.connector.named(objects_ND, names_N, words) for words in (words_PD, None))
    expected = objects_ND + made.connector.place_embedding.weight[names_N] + 0.2 * words_PD[names_N] / words_PD.std()
    torch.testing.assert_close(with_words, made.connector.output_norm(expected))
    assert not torch.allclose(with_words, without)
    (encoded,) = made.encode([made.observe(observation.scene)])
    count = len(encoded.named)
    described = made.connector.objects(
        encoded.features_KE[None], encoded.boxes_K7[None], encoded.class_probs_KC[None], encoded.colors_K6[None]
    )[0, encoded.valid_n]
    expected = made.connector.named(described, torch.arange(count), words_PD)
    torch.testing.assert_close(made.scene_tokens([encoded])[0][:count], expected)


def test_words_in_tokens_are_kept_and_get_gradients(rooms_root, tmp_path):
    config = settings(rooms_root, "model.language.name_in_token=true", "run.steps=1", run_dir=tmp_path / "run")
    loaded = SceneVLM.from_pretrained(sft.train(config) / "model")
    assert loaded.connector.name_in_token and loaded.connector.name_pool == 0
    words_PD = loaded.writer.embed_names(loaded.language.embedding, 8)
    loaded.connector.named(torch.zeros(8, loaded.language.width), torch.arange(8), words_PD)[:, 0].sum().backward()
    assert float(loaded.language.embedding.weight.grad.abs().sum()) > 0


def test_a_run_from_before_colours_goes_on_without_them(rooms_root, tmp_path):
    own = {"run_dir": tmp_path / "run"}
    without = settings(rooms_root, "run.steps=1", "model.language.object_color=false", **own)
    checkpoint = sft.train(without)
    config = checkpoint / "config.yaml"
    text = config.read_text()
    assert "    object_color: false\n" in text
    config.write_text(text.replace("    object_color: false\n", ""))
    assert sft.train(without, resume=True) == checkpoint
    with pytest.raises(ValueError, match=r"model.language.object_color: False -> True"):
        sft.train(settings(rooms_root, "run.steps=1", **own), resume=True)


def test_objects_may_stand_from_left_to_right(rooms_root, observation, tmp_path):
    ordered = build(rooms_root, "model.language.left_to_right=true")
    seen = ordered.observe(observation.scene)
    (encoded,) = ordered.encode([seen])
    assert len(encoded.named) > 3 and encoded.named[:, 0].tolist() == sorted(encoded.named[:, 0])
    objectness = encoded.objectness_K[encoded.valid_K].tolist()
    assert objectness != sorted(objectness, reverse=True), "or nothing was put in another order"
    places = world_boxes(seen, encoded.proposals.tolist())
    found = [objectness[places.index(box)] for box in detected_objects(ordered, seen)]
    assert len(found) > 1 and found == sorted(found, reverse=True), "captions are still of the surest first"
    ordered.save_pretrained(tmp_path)
    loaded = SceneVLM.from_pretrained(tmp_path)
    assert loaded.settings.left_to_right
    config = settings(rooms_root)
    with pytest.raises(ValueError, match="left_to_right True, but the configuration says False"):
        check_settings(loaded, config.model, config.data)
    path = tmp_path / "scene_vlm.json"
    before = json.loads(path.read_text())
    del before["settings"]["left_to_right"]  # as saved before there was such a thing
    path.write_text(json.dumps(before))
    assert not SceneVLM.from_pretrained(tmp_path).settings.left_to_right
