"""Names that carry what they stand for: in prompts, in what is taught and sampled, under gradients, in files."""

from dataclasses import replace

import pytest
import torch

from threedr1.datasets.scene import Sample
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine import sft
from threedr1.engine.config import load_config
from threedr1.engine.grpo_packs import make_packs, pack_logprobs
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.engine.sft_data import write_targets
from threedr1.models.connector import fourier_features
from threedr1.models.inputs import SCENE, assemble
from threedr1.models.observation import asked_objects
from threedr1.models.scene_vlm import SceneVLM
from threedr1.models.tiny import SHAPES, build_tiny, corpus_texts
from threedr1.utils.streams import stream
from threedr1.utils.text import format_box

from .test_object_token import build, settings

NAMES = 30
OWN = (f"model.language.name_pool={NAMES}", "model.language.token_in_name=true")


@pytest.fixture(scope="module")
def root(rooms_root, tmp_path_factory):
    """The rooms beside a language model whose names are one token each."""
    root = tmp_path_factory.mktemp("named")
    for entry in rooms_root.iterdir():
        if entry.name != "tiny":
            (root / entry.name).symlink_to(entry)
    size = replace(SHAPES["tiny"], vocab_size=600, names=NAMES, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96)
    build_tiny(root / "tiny", corpus_texts(rooms_root), size=size)
    return root


@pytest.fixture(scope="module")
def model(root) -> SceneVLM:
    return build(root, *OWN)


@pytest.fixture(scope="module")
def observations(model, root):
    store = SceneStore(root / "prepared")
    seen = [model.observe(store[name]) for name in store.scene_ids[:2]]
    model.encode(seen)
    return seen


def question(number: int) -> Sample:
    return Sample(f"q-{number}", "qa", "own", "s", "How many chairs are there?", "two")


def carried_by(model, observation) -> torch.Tensor:
    """What the names of a scene's proposals carry, in their order."""
    (encoded,) = model.encode([observation])
    objects = model.connector.objects(
        encoded.features_KE[None], encoded.boxes_K7[None], encoded.class_probs_KC[None], encoded.colors_K6[None]
    )
    return model.connector.carried(objects[0, encoded.valid_n], encoded.boxes_K7[encoded.valid_n])


def name_id(model, name: int) -> int:
    (token,) = model.writer._text(f"<obj{name}>")
    return token


@torch.no_grad()
def test_every_mention_carries_its_own_rows_proposal(model, observations):
    """Two scenes with names of their own, packed and padded: names alone differ from the words, by what is theirs."""
    rows, expected = [], []
    for observation, rng in zip(observations, (stream(1), stream(2)), strict=True):
        names = model.prompts.draw_names(observation.encoded.told, rng)
        first, second = (format_box(box.tolist()) for box in observation.encoded.named[:2])
        told = observation.encoded.told.pointed(f"it {second} and {first} and {second}", names)
        row, _ = model.write_row(question(0), observation, "direct", told, names)
        rows.append(row)
        carried, of_name = carried_by(model, observation), {name_id(model, name): n for n, name in enumerate(names)}
        added = torch.zeros(len(row.token_ids), model.language.width)
        for place, token in enumerate(row.token_ids):
            before = row.token_ids[place - 1]
            if token in of_name:
                added[place] = carried[of_name[token]]
            elif before in of_name and row.kinds[place] != SCENE:
                added[place] = carried[of_name[before]]
        # each name stands before its token in the prompt; where it is said, a word follows; the system prompt has some
        system = model.language.decode(row.token_ids).partition("user\n")[0]
        assert int(added.any(1).sum()) == len(names) + 2 * (3 + sum(f"<obj{name}>" in system for name in names))
        expected.append(added)
    no_views = [[], []]
    packed, padded = (
        model.embed_rows(rows, observations, no_views, packed_length=length).inputs_embeds_BLD for length in (0, None)
    )
    model.connector.token_in_name = False
    try:
        plain, plain_padded = (
            model.embed_rows(rows, observations, no_views, packed_length=length).inputs_embeds_BLD
            for length in (0, None)
        )
    finally:
        model.connector.token_in_name = True
    torch.testing.assert_close((packed - plain)[0], torch.cat(expected))
    for row, added in enumerate(expected):
        torch.testing.assert_close((padded - plain_padded)[row, : len(added)], added)
        assert not (padded - plain_padded)[row, len(added) :].any()


@torch.no_grad()
def test_completions_use_the_names_of_their_own_prompt(model, observations):
    scenes = [observation.encoded.told for observation in observations]
    names = [model.prompts.draw_names(told, stream(3, n)) for n, told in enumerate(scenes)]
    rows = [
        model.write_row(question(n), observation, "direct", None, its)[0]
        for n, (observation, its) in enumerate(zip(observations, names, strict=True))
    ]
    shared = next(iter(set(names[0]) & set(names[1])))
    # one completion ends with a name, and the next begins with a word, which is not behind it
    word, name = model.writer._text("red")[0], name_id(model, shared)
    said, other = [word, name], [word, name, word]
    inputs = model.embed_rows(rows, observations, [[], []], packed_length=0, completions=[[said, said], [other]])
    behind = inputs.inputs_embeds_BLD[0, -7:] - model.language.embedding.weight[torch.tensor([*said, *said, *other])]
    first, second = (carried_by(model, seen)[its.index(shared)] for seen, its in zip(observations, names, strict=True))
    nothing = torch.zeros_like(first)
    torch.testing.assert_close(behind, torch.stack([nothing, first, nothing, first, nothing, second, second]))
    assert not torch.allclose(first, second)


def furthest(model, rollouts) -> float:
    """The largest difference between the log-probability of a sampled token and what training makes of it."""
    worst = 0.0
    every = [list(range(len(rollout.texts))) for rollout in rollouts]
    for pack in make_packs(model, rollouts, every, 4096):
        with torch.no_grad():
            logps_BT, _ = pack_logprobs(model, pack, 1.0)
        for logps_T, (prompt, number) in zip(logps_BT, pack.rows, strict=True):
            sampled = torch.tensor(rollouts[prompt].logps[number])
            worst = max(worst, float((logps_T[: len(sampled)] - sampled).abs().max()))
    return worst


@pytest.mark.parametrize("group_size", [1, 3])  # a cache of rows, and one of shared prompts
def test_what_is_sampled_has_the_probability_that_training_gives_it(root, observations, group_size, monkeypatch):
    """Decoding carries names as the one assembler does; the model is made to say them often."""
    model = build(root, *OWN)
    ids = torch.tensor([name_id(model, name) for name in range(NAMES)])
    with torch.no_grad():
        model.language.base.lm_head.weight[ids] *= 8.0
        model.connector.carried_norm.weight *= 12.0
    seen = [model.observe(observations[n % 2].scene) for n in range(4)]
    model.encode(seen)
    prompts = write_prompts(model, [question(n) for n in range(4)], seen, ["direct", "think"] * 2)
    generators = [torch.Generator().manual_seed(n) for n in range(4 * group_size)]
    options = {"max_new_tokens": 24, "group_size": group_size, "temperature": 1.0, "generators": generators}
    rollouts = roll_out(model, prompts, **options)
    said = torch.tensor([token for rollout in rollouts for its in rollout.token_ids for token in its])
    assert int(torch.isin(said, ids).sum()) > 5 * group_size
    assert furthest(model, rollouts) < 2e-4
    # names that carry nothing while decoding would be of another probability
    monkeypatch.setattr(model.decoder, "_carry", lambda mentions: None)
    model.decoder._mentions = None
    assert furthest(model, roll_out(model, prompts, **options)) > 0.05


def test_gradients_reach_proposals_through_their_names_alone(model, observations):
    """With the tokens of the scene held back, what a mention says still teaches the connector."""
    box = format_box(observations[0].encoded.named[0].tolist())
    sample = Sample("g-0", "grounding", "own", "s", "it", f"it {box}")
    (taught,) = write_targets(model, [sample], observations[:1], pointers="name", naming=stream)
    model.connector.requires_grad_(True)
    model.connector.zero_grad()
    tokens, mentions = model.scene_tokens([observations[0].encoded], [taught.row.names])
    inputs = assemble(
        [taught.row],
        embed_tokens=model.language.embedding,
        scene_tokens=tokens.detach(),
        image_tokens=None,
        mentions=mentions,
        pad_id=model.language.pad_id,
        packed_length=0,
    )
    model.hidden(inputs).square().sum().backward()
    gradient = model.connector.object_mlp[0].weight.grad
    assert gradient is not None and float(gradient.abs().sum()) > 0


@torch.no_grad()
def test_the_object_asked_for_tells_its_place_the_same_way(model, observations):
    """Behind its name stands a token of its own; two that differ in their place alone differ by it."""
    connector = model.connector
    nowhere = [[90.0, 0, 0, 1, 1, 1, 0]]  # no proposal, so nothing else is known
    queried = asked_objects(nowhere, [observations[0].encoded])
    described = connector._described(
        queried.features_BE, queried.boxes_B7, queried.class_probs_BC, queried.colors_B6
    ) + connector.pooled_linear(connector.pooled_norm(queried.pooled_BE))
    place = connector.carried_place(fourier_features(torch.tensor([[90.0, 0, 0]]), connector.NUM_BANDS))
    expected = connector.output_norm(described + connector.asked_mark.weight + place)
    torch.testing.assert_close(connector.asked(queried), expected)
    assert not torch.allclose(expected, connector.output_norm(described + connector.asked_mark.weight), atol=1e-3)


def test_names_of_several_tokens_are_refused(rooms_root):
    with pytest.raises(ValueError, match=r"names of one token each, and <obj0> is \d+; set it to false"):
        build(rooms_root, *OWN)


def test_without_names_there_is_nothing_to_carry():
    with pytest.raises(ValueError, match="num_proposals is 0: nothing has a name; change one of them"):
        load_config("sft", None, ["model.language.num_proposals=0", "model.language.token_in_name=true"])


def test_it_is_kept_and_asked_for(root, tmp_path):
    checkpoint = sft.train(settings(root, *OWN, "run.steps=1", run_dir=tmp_path / "run"))
    loaded = SceneVLM.from_pretrained(checkpoint / "model")
    assert loaded.connector.token_in_name and loaded.name_of_V is not None
    refused = settings(root, OWN[0], f"init={checkpoint / 'model'}", run_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="made with token_in_name True, but the configuration says False"):
        sft.train(refused)
