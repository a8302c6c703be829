"""Configs: precedence, composition, and errors that name what to write instead."""

import pytest

from threedr1.engine.config import CONFIGS, SftConfig, dump_config, from_dict, load_config, save_config, to_dict


def test_precedence_is_defaults_base_recipe_override(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {steps: 5, seed: 7}\noptim: {lr: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("model: {language: {lora_rank: 12}}\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, b.yaml]\nrun: {steps: 6}\n")
    config = load_config("sft", tmp_path / "c.yaml", ["optim.min_lr=2e-6", "data.datasets=scanqa,sqa3d"])
    assert (config.run.steps, config.run.seed, config.optim.lr, config.optim.min_lr) == (6, 7, 1e-3, 2e-6)
    assert config.model.language.lora_rank == 12
    assert config.data.datasets == ("scanqa", "sqa3d")
    assert config.run.batch_size == SftConfig().run.batch_size


def test_a_command_keeps_its_own_defaults_beside_a_key_that_is_set():
    config = load_config("grpo", None, ["optim.lr=1e-3", "data.root=elsewhere"])
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (1e-3, "constant", 0.0)
    assert load_config("detect", None, ["optim.warmup_steps=3"]).optim.lr == 7e-4
    assert "planning" in load_config("eval", None, ["data.root=elsewhere"]).data.datasets


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_config_reads_back_the_same(kind, tmp_path):
    config = load_config(kind, None)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(kind, tmp_path / "config.yaml") == config
    assert from_dict(CONFIGS[kind], to_dict(config)) == config
    assert dump_config(config).startswith(next(iter(to_dict(config))))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.langauge.lora_rank=3", "Unknown config key 'model.langauge'; did you mean 'language'?"),
        ("run.stepz=3", "Unknown config key 'run.stepz'; did you mean 'steps'?"),
        ("run.steps=many", "Config key run.steps takes int, not 'many'."),
        ("run.steps=true", "Config key run.steps takes int, not True."),
        ("optim.lr=fast", "Config key optim.lr takes a number, not 'fast'."),
        ("run.steps", "not of the form key.sub=value"),
        ("run=3", "Config key run takes a mapping, not 3."),
        ("data.datasets=3", "Config key data.datasets takes a list, not 3."),
        ("optim.lr=[", "--set optim.lr=[ is not valid YAML"),
    ],
)
def test_errors_say_what_to_do(override, message):
    with pytest.raises(ValueError) as caught:
        load_config("sft", None, [override])
    assert message in str(caught.value)


def test_a_missing_recipe_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no recipe at"):
        load_config("sft", tmp_path / "none.yaml")
