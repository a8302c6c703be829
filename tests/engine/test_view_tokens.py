"""Tokens of the image encoder and of depth, from configuration to training, rollouts and files; and no 3D tokens."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from threedr1.datasets.scene import Sample
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine import grpo, sft
from threedr1.engine.build import build_model
from threedr1.engine.checkpoint import latest_checkpoint, list_checkpoints
from threedr1.engine.config import load_config
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.grpo_packs import make_packs
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.engine.sft import sft_loss
from threedr1.engine.sft_data import Batches, write_targets
from threedr1.engine.tracking import read_metrics
from threedr1.models.inputs import SCENE, VIEW_DEPTH, VIEW_IMAGE
from threedr1.models.scene_vlm import SceneVLM
from threedr1.models.view_cache import ViewCache
from threedr1.models.view_tokens import DEPTH_CELLS, IMAGE_FEATURES

from ..models.test_view_selector import write_dual_encoder
from ..models.test_view_tokens import write_depth_anything
from .test_pipeline import assert_same_weights, grpo_config, sft_config

QUESTION = Sample("q", "qa", "own", "s", "How many chairs are there?", "two")
NO_3D = [f"model.language.{setting}" for setting in ("num_proposals=0", "num_layout_tokens=0", "object_token=false")]
RECIPES = ("text_image", "depth", "point", "full")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny checkpoints: SigLIP-2 and Depth-Anything."""
    base = tmp_path_factory.mktemp("encoders")
    return write_dual_encoder(base / "siglip2", "siglip2"), write_depth_anything(base / "depth")


def both(encoders, *more):
    image, depth = encoders
    return [
        "model.views.source=mixed",
        "model.views.num_candidates=4",
        "model.views.num_views=2",
        "model.views.image_encoder_tokens=4",
        f"model.views.token_encoder={image}",
        "model.views.depth_tokens=9",
        f"model.depth.encoder={depth}",
        *more,
    ]


def build(root, *more):
    config = sft_config(root, "unused", "model.encoder.dropout=0.0", *more)
    torch.manual_seed(0)
    return build_model(config.model, config.data).eval()


@pytest.fixture(scope="module")
def scene(rooms_root):
    store = SceneStore(rooms_root / "prepared")
    return store[store.scene_ids[0]]


@pytest.fixture(scope="module")
def model(rooms_root, encoders):
    return build(rooms_root, *both(encoders))


def embedded(model, observation, sample=QUESTION):
    row, views = model.write_row(sample, observation, "direct", sample.answer)
    return row, views, model.embed_rows([row], [observation], [views])


def test_tokens_are_the_projected_features_of_the_views_in_their_order(model, scene):
    observation = model.observe(scene)
    with torch.no_grad():
        row, views, inputs = embedded(model, observation)
        kinds_L = torch.tensor(row.kinds)
        assert len(views) == 2 and int((kinds_L == VIEW_IMAGE).sum()) == 8 and int((kinds_L == VIEW_DEPTH).sum()) == 18
        features, cells = (observation.view_features[kind][views] for kind in (IMAGE_FEATURES, DEPTH_CELLS))
        embeds_LD = inputs.inputs_embeds_BLD[0]
        expected = model.connector.view_images(features).flatten(0, 1)
        torch.testing.assert_close(embeds_LD[kinds_L == VIEW_IMAGE], expected)
        expected = model.connector.view_depths(cells).flatten(0, 1)
        torch.testing.assert_close(embeds_LD[kinds_L == VIEW_DEPTH], expected)
        before = dict(observation.view_features)
        _, _, again = embedded(model, observation)
    assert torch.equal(again.inputs_embeds_BLD, inputs.inputs_embeds_BLD)
    assert all(observation.view_features[kind] is before[kind] for kind in before), "computed once"
    fresh = model.observe_again(observation, seed=1)
    assert fresh.view_features is observation.view_features


def test_switched_off_a_row_is_what_it_was(rooms_root, model, encoders, scene):
    """The same weights where both models have them, and the same embeddings where both rows have a token."""
    plain = build(rooms_root, *both(encoders)[:3])
    assert plain.view_features is None
    names = plain.state_dict().keys()
    assert all("connector.view" in name for name in model.state_dict().keys() - names)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    with torch.no_grad():
        first, views, without = embedded(plain, plain.observe(scene))
        second, same_views, with_tokens = embedded(model, model.observe(scene))
    kept = [index for index, kind in enumerate(second.kinds) if kind not in (VIEW_IMAGE, VIEW_DEPTH)]
    assert views == same_views and first.token_ids == [second.token_ids[index] for index in kept]
    assert torch.equal(with_tokens.inputs_embeds_BLD[:, kept], without.inputs_embeds_BLD)


@pytest.mark.parametrize(("off", "kind"), [("image_encoder_tokens", VIEW_IMAGE), ("depth_tokens", VIEW_DEPTH)])
def test_each_is_switched_on_its_own(rooms_root, encoders, scene, off, kind):
    model = build(rooms_root, *both(encoders, f"model.views.{off}=0"))
    row, _, _ = embedded(model, model.observe(scene))
    assert kind not in row.kinds and {VIEW_IMAGE, VIEW_DEPTH} - {kind} <= set(row.kinds)
    named = "view_image" if kind == VIEW_IMAGE else "view_depth"
    assert not [name for name in model.connector.state_dict() if name.startswith(named)]


def test_the_selectors_own_encoder_lends_its_patches(rooms_root, encoders, scene):
    image, _ = encoders
    more = [f"model.views.encoder={image}", "model.views.w_image=0.5", "model.views.w_clip=0.5"]
    model = build(rooms_root, *both(encoders, *more, "model.views.token_encoder=", "model.views.depth_tokens=0"))
    assert model.view_features.image_encoder() is model.view_selector.encoder
    named = build(rooms_root, *both(encoders, *more, "model.views.depth_tokens=0"))
    with torch.no_grad():
        _, _, lent = embedded(model, model.observe(scene))
        _, _, loaded = embedded(named, named.observe(scene))
    assert torch.equal(lent.inputs_embeds_BLD, loaded.inputs_embeds_BLD)


def test_gradients_reach_the_projections_and_no_frozen_encoder(rooms_root, encoders, scene):
    model = build(rooms_root, *both(encoders)).train()
    model.set_trainable(language="none", connector=True, scene_encoder=False)
    loss, _ = sft_loss(model, write_targets(model, [QUESTION], [model.observe(scene)], pointers="name"))
    loss.backward()
    connector = model.connector
    layers = [connector.view_image_linear, connector.view_depth_mlp[0], connector.view_depth_mlp[2]]
    for layer in (*layers, connector.view_image_place, connector.view_depth_place):
        assert float(layer.weight.grad.abs().sum()) > 0
    features = model.view_features
    frozen = [*features.image_encoder().parameters(), *features.depth_encoder.parameters()]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert not {id(parameter) for parameter in frozen} & {id(parameter) for parameter in model.parameters()}


def test_learned_view_weights_fade_these_tokens_too(rooms_root, encoders, scene):
    model = build(rooms_root, *both(encoders))
    observation = model.observe(scene)
    row, views = model.write_row(QUESTION, observation, "direct", "two")
    gates_k = torch.ones(2, requires_grad=True)
    plain = model.embed_rows([row], [observation], [views])
    gated = model.embed_rows([row], [observation], [views], gates=[gates_k])
    assert torch.equal(plain.inputs_embeds_BLD, gated.inputs_embeds_BLD)
    kinds_L = torch.tensor(row.kinds)
    for kind in (VIEW_IMAGE, VIEW_DEPTH):
        weight = torch.randn(model.language.width)
        here_LD = gated.inputs_embeds_BLD[0, kinds_L == kind]
        (gradient_k,) = torch.autograd.grad((here_LD * weight).sum(), gates_k, retain_graph=True)
        per_view = here_LD.detach().unflatten(0, (2, -1))
        expected_k = ((per_view - here_LD.detach().mean(0)) * weight).sum((1, 2))
        torch.testing.assert_close(gradient_k, expected_k, atol=1e-4, rtol=1e-4)


def test_rollouts_and_their_log_probabilities_see_the_same_tokens(model, scene):
    observation = model.observe(scene)
    model.encode([observation])
    other = replace(QUESTION, sample_id="r", question="Where is the bed in this large room, and what is behind it?")
    rollouts = roll_out(
        model,
        write_prompts(model, [QUESTION, other], [observation] * 2, ["direct"] * 2),
        max_new_tokens=4,
        group_size=2,
    )
    (pack,) = make_packs(model, rollouts, [[0, 1]] * 2, budget=10_000)
    with torch.no_grad():
        logps_LV = (model.hidden(pack.inputs)[0] @ model.language.head_weight_VD.T).log_softmax(-1)
    # greedy: each token that was taken was the likeliest
    torch.testing.assert_close(
        logps_LV[pack.inputs.predicting_T, pack.inputs.targets_T], logps_LV[pack.inputs.predicting_T].amax(1)
    )
    assert len(pack.inputs.targets_T) == sum(len(ids) for rollout in rollouts for ids in rollout.token_ids)


def test_a_saved_model_has_the_same_tokens_and_an_older_one_has_none(rooms_root, model, encoders, scene, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = SceneVLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        _, _, ours = embedded(model, model.observe(scene))
        _, _, theirs = embedded(loaded, loaded.observe(scene))
    assert torch.equal(ours.inputs_embeds_BLD, theirs.inputs_embeds_BLD)
    assert loaded.ask(scene, QUESTION.question, max_new_tokens=3) == model.ask(
        scene, QUESTION.question, max_new_tokens=3
    )
    build(rooms_root, *both(encoders)[:3]).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "scene_vlm.json"
    description = json.loads(path.read_text())
    for name in [name for name in description["settings"] if name.startswith(("view_image_", "view_depth_"))]:
        del description["settings"][name]
    path.write_text(json.dumps(description))
    old = SceneVLM.from_pretrained(tmp_path / "old")
    assert old.view_features is None and old.settings.view_image_tokens == 0 == old.connector.num_view_depth_tokens


@pytest.fixture(scope="module")
def full_run(rooms_root, encoders, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "full"
    sft.train(sft_config(rooms_root, run_dir, *both(encoders), "run.steps=2", "run.save_every=1"))
    return run_dir


def test_training_resumes_exactly_and_refuses_another_number_of_tokens(rooms_root, encoders, full_run, tmp_path):
    halfway = list_checkpoints(full_run)[0]
    shutil.copytree(halfway, tmp_path / "a" / "checkpoints" / halfway.name)
    more = [*both(encoders), "run.steps=2", "run.save_every=1"]
    resumed = sft.train(sft_config(rooms_root, tmp_path / "a", *more), resume=True)
    assert_same_weights(resumed, latest_checkpoint(full_run))
    with pytest.raises(ValueError, match="made with view_depth_tokens 9, but the configuration says 4"):
        sft.train(sft_config(rooms_root, tmp_path / "b", f"init={full_run}", *more, "model.views.depth_tokens=4"))


def test_reinforcement_learning_goes_on_with_them(rooms_root, full_run, tmp_path):
    grpo.train(grpo_config(rooms_root, full_run, tmp_path, "run.steps=1"))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["mismatch/mean"] < 1e-4 and row["kl"] == pytest.approx(0, abs=1e-6)
    loaded = SceneVLM.from_pretrained(latest_checkpoint(tmp_path) / "model")
    assert (loaded.settings.view_image_tokens, loaded.settings.view_depth_tokens) == (4, 9)


def test_a_run_from_before_these_keys_goes_on(rooms_root, tmp_path):
    more = ["run.steps=2", "run.save_every=1", "optim.schedule=constant"]
    sft.train(sft_config(rooms_root, tmp_path / "now", *more))
    halfway = list_checkpoints(tmp_path / "now")[0]
    shutil.copytree(halfway, tmp_path / "old" / "checkpoints" / halfway.name)
    path = tmp_path / "old" / "checkpoints" / halfway.name / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["model"]["depth"]
    for key in ("image_encoder_tokens", "token_encoder", "depth_tokens"):
        del saved["model"]["views"][key]
    path.write_text(yaml.safe_dump(saved))
    resumed = sft.train(sft_config(rooms_root, tmp_path / "old", *more), resume=True)
    assert_same_weights(resumed, latest_checkpoint(tmp_path / "now"))


# -- no 3D tokens ------------------------------------------------------------------------------------------------


def test_without_3d_tokens_views_are_chosen_alike_and_boxes_are_numbers(rooms_root, encoders, scene):
    full, flat = build(rooms_root), build(rooms_root, *NO_3D)
    flat.scene_encoder.load_state_dict(full.scene_encoder.state_dict())
    first, second = full.observe(scene), flat.observe(scene)
    (with_names,), (without,) = full.encode([first]), flat.encode([second])
    count = len(with_names.proposals)
    np.testing.assert_array_equal(without.proposals[:count], with_names.proposals)
    assert len(without.named) == 0 < len(with_names.named)
    box_7 = scene.to_world(with_names.proposals[:1])[0]
    caption = Sample("c", "object_caption", "own", "s", "Describe the object.", "a chair", query_box_7=box_7)
    for sample in (QUESTION, caption):
        row, views = flat.write_row(sample, second, "direct", None)
        text = flat.language.tokenizer.decode(row.token_ids).partition("<|im_start|>user")[2]
        assert SCENE not in row.kinds and "<obj" not in text and len(views) == 1
        assert ("<box>" in text) == (sample is caption)
    assert second.encoded.told.pointed("<answer><box>1, 2, 3, 1, 1, 1</box></answer>").count("<box>") == 1
    assert flat.read_answer("<answer><obj0></answer>", second).boxes == []


def test_a_model_without_3d_tokens_trains_answers_and_is_saved(rooms_root, tmp_path):
    checkpoint = sft.train(sft_config(rooms_root, tmp_path / "sft", *NO_3D, "run.steps=2"))
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    grpo.train(grpo_config(rooms_root, tmp_path / "sft", tmp_path / "grpo", "run.steps=1"))
    loaded = SceneVLM.from_pretrained(checkpoint / "model")
    store = SceneStore(rooms_root / "prepared")
    assert isinstance(loaded.ask(store[store.scene_ids[0]], "Where is the bed?", max_new_tokens=3).text, str)


# -- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.views.depth_tokens=5", "depth_tokens is 5; it must be a square number"),
        ("model.views.image_encoder_tokens=-1", "image_encoder_tokens is -1; it must be a square number"),
    ],
)
def test_wrong_numbers_of_tokens_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        load_config("sft", None, [setting])
    with pytest.raises(ValueError, match="source is 'none', but views are to have tokens"):
        load_config("sft", None, ["model.views.source=none", "model.views.depth_tokens=4"])


def test_the_recipes_differ_only_in_what_table_10_names():
    configs = {name: load_config("sft", f"script/recipes/ablation.{name}.yaml") for name in RECIPES}
    shown = {
        name: (config.model.views.depth_tokens, config.model.language.num_proposals, config.model.views.num_views)
        for name, config in configs.items()
    }
    assert shown == {"text_image": (0, 0, 6), "depth": (16, 0, 6), "point": (0, 64, 6), "full": (16, 64, 6)}
    assert len({config.run.dir for config in configs.values()}) == 4
    full = configs["full"].model
    for config in configs.values():
        model = config.model
        views = replace(model.views, depth_tokens=full.views.depth_tokens)
        language = replace(model.language, num_proposals=64, num_layout_tokens=32, object_token=True)
        assert replace(model, views=views, language=language, depth=full.depth) == full
        assert replace(config, run=configs["full"].run, model=full) == configs["full"]


@pytest.mark.parametrize(
    ("kept_on_disk", "trains"),
    [(False, False), (True, False), (False, True)],
    ids=["kept", "on disk", "encoder trains"],
)
def test_processes_make_the_views_that_one_makes(rooms_root, encoders, tmp_path, monkeypatch, kept_on_disk, trains):
    config = sft_config(rooms_root, "unused", "data.datasets=scanqa")
    samples, store = load_split(config.data, "train", 0)
    its = samples[:: max(len(samples) // 6, 1)]
    scenes = {sample.scene_id for sample in its}
    assert len(scenes) > 1
    made_here = []
    monkeypatch.setattr(
        SceneVLM,
        "view_pool",
        lambda self, observation, plain=SceneVLM.view_pool: (
            made_here.append(observation.pool is None) or plain(self, observation)
        ),
    )

    def made_by(workers: int) -> tuple[list, list[dict]]:
        model = build(rooms_root, *both(encoders))
        if trains:
            model.set_trainable(language="none", connector=True, scene_encoder=True)
        cache = ObservationCache(store, model, seed=0)
        if kept_on_disk:
            model.view_cache = ViewCache(tmp_path / str(workers))
        made_here.clear()
        with Batches(model, lambda _: its, cache, pointers="name", num_steps=1, workers=workers) as batches:
            taught = batches[0]
        assert sum(made_here) == (0 if workers and not trains else len(scenes))
        pools = [vars(entry.observation.pool) for entry in taught]
        written = sorted(path.name for path in (tmp_path / str(workers)).glob("*.pool.npz"))
        assert len(written) == (len(scenes) if kept_on_disk else 0)
        return [(entry.row, entry.views) for entry in taught], pools

    (rows, pools), (expected_rows, expected_pools) = made_by(2), made_by(0)
    assert rows == expected_rows and all(len(views) == 2 for _, views in rows)
    for pool, expected in zip(pools, expected_pools, strict=True):
        assert pool["names"] == expected["names"] and len(pool["names"]) == 4
        for name in ("images_VHW3", "visible_VK", "coverage_VS", "points_N3", "seen_VN"):
            assert np.array_equal(pool[name], expected[name]), name
        for camera, other in zip(pool["cameras"], expected["cameras"], strict=True):
            assert np.array_equal(camera.pose_44, other.pose_44)


@pytest.fixture(scope="module")
def three_steps(rooms_root):
    """Prepared scenes, and three batches about two of them."""
    samples, store = load_split(sft_config(rooms_root, "unused", "data.datasets=scanqa").data, "train", 0)
    one, other = list({sample.scene_id: sample for sample in samples}.values())[:2]
    return store, [[one], [other, one], [other]]


def batches_of_three(rooms_root, encoders, three_steps, *, workers, capacity=8, ahead=None):
    store, steps = three_steps
    model = build(rooms_root, *both(encoders))
    cache = ObservationCache(store, model, seed=0, capacity=capacity)
    return Batches(model, steps.__getitem__, cache, pointers="name", num_steps=3, workers=workers, ahead=ahead)


def rows_and_views(taught):
    return [(entry.row, entry.views) for entry in taught]


def test_processes_begin_views_a_step_before(rooms_root, encoders, three_steps, monkeypatch):
    """And each scene's once; no step is read after the last."""
    begun, given = [], []
    plain_maker, plain_give = SceneVLM.pool_maker, SceneVLM.give_pool
    monkeypatch.setattr(
        SceneVLM, "pool_maker", lambda self, seen: begun.append(seen.scene.scene_id) or plain_maker(self, seen)
    )
    monkeypatch.setattr(
        SceneVLM,
        "give_pool",
        lambda self, seen, pool: given.append(seen.scene.scene_id) or plain_give(self, seen, pool),
    )
    one, other = three_steps[1][1][1].scene_id, three_steps[1][1][0].scene_id
    done = []
    with batches_of_three(rooms_root, encoders, three_steps, workers=1) as batches:
        for step in range(3):
            assert len(batches[step]) == len(three_steps[1][step])
            done.append(([*begun], [*given]))
    assert done == [([one, other], [one]), ([one, other], [one, other]), ([one, other], [one, other])]


@pytest.mark.parametrize("capacity", [1, 8])
@pytest.mark.parametrize("ahead", [False, True], ids=["here", "in the thread"])
def test_views_begun_before_change_no_batch(rooms_root, encoders, three_steps, ahead, capacity):
    with batches_of_three(rooms_root, encoders, three_steps, workers=0) as batches:
        expected = [rows_and_views(batches[step]) for step in range(3)]
    with batches_of_three(rooms_root, encoders, three_steps, workers=2, capacity=capacity, ahead=ahead) as batches:
        assert [rows_and_views(batches[step]) for step in range(3)] == expected
        # a step that was not begun, as none is after a resume
        assert rows_and_views(batches[1]) == expected[1]


def test_a_scene_without_the_views_asked_for_is_told_from_the_process(rooms_root, encoders):
    model = build(rooms_root, *both(encoders, "model.views.source=posed"))
    samples, store = load_split(sft_config(rooms_root, "unused", "data.datasets=scanqa").data, "train", 0)
    cache = ObservationCache(store, model, seed=0)
    batches = Batches(model, lambda _: samples[:1], cache, pointers="name", num_steps=1, workers=1)
    cache[samples[0].scene_id].scene.frames = []
    with batches, pytest.raises(ValueError, match="has no posed frames") as told:
        batches[0]
    assert type(told.value.__cause__).__name__ == "_RemoteTraceback"


def test_another_process_says_once_that_views_cannot_be_kept(rooms_root, encoders, tmp_path, capfd):
    (tmp_path / "views").touch()
    model = build(rooms_root, *both(encoders))
    samples, store = load_split(sft_config(rooms_root, "unused", "data.datasets=scanqa").data, "train", 0)
    its = list({sample.scene_id: sample for sample in samples}.values())
    cache = ObservationCache(store, model, seed=0)
    model.view_cache = ViewCache(tmp_path / "views")
    with Batches(model, lambda _: its, cache, pointers="name", num_steps=1, workers=1) as batches:
        assert len(batches[0]) == len(its) > 1
    assert capfd.readouterr().err.count(".pool.npz cannot be written") == 1
