"""The presets: recipes and constants say the same, and what cannot be meant is refused."""

import subprocess
import sys

import pytest

import threedr1
from threedr1.engine.config import load_config
from threedr1.engine.grpo_presets import PAPER, PRESETS, RECOMMENDED, GrpoLossConfig

RECIPES = {"paper": "grpo.paper.yaml", "recommended": "grpo.yaml"}


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_and_constant_are_equal(name):
    preset = PRESETS[name]
    config = load_config("grpo", f"{threedr1.__path__[0]}/script/recipes/{RECIPES[name]}")
    assert config.loss == preset.loss
    assert (config.rollout.group_size, config.rollout.temperature) == (preset.group_size, preset.temperature)
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (preset.lr, "constant", preset.warmup_steps)
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, preset.beta2, preset.weight_decay)


def test_the_papers_numbers():
    """Group 8, clip 0.2, beta 0.02, Adam (its own betas, no decay) at 1e-6, a ratio for each response."""
    preset = PRESETS["paper"]
    assert (preset.group_size, preset.lr, preset.beta2, preset.weight_decay) == (8, 1e-6, 0.999, 0.0)
    assert preset.loss is PAPER
    assert (PAPER.clip_low, PAPER.clip_high, PAPER.beta, PAPER.ratio_level, PAPER.scale) == (
        0.2,
        0.2,
        0.02,
        "response",
        "group",
    )
    assert RECOMMENDED.sampler_correction == PAPER.sampler_correction == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; choose one of grpo"),
        ({"kl": "k4"}, "kl is 'k4'; choose one of k1, k2, k3"),
        ({"scale": "rank"}, "scale is 'rank'"),
        ({"ratio_level": "word"}, "ratio_level is 'word'"),
        ({"ratio_level": "response", "loss_type": "dapo"}, "one term a response"),
        ({"clip_low": 1.0}, "clip_low is 1.0"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"delta": 1.1}, "delta is 1.1; it must lie above"),
        ({"delta": 4.0, "loss_type": "cispo"}, "cispo has no use for"),
        ({"kl": "k2", "kl_ratio": True}, "k2 has the gradient of the KL without it"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"sampler_correction": "off"}, "sampler_correction is 'off'; choose one of none, token_truncate"),
        ({"sampler_cap": 0.5}, "sampler_cap is 0.5; it must be at least 1"),
    ],
)
def test_config_refuses_what_it_cannot_mean(settings, message):
    with pytest.raises(ValueError, match=message):
        GrpoLossConfig(**settings)


def test_a_recipe_is_refused_before_anything_loads():
    with pytest.raises(ValueError, match="Config key loss.loss_type is 'ppo'; choose one of grpo"):
        load_config("grpo", None, ["loss.loss_type=ppo"])
    with pytest.raises(ValueError, match="Config key loss.kl takes str, not 3"):
        load_config("grpo", None, ["loss.kl=3"])
    config = load_config("grpo", None, ["loss.sampler_correction=sequence_mask", "loss.delta=4", "loss.kl=k2"])
    assert (config.loss.sampler_correction, config.loss.delta, config.loss.kl) == ("sequence_mask", 4.0, "k2")


def test_reading_a_recipe_needs_no_torch(tmp_path):
    code = f"""
import importlib.util, sys
root = {threedr1.__path__[0]!r}
spec = importlib.util.spec_from_file_location("threedr1", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["threedr1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["threedr1"])
import threedr1.engine.config
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
