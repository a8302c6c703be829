"""Which parts of the model learn in SFT, and at which rates."""

import pytest
import torch
from safetensors.torch import load_file

from threedr1.engine import grpo, sft
from threedr1.engine.checkpoint import list_checkpoints
from threedr1.engine.config import load_config
from threedr1.engine.runtime import init_runtime
from threedr1.engine.tracking import read_metrics
from threedr1.models.scene_vlm import SceneVLM

from .test_pipeline import assert_same_weights, grpo_config, sft_config, weights

LORA = ("model.language.train=lora", "model.language.lora_rank=4")


def load(root, run_dir, *more) -> SceneVLM:
    return sft.load_model(sft_config(root, run_dir, *more), None, init_runtime("cpu"))


def parts(names) -> set[str]:
    return {sft.part_of(name) for name in names}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("model.language.train=full",), {"language", "vision_tower", "connector"}),
        (("model.language.train=full", "model.train_vision_tower=false"), {"language", "connector"}),
        (LORA, {"language", "connector"}),
        ((*LORA, "model.train_connector=false"), {"language"}),
        ((*LORA, "model.train_vision_tower=true"), {"language", "connector", "vision_tower"}),
        (("model.language.train=none",), {"connector"}),
        (
            ("model.language.train=none", "model.train_connector=false", "model.train_scene_encoder=true"),
            {"scene_encoder"},
        ),
        (("model.language.train=none", "model.views.weights=learned"), {"connector", "view_selector"}),
    ],
)
def test_parts_are_chosen_one_by_one(rooms_root, tmp_path, settings, expected):
    trained = load(rooms_root, tmp_path, *settings).trainable_parameters()
    assert parts(trained) == expected
    if "language" in expected and settings[: len(LORA)] == LORA:
        assert all("lora_" in name for name in trained if sft.part_of(name) == "language")


def test_freezing_everything_is_one_sentence(rooms_root, tmp_path):
    config = sft_config(rooms_root, tmp_path, "model.language.train=none", "model.train_connector=false")
    with pytest.raises(ValueError, match="Nothing to train: every parameter is frozen"):
        sft.train(config)


@pytest.fixture(scope="module")
def start(rooms_root, tmp_path_factory):
    return sft.train(sft_config(rooms_root, tmp_path_factory.mktemp("runs") / "start", *LORA, "run.steps=0"))


def moved(before, after) -> dict[str, float]:
    """The largest change of a weight in each file of a model that both have."""
    first, second = weights(before), weights(after)
    return {
        name.removeprefix("model/"): max(
            float((second[name][key] - first[name][key]).abs().max()) for key in first[name]
        )
        for name in first.keys() & second.keys()
    }


def test_what_is_frozen_stays_and_rates_are_the_parts_own(start, rooms_root, tmp_path):
    """One step of Adam moves a weight by the learning rate at most, and the largest by nearly that."""
    more = (*LORA, "run.steps=1", "run.save_every=1", "model.train_scene_encoder=true", "optim.weight_decay=0")
    more += ("optim.lr=1e-3", "optim.schedule=constant", "optim.lr_factors={scene_encoder: 0.1, connector: 2.0}")
    changes = moved(start, sft.train(sft_config(rooms_root, tmp_path / "a", *more)))
    assert changes["connector.safetensors"] == pytest.approx(2e-3, rel=0.02)
    assert changes["scene_encoder/model.safetensors"] == pytest.approx(1e-4, rel=0.02)
    assert changes["adapter/policy/adapter_model.safetensors"] == pytest.approx(1e-3, rel=0.02)
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[0]["lr"] == 1e-3
    more = (*LORA, "run.steps=1", "model.train_connector=false")
    changes = moved(start, sft.train(sft_config(rooms_root, tmp_path / "b", *more)))
    assert changes["connector.safetensors"] == changes["scene_encoder/model.safetensors"] == 0
    assert changes["adapter/policy/adapter_model.safetensors"] > 0


def test_a_vision_tower_that_learned_is_saved_and_loaded_and_resumes_exactly(rooms_root, tmp_path):
    more = (*LORA, "model.train_vision_tower=true")
    whole = sft.train(sft_config(rooms_root, tmp_path / "whole", *more))
    tower = load_file(whole / "model" / "vision_tower.safetensors")
    base = load(rooms_root, tmp_path / "x", *more).vision_tower.state_dict()
    assert tower.keys() == base.keys() and any(not torch.equal(tower[name], base[name]) for name in base)
    assert not (whole / "model" / "language_model").exists()
    model = SceneVLM.from_pretrained(whole / "model")
    assert all(torch.equal(value, tower[name]) for name, value in model.vision_tower.state_dict().items())
    halfway = list_checkpoints(tmp_path / "whole")[0]
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    halfway.rename(tmp_path / "resumed" / "checkpoints" / halfway.name)
    assert_same_weights(sft.train(sft_config(rooms_root, tmp_path / "resumed", *more), resume=True), whole)
    # frozen in a later stage, it is kept
    later = sft.train(sft_config(rooms_root, tmp_path / "later", *LORA, f"init={tmp_path / 'whole'}", "run.steps=1"))
    kept = load_file(later / "model" / "vision_tower.safetensors")
    assert all(torch.equal(value, tower[name]) for name, value in kept.items())
    reinforced = grpo.train(grpo_config(rooms_root, later, tmp_path / "grpo", "run.steps=1"))
    assert weights(reinforced)["model/vision_tower.safetensors"].keys() == tower.keys()
    (later / "model" / "vision_tower.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights of the vision tower"):
        SceneVLM.from_pretrained(later / "model")


def test_a_language_model_that_stays_as_it_is_has_no_adapter(rooms_root, tmp_path):
    same = ("data.datasets=scan2cap", "data.max_samples=4")  # the same batch at every step: losses compare
    run = sft.train(sft_config(rooms_root, tmp_path, "model.language.train=none", *same))
    assert not (run / "model" / "adapter").exists() and not (run / "model" / "language_model").exists()
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_rates_of_unknown_parts_and_other_commands_are_refused():
    with pytest.raises(ValueError, match=r"lr_factors names 'encoder'; the parts are language, vision_tower"):
        load_config("sft", None, ["optim.lr_factors={encoder: 0.1}"])
    with pytest.raises(ValueError, match="must not be below 0"):
        load_config("sft", None, ["optim.lr_factors={connector: -1}"])
    for kind in ("detect", "grpo"):
        with pytest.raises(ValueError, match=r"optim.lr_factors is for sft"):
            load_config(kind, None, ["optim.lr_factors={connector: 0.1}"])
    with pytest.raises(ValueError, match="choose lora, full or none"):
        load_config("sft", None, ["model.language.train=some"])
