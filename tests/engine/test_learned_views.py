"""SFT with learned view weights: they get the loss's gradient, move, resume exactly, and stay frozen elsewhere."""

import json
import shutil
from functools import partial

import pytest
import torch

from threedr1.engine import grpo, sft
from threedr1.engine.checkpoint import latest_checkpoint, list_checkpoints
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.run_folder import open_run
from threedr1.engine.runtime import init_runtime
from threedr1.engine.sft_data import write_targets
from threedr1.engine.tracking import read_metrics
from threedr1.models.relaxed_top_k import soft_top_k
from threedr1.models.scene_vlm import SceneVLM
from threedr1.models.view_selector import utility

from ..models.test_view_selector import write_dual_encoder
from .test_pipeline import assert_same_weights, grpo_config, sft_config

PICTURES = ["model.views.w_image=0.5", "model.views.w_clip=0.5"]
LEARNED = ["model.views.weights=learned", "model.views.num_candidates=5", "model.views.num_views=2"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return write_dual_encoder(tmp_path_factory.mktemp("encoder") / "clip", "clip")


def learned_config(root, run_dir, encoder, *more):
    return sft_config(root, run_dir, *LEARNED, *PICTURES, f"model.views.encoder={encoder}", *more)


def views_of(checkpoint) -> dict:
    return json.loads((checkpoint / "model" / "scene_vlm.json").read_text())["views"]


@pytest.fixture(scope="module")
def learned_run(rooms_root, encoder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "learned"
    sft.train(learned_config(rooms_root, run_dir, encoder))
    return run_dir


@pytest.fixture
def asked(rooms_root, encoder, tmp_path):
    """A model with learned weights in training, four samples and their scenes."""
    config = learned_config(rooms_root, tmp_path, encoder, "model.views.redundancy=0.0", "data.datasets=scanqa")
    samples, store = load_split(config.data, "train", 0)
    model = sft.load_model(config, None, init_runtime("cpu"))
    cache = ObservationCache(store, model, seed=0)
    return model, samples[:4], cache.of(samples[:4])


def test_weights_move_are_logged_and_saved(learned_run):
    rows = read_metrics(learned_run / "metrics.jsonl")
    for name, start in (("view_w_text", 0.3), ("view_w_image", 0.5)):
        steps = [row[name] for row in rows]
        assert len({start, *steps}) == 5, "every step moves them"
        # Adam's step is at most about the learning rate, here 10 x 3e-3
        assert abs(steps[0] - start) < 0.031
    saved = views_of(latest_checkpoint(learned_run))
    assert torch.tensor([saved["w_text"], saved["w_image"]]).tolist() == [
        rows[-1]["view_w_text"],
        rows[-1]["view_w_image"],
    ]
    assert saved["w_image"] + saved["w_clip"] == pytest.approx(1, abs=1e-6)


def test_resume_is_exact(learned_run, rooms_root, encoder, tmp_path):
    halfway = list_checkpoints(learned_run)[0]
    shutil.copytree(halfway, tmp_path / "checkpoints" / halfway.name)
    resumed = sft.train(learned_config(rooms_root, tmp_path, encoder), resume=True)
    whole = latest_checkpoint(learned_run)
    assert_same_weights(resumed, whole)
    assert views_of(resumed) == views_of(whole)
    after = {row["step"]: row for row in read_metrics(learned_run / "metrics.jsonl")}
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert {**row, "seconds": 0} == {**after[row["step"]], "seconds": 0}


def test_micro_batches_do_not_change_it(learned_run, rooms_root, encoder, tmp_path):
    """The pull towards 0.3 is counted once a step, however many micro-batches there are."""
    strong = ["model.views.pull=50", "model.views.w_text=0.9", "run.steps=1"]
    sft.train(learned_config(rooms_root, tmp_path / "whole", encoder, *strong))
    sft.train(learned_config(rooms_root, tmp_path / "parts", encoder, *strong, "run.micro_batch_size=1"))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("whole", "parts"))
    assert whole["grad_norm"] > 2 * 50 * 0.59, "the pull is in the gradient"
    for name in ("loss", "grad_norm", "view_w_text", "view_w_image"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
    assert whole["loss"] == pytest.approx(read_metrics(learned_run / "metrics.jsonl")[0]["loss"], rel=0.2)


def test_reinforcement_learning_keeps_them_frozen(learned_run, rooms_root, tmp_path):
    grpo.train(grpo_config(rooms_root, learned_run, tmp_path, "run.steps=1"))
    assert views_of(latest_checkpoint(tmp_path)) == views_of(latest_checkpoint(learned_run))
    assert "view_w_text" not in read_metrics(tmp_path / "metrics.jsonl")[0]
    loaded = SceneVLM.from_pretrained(latest_checkpoint(tmp_path) / "model")
    assert loaded.view_selector is not None and not loaded.view_selector.learns


def test_the_value_of_the_loss_is_that_of_fixed_weights(asked):
    model, samples, observations = asked
    learned, _ = sft.sft_loss(model, write_targets(model, samples, observations, pointers="name"))
    learned.backward()
    assert model.view_selector.w_text.grad != 0 != model.view_selector.w_image.grad
    model.view_selector.train_weights(False)
    fixed, _ = sft.sft_loss(model, write_targets(model, samples, observations, pointers="name"))
    assert torch.equal(learned, fixed)


def test_no_choice_outlives_a_step_while_weights_move(asked):
    model, samples, observations = asked
    selector = model.view_selector
    with torch.no_grad():
        first = [model.choose_views(*pair) for pair in zip(samples, observations, strict=True)]
        selector.w_text.fill_(100.0)
        moved = [model.choose_views(*pair) for pair in zip(samples, observations, strict=True)]
    assert first != moved and not any(observation.choices for observation in observations)
    selector.train_weights(False)
    assert [model.choose_views(*pair) for pair in zip(samples, observations, strict=True)] == moved
    assert all(observation.choices for observation in observations)


def rms_norm(norm, hidden_BLD):
    return torch.nn.functional.rms_norm(hidden_BLD, hidden_BLD.shape[-1:], norm.weight, norm.variance_epsilon)


def test_gradient_is_that_of_the_language_models_loss_under_relaxed_inclusion(asked):
    """Against finite differences of the whole model's loss with the views faded by hand."""
    model, samples, observations = asked
    model.language.double()
    model.eval()
    for norm in model.language.decoder.modules():  # Qwen's own norms compute in float32
        if hasattr(norm, "variance_epsilon"):
            norm.forward = partial(rms_norm, norm)
    selector, temperature = model.view_selector, 0.5
    rows_views = [model.write_row(s, o, "direct", "two chairs") for s, o in zip(samples, observations, strict=True)]
    rows, views = [row for row, _ in rows_views], [view for _, view in rows_views]

    def loss(gates):
        inputs = model.embed_rows(rows, observations, views, gates=gates)
        logits = model.hidden(inputs).flatten(0, 1)[inputs.predicting_T] @ model.language.head_weight_VD.T
        return torch.nn.functional.cross_entropy(logits, inputs.targets_T, reduction="sum")

    with torch.no_grad():
        chosen = [model._select(*pair) for pair in zip(samples, observations, strict=True)]

    def inclusion(w_text, w_image):
        """In float64, of the scores that the model found."""
        found = []
        for selection in chosen:
            scores = {name: values.double() for name, values in selection.scores.items()}
            spread = float(scores["utility"].std(unbiased=False))
            found.append(soft_top_k(utility(scores, w_text, w_image), 2, temperature * spread)[selection.indices])
        return found

    weights = [selector.w_text.detach().double(), selector.w_image.detach().double()]
    start = inclusion(*weights)
    loss(model.view_gates(samples, observations, temperature)).backward()
    for index, weight in enumerate((selector.w_text, selector.w_image)):
        assert weight.grad is not None
        losses = []
        for step in (1e-5, -1e-5):
            moved = [value + step * (row == index) for row, value in enumerate(weights)]
            with torch.no_grad():
                losses.append(loss([1 + now - then for now, then in zip(inclusion(*moved), start, strict=True)]))
        difference = float(losses[0] - losses[1]) / 2e-5
        assert abs(difference) > 1e-6
        assert float(weight.grad) == pytest.approx(difference, rel=3e-3)


def test_a_text_only_encoder_learns_w_text_alone(rooms_root, tmp_path):
    sft.train(sft_config(rooms_root, tmp_path, *LEARNED, "run.steps=2"))
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert row["view_w_text"] != pytest.approx(0.3, abs=1e-6) and row["view_w_image"] == 1


def test_checkpoints_from_before_resume_with_plain_top_k(rooms_root, tmp_path):
    import yaml

    config = sft_config(rooms_root, tmp_path, "model.views.redundancy=0.0", "run.steps=0")
    saved = sft.train(config) / "config.yaml"
    old = yaml.safe_load(saved.read_text())
    for name in (
        "redundancy",
        "num_references",
        "standardize",
        "weights",
        "temperature",
        "pull",
        "lr_factor",
        "choice",
    ):
        del old["model"]["views"][name]
    saved.write_text(yaml.safe_dump(old))
    assert open_run(config, resume=True) == saved.parent
    spread = sft_config(rooms_root, tmp_path, "run.steps=0")
    with pytest.raises(ValueError, match=r"model.views.redundancy: 0.0 -> 2.5"):
        open_run(spread, resume=True)


def test_what_cannot_be_learned_is_refused(rooms_root, tmp_path):
    for setting, sentence in (
        ("model.views.weights=trained", "choose fixed or learned"),
        ("model.views.temperature=0", "must be above 0"),
        ("model.views.redundancy=-1", "must be at least 0"),
        ("model.views.num_references=0", "must be at least 1"),
        ("model.views={weights: learned, source: none}", "nothing to learn"),
        ("model.views={weights: learned, choice: uniform}", "set choice to utility"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sft_config(rooms_root, tmp_path, setting)
