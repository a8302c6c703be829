"""Loading, LoRA targets, adapters by name."""

import re

import pytest
import torch

from threedr1.models.language_model import (
    active_adapter,
    add_lora,
    copy_lora,
    load_language_model,
    load_lora,
    lora_targets,
    save_language_model,
)


@pytest.fixture
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32")


def hidden(language):
    torch.manual_seed(1)
    embeds = torch.randn(1, 5, language.width)
    with torch.no_grad():
        return language.decoder(inputs_embeds=embeds).last_hidden_state


def randomize(language, name):
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in language.model.named_parameters():
            if f".{name}." in key:
                parameter.normal_(std=0.1)


def test_lora_leaves_the_vision_tower_alone_and_takes_the_last_blocks(language):
    add_lora(language, "policy", rank=3, alpha=6, last_blocks=1)
    adapted = {key for key, parameter in language.model.named_parameters() if parameter.requires_grad}
    assert adapted and all("language_model.layers.1." in key for key in adapted)
    assert len(adapted) == 7 * 2  # A and B of q, k, v, o, gate, up, down


def test_lora_of_the_paper_on_qwen_7b_has_8_65_million_parameters():
    """paper.md 1.2: rank 12 on the last 8 of 28 blocks."""
    hidden_width, kv_width, mlp_width, rank, blocks = 3584, 512, 18944, 12, 8
    names = [
        f"model.language_model.layers.{block}.{part}"
        for block in range(28)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    shapes = {
        "q": (hidden_width, hidden_width),
        "k": (hidden_width, kv_width),
        "v": (hidden_width, kv_width),
        "o": (hidden_width, hidden_width),
        "gate": (hidden_width, mlp_width),
        "up": (hidden_width, mlp_width),
        "down": (mlp_width, hidden_width),
    }
    chosen = [name for name in names if re.fullmatch(lora_targets(28, blocks), name)]
    total = sum(rank * sum(shapes[name.rsplit(".", 1)[1].removesuffix("_proj")]) for name in chosen)
    assert total == pytest.approx(8.65e6, rel=1e-3)


def test_too_many_blocks_is_an_error():
    with pytest.raises(ValueError, match="lora_last_blocks is 9"):
        lora_targets(8, 9)


def test_reference_is_a_frozen_copy_and_not_the_base(language):
    base = hidden(language)
    add_lora(language, "policy", rank=4, alpha=8)
    randomize(language, "policy")
    tuned = hidden(language)
    assert not torch.allclose(base, tuned, atol=1e-3)
    copy_lora(language, "policy", "ref")
    trainable = [key for key, parameter in language.model.named_parameters() if parameter.requires_grad]
    randomize_more = {key: parameter for key, parameter in language.model.named_parameters() if ".policy." in key}
    with torch.no_grad():
        for parameter in randomize_more.values():
            parameter.mul_(1.5)
    with active_adapter(language, "ref"):
        torch.testing.assert_close(hidden(language), tuned)
    assert not torch.allclose(hidden(language), tuned, atol=1e-3)
    after = [key for key, parameter in language.model.named_parameters() if parameter.requires_grad]
    assert trainable == after and all(".policy." in key for key in after)


def test_adapter_and_base_survive_saving(language, tmp_path):
    add_lora(language, "policy", rank=4, alpha=8)
    randomize(language, "policy")
    expected = hidden(language)
    save_language_model(language, tmp_path / "base")
    language.model.save_pretrained(tmp_path / "adapter", selected_adapters=["policy"])
    again = load_language_model(tmp_path / "base", dtype="float32")
    load_lora(again, "policy", tmp_path / "adapter" / "policy", trainable=True)
    torch.testing.assert_close(hidden(again), expected)


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="Cannot load the language model"):
        load_language_model(tmp_path / "nowhere")
