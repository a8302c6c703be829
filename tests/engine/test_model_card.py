"""Model cards: front matter that parses, and the facts of the run."""

import json

import pytest
import yaml

from threedr1.engine import sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import load_config, to_dict
from threedr1.engine.model_card import RunFacts, model_card, write_card

from .test_pipeline import sft_config


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def facts(kind: str = "sft", *overrides: str, **more) -> RunFacts:
    config = to_dict(load_config(kind, None, ["run.dir=runs/mine", "run.steps=2000", *overrides]))
    return RunFacts(kind, config, 1500, {"scanqa": 12345, "scan2cap": 20}, **more)


def test_an_adapters_card():
    description = {"language_model": "Qwen/Qwen2.5-VL-7B-Instruct", "adapter": True}
    evaluated = {"scanqa": {"scorer": "official", "metrics": {"CIDEr": 87.25, "METEOR": None}}}
    text = model_card(facts(scores={"map50": 0.4}), description, evaluated)
    front = front_matter(text)
    assert front["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct" and front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["scan2cap", "scanqa"] and "3d" in front["tags"] and front["license"] == "other"
    assert "# 3D-R1: mine" in text and "1,500 of 2,000 steps, batches of 8, seed 0" in text
    assert "training samples: scan2cap 20, scanqa 12,345 (split train)" in text
    assert "| training | map50 | 0.4000 | |" in text and "| scanqa | CIDEr | 87.2500 | official |" in text
    assert "METEOR" not in text and "SceneVLM.from_pretrained(" in text and "python main.py infer --model" in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["optim"]["lr"] == 1e-4 and "torch" in text.split("versions: ")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("source", "configured", "base"),
    [
        ("/home/me/models/Qwen2.5-VL", "unused", None),  # where it lies on this machine says nothing elsewhere
        ("language_model", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),  # fully trained
    ],
)
def test_the_base_model(source, configured, base):
    made = facts("sft", f"model.language.model={configured}")
    text = model_card(made, {"language_model": source, "adapter": False}, {})
    front = front_matter(text)
    assert front.get("base_model") == base and front.get("base_model_relation") == ("finetune" if base else None)
    assert "/home/me" not in text and f"Base model: {base or 'Qwen2.5-VL'}." in text
    assert "None were measured yet" in text


def test_the_card_of_a_scene_encoder():
    text = model_card(facts("detect"), {}, {})
    assert "object-detection" in front_matter(text)["tags"] and "base_model" not in front_matter(text)
    assert "SceneEncoder.from_pretrained(" in text and "Base model" not in text


def test_scores_of_an_evaluation_go_into_the_card(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"results": {"sqa3d": {"scorer": "sqa3d", "metrics": {"EM@1": 50}}}})
    )
    write_card(tmp_path, facts(), tmp_path / "results.json")
    assert "| sqa3d | EM@1 | 50.0000 | sqa3d |" in (tmp_path / "README.md").read_text()


def test_every_checkpoint_has_a_card(rooms_root, tmp_path):
    sft.train(sft_config(rooms_root, tmp_path, "run.steps=1"))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    text = (checkpoint / "model" / "README.md").read_text()
    assert front_matter(text)["datasets"] == ["scan2cap", "scanqa", "scene30k"]
    assert "1 of 1 steps" in text
