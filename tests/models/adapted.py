"""A small language model with an adapter that does something, the one thing that learns."""

import torch

from threedr1.models.language_model import LanguageModel, add_lora, load_language_model


def adapted(folder, *, rank=4, alpha=8, std=0.05, last_blocks=0, dtype="float32") -> LanguageModel:
    """Its second factors are drawn, as if it had been trained; a fresh adapter adds nothing."""
    language = load_language_model(folder, dtype=dtype)
    add_lora(language, "policy", rank=rank, alpha=alpha, last_blocks=last_blocks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in language.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return language
