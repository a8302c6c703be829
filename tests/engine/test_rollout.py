"""What answering does to a model: its mode stays, and its blocks are joined where that pays."""

import copy

import pytest
import torch

from threedr1.engine import build as building
from threedr1.engine.build import prepare_to_answer
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.models.scene_vlm import SceneVLM

from .test_object_token import QUESTION, build, scene  # noqa: F401 - a fixture


@pytest.fixture
def adapted(rooms_root):
    return build(rooms_root, "model.language.train=lora", "model.language.lora_rank=4")


def answers(model, scene, **options):  # noqa: F811
    observation = model.observe(scene)
    prompts = write_prompts(model, [QUESTION], [observation], ["direct"])
    return [rollout.token_ids for rollout in roll_out(model, prompts, max_new_tokens=6, **options)]


@pytest.mark.parametrize(
    ("whole", "language", "after"), [(True, True, True), (False, False, False), (False, True, False)]
)
def test_completions_are_of_a_model_that_evaluates_whatever_it_did_before(adapted, scene, whole, language, after):  # noqa: F811
    expected = answers(adapted, scene)
    adapted.train(whole)
    adapted.language.train(language)
    seen = []

    def hear(row, token):
        seen.append({part.training for part in adapted.modules()})

    assert answers(adapted, scene, on_token=hear) == expected
    assert len(seen) == len(expected[0][0]) and all(modes == {False} for modes in seen)
    assert {part.training for part in adapted.modules()} == {after}


def test_a_model_that_evaluates_is_not_told_so_for_every_batch(adapted, scene, monkeypatch):  # noqa: F811
    told = []
    monkeypatch.setattr(SceneVLM, "train", lambda model, mode=True: told.append(mode))
    answers(adapted, scene)
    adapted.ask(scene, "How many chairs are there?", max_new_tokens=2)
    assert told == []


def test_small_models_answer_in_joined_products_and_say_the_same(adapted, scene, monkeypatch):  # noqa: F811
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    plain, large = answers(adapted, scene), copy.deepcopy(adapted)
    joined = prepare_to_answer(adapted)
    assert joined.language.fused is not None and answers(joined, scene) == plain
    assert not any(weight.requires_grad for weight in joined.parameters())
    monkeypatch.setattr(building, "_MOST_JOINED", sum(w.nbytes for w in large.language.decoder.parameters()) - 1)
    assert prepare_to_answer(large).language.fused is None and answers(large, scene) == plain
    assert not any(weight.requires_grad for weight in large.parameters())
