"""Which groups a GRPO step learns from, substitutes for prompts that teach nothing or are too long, and packs."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from threedr1.datasets.scene import Sample
from threedr1.engine import groups
from threedr1.engine.config import load_config
from threedr1.engine.groups import GroupSampler
from threedr1.engine.grpo_packs import completion_mask, filled, plan_groups
from threedr1.engine.rewards import RewardSet
from threedr1.engine.rollout import Prompt, Rollout
from threedr1.engine.runtime import Runtime
from threedr1.engine.throughput import Phases
from threedr1.models.inputs import Row

CPU = torch.device("cpu")


# Packs ------------------------------------------------------------------------------------------------------------


def numbered(completions):
    return [dict(enumerate(lengths)) for lengths in completions]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=5)), max_size=5),
    st.integers(20, 120),
    st.integers(0, 4),
)
def test_packs_hold_each_completion_once_behind_its_prompt(prompts_and_completions, budget, max_rows):
    prompts = [length for length, _ in prompts_and_completions]
    completions = [lengths for _, lengths in prompts_and_completions]
    packs = plan_groups(prompts, numbered(completions), budget, max_rows)
    found = [(prompt, row) for pack in packs for prompt, its in pack for row in its]
    assert sorted(found) == [(prompt, row) for prompt, its in enumerate(completions) for row in range(len(its))]
    for pack in packs:
        tokens = sum(prompts[prompt] + sum(completions[prompt][row] for row in its) for prompt, its in pack)
        rows = sum(len(its) for _, its in pack)
        assert tokens <= budget or rows == 1
        assert not max_rows or rows <= max_rows


def test_packs_of_groups_by_hand():
    # 100 + 3 * 20 fit into 200 with the second group's 30 + 10; the third goes in pieces, its prompt in each
    packs = plan_groups([100, 30, 150], numbered([[20, 20, 20], [10], [40, 30, 30]]), 200)
    assert packs == [[(0, [0, 1, 2]), (1, [0])], [(2, [0])], [(2, [1])], [(2, [2])]]
    assert plan_groups([100], numbered([[20, 20, 20]]), 10) == [[(0, [0])], [(0, [1])], [(0, [2])]]
    assert plan_groups([10, 10], numbered([[5, 5], [5, 5]]), 100, max_rows=3) == [[(0, [0, 1])], [(1, [0, 1])]]
    # what is not wanted is in none, and its prompt neither
    assert plan_groups([10, 10, 10], [{1: 5}, {}, {0: 5, 3: 5}], 100) == [[(0, [1]), (2, [0, 3])]]


def test_numbers_and_masks_of_ragged_completions():
    assert filled([[1.0, 2.0], [3.0]]).tolist() == [[1, 2], [3, 0]]
    assert completion_mask([[7], [7, 7, 7]]).tolist() == [[True, False, False], [True, True, True]]


# Which groups -----------------------------------------------------------------------------------------------------


def samples(count, lengths=None):
    boxes = np.zeros((0, 7), np.float32)
    return [
        Sample(f"s{number}", "qa", "own", "scene", "Why?", "so", target_boxes_K7=boxes, meta={"length": length})
        for number, length in zip(range(count), lengths or [10] * count, strict=True)
    ]


@pytest.fixture
def stand_ins(monkeypatch):
    """Prompts and completions without a model; a text is the sample's number, the round and the stream it came of."""
    observation = SimpleNamespace(
        encoded=SimpleNamespace(named=np.zeros((0, 7))), scene=SimpleNamespace(to_model=lambda boxes: boxes)
    )

    def write_prompts(model, chosen, observations, modes):
        assert modes == ["think"] * len(chosen)
        rows = [Row([1] * sample.meta["length"], [], [], []) for sample in chosen]
        return [Prompt(sample, observation, row, [], "think") for sample, row in zip(chosen, rows, strict=True)]

    def roll_out(model, prompts, *, group_size, generators, **options):
        assert len(generators) == len(prompts) * group_size
        drawn = [f"{torch.rand(1, generator=generator).item():.6f}" for generator in generators]
        return [
            Rollout(
                *prompt,
                texts=[f"{prompt.sample.sample_id} {number}" for number in drawn[at : at + group_size]],
                token_ids=[[5]] * group_size,
                logps=[[0.0]] * group_size,
                finished=[True] * group_size,
            )
            for at, prompt in zip(range(0, len(drawn), group_size), prompts, strict=True)
        ]

    monkeypatch.setattr(groups, "write_prompts", write_prompts)
    monkeypatch.setattr(groups, "roll_out", roll_out)


def make_groups(chosen, reward, *more, rank=0, world_size=1, ahead=False, rewards=None):
    settings = ["run.batch_size=4", "rollout.group_size=2", "data.datasets=scanqa", *more]
    config = load_config("grpo", None, settings)
    rewards = rewards or RewardSet({"own": reward}, {"own": 1.0}, gate_by_format=False)
    observations = SimpleNamespace(of=lambda wanted: [None] * len(wanted))
    runtime = Runtime(CPU, rank, world_size, rank)
    return GroupSampler(config, SimpleNamespace(), chosen, observations, rewards, runtime, ahead=ahead)


def number_of(text):
    return int(text.split()[0][1:])


def only_odd_differ(completions, **columns):
    """Completions of odd samples earn what they drew, those of even ones nothing."""
    return [float(text.split()[1]) if number_of(text) % 2 else 0.0 for text in completions]


def informative(experience):
    return [bool(row.any()) for row in experience.advantages_PG]


def test_prompts_written_ahead_are_the_same(stand_ins):
    """Substitutes and shorter prompts, too, which are drawn while nothing is being written."""
    chosen = samples(20, [10, 30] * 10)
    settings = ("rollout.resample_rounds=2", "rollout.max_prompt_tokens=20", "run.steps=4")
    plain = make_groups(chosen, only_odd_differ, *settings)
    with make_groups(chosen, only_odd_differ, *settings, ahead=True) as beside:
        for step in range(4):
            ours, theirs = (sampler.collect(step, Phases(CPU)) for sampler in (beside, plain))
            assert [rollout.texts for rollout in ours.rollouts] == [rollout.texts for rollout in theirs.rollouts]
            assert ours.metrics == theirs.metrics and ours.metrics["too_long"] > 0


def test_compiling_waits_for_prompts_that_are_being_written(stand_ins, monkeypatch):
    """The thread calls modules, and torch.fx takes their calls over while it traces (engine/ahead.py)."""
    begun, let_go, order = threading.Event(), threading.Event(), []
    beside = make_groups(samples(20), only_odd_differ, "run.steps=3", ahead=True)
    write = beside.coming.make

    def slow(step):
        if step == 1:
            begun.set()
            assert let_go.wait(30)
            order.append("written")
        return write(step)

    monkeypatch.setattr(beside.coming, "make", slow)
    torch._dynamo.reset()
    with beside:
        beside.collect(0, Phases(CPU))
        assert begun.wait(30)
        threading.Timer(0.3, let_go.set).start()
        torch.compile(lambda x: x + 3, backend="eager")(torch.ones(2))
        order.append("compiled")
        beside.collect(1, Phases(CPU))
    assert order == ["written", "compiled"]


def test_prompts_with_nothing_to_teach_make_room_for_others(stand_ins):
    chosen = samples(20)
    plain = make_groups(chosen, only_odd_differ).collect(0, Phases(CPU))
    odd = [number_of(rollout.texts[0]) % 2 == 1 for rollout in plain.rollouts]
    assert informative(plain) == odd and 0 < sum(odd) < 4
    assert plain.metrics["resampled"] == 0 and plain.num_informative == sum(odd)

    again = make_groups(chosen, only_odd_differ, "rollout.resample_rounds=8").collect(0, Phases(CPU))
    assert informative(again) == [True] * 4 and again.num_informative == 4
    assert again.metrics["resampled"] == 4 - sum(odd) and again.metrics["frac_reward_zero_std"] == 0
    for mine, before, kept in zip(again.rollouts, plain.rollouts, odd, strict=True):
        assert (mine.texts == before.texts) == kept  # what taught something stays as it was
    # the scores are those of the texts that are there
    texts = [text for rollout in again.rollouts for text in rollout.texts]
    assert again.scored.table["own"].tolist() == only_odd_differ(texts)


def test_substitutes_have_a_limit_and_steps_repeat(stand_ins):
    rounds: list[int] = []

    def constant(completions, **columns):
        rounds.append(len(completions))
        return [1.0] * len(completions)

    experience = make_groups(samples(9), constant, "rollout.resample_rounds=3").collect(5, Phases(CPU))
    assert rounds == [8] * 4 and experience.num_informative == 0 and not experience.advantages_PG.any()
    assert experience.metrics["frac_reward_zero_std"] == 1

    texts = []
    for _ in range(2):
        found = make_groups(samples(20), only_odd_differ, "rollout.resample_rounds=2").collect(3, Phases(CPU))
        texts.append([rollout.texts for rollout in found.rollouts])
    assert texts[0] == texts[1]


def test_a_prompt_that_is_too_long_is_another_one(stand_ins, caplog):
    lengths = [50 if number % 3 == 0 else 10 for number in range(12)]
    made = make_groups(samples(12, lengths), only_odd_differ, "rollout.max_prompt_tokens=20")
    free = make_groups(samples(12, lengths), only_odd_differ)
    replaced = 0
    for step in range(6):
        with_limit, without = made.collect(step, Phases(CPU)), free.collect(step, Phases(CPU))
        for mine, its in zip(with_limit.rollouts, without.rollouts, strict=True):
            assert len(mine.row.token_ids) <= 20
            if len(its.row.token_ids) <= 20:
                assert mine.sample is its.sample or mine.sample.sample_id == its.sample.sample_id
            else:
                replaced += 1
        assert with_limit.metrics["too_long"] >= sum(len(its.row.token_ids) > 20 for its in without.rollouts)
    assert replaced > 0 and "has 50 tokens; another takes its place" in caplog.text
    with pytest.raises(
        ValueError, match=r"33 prompts one after the other have more than rollout.max_prompt_tokens = 20"
    ):
        make_groups(samples(4, [50] * 4), only_odd_differ, "rollout.max_prompt_tokens=20").collect(0, Phases(CPU))


@pytest.mark.parametrize("more", [(), ("rollout.resample_rounds=3",), ("rollout.max_prompt_tokens=20",)])
def test_ranks_together_learn_from_what_one_process_does(stand_ins, monkeypatch, more):
    """Substitutes too are a matter of the place in the batch. What ranks tell each other is left out."""
    chosen = samples(20, [50 if number % 5 == 0 else 10 for number in range(20)])
    alone = make_groups(chosen, only_odd_differ, *more).collect(2, Phases(CPU))
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [value] * 2)
    monkeypatch.setattr(Runtime, "total", lambda self, *values: [float(value) for value in values])
    monkeypatch.setattr(Runtime, "most", lambda self, count: count)
    for rank in range(2):
        part = make_groups(chosen, only_odd_differ, *more, rank=rank, world_size=2).collect(2, Phases(CPU))
        assert [its.texts for its in part.rollouts] == [its.texts for its in alone.rollouts[2 * rank : 2 * rank + 2]]


# Two rewards --------------------------------------------------------------------------------------------------------


def two_rewards(first, second, **weights):
    """Rewards that give the samples' pairs of completions what is listed for them."""

    def paying(values):
        return lambda completions, **columns: [
            values[number_of(text)][place % 2] for place, text in enumerate(completions)
        ]

    return RewardSet({"wide": paying(first), "narrow": paying(second)}, weights, gate_by_format=False)


def test_rewards_are_normalized_one_by_one_where_asked(stand_ins):
    """By hand, G = 2: one deviation from the mean is 1 / sqrt(2) of the unbiased deviation."""
    wide, narrow = [(0, 100), (1, 1), (5, 5), (0, 8)], [(1, 0), (0, 1), (2, 2), (None, None)]
    rewards = two_rewards(wide, narrow, wide=0.5, narrow=0.5)
    decoupled = make_groups(samples(4), None, "reward.aggregation=normalize_then_sum", rewards=rewards)
    summed = make_groups(samples(4), None, rewards=rewards)
    order = [number_of(rollout.texts[0]) for rollout in decoupled.collect(0, Phases(CPU)).rollouts]
    found = dict(zip(order, decoupled.collect(0, Phases(CPU)).advantages_PG.tolist(), strict=True))
    half = 0.5 / 2**0.5
    parts = {0: [-half + half, half - half], 1: [-half, half], 2: [0, 0], 3: [-half, half]}
    deviation = np.std([value for pair in parts.values() for value in pair], ddof=1)
    for number, pair in parts.items():
        assert found[number] == pytest.approx([value / deviation for value in pair], rel=2e-3, abs=1e-3)
    before = dict(zip(order, summed.collect(0, Phases(CPU)).advantages_PG.tolist(), strict=True))
    assert before[0] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-3)  # the wide reward alone is heard


def test_a_group_is_flat_where_every_reward_with_a_weight_is(stand_ins):
    wide, narrow = [(1, 2), (1, 1), (3, 3), (4, 4)], [(2, 1), (0, 1), (2, 2), (None, None)]
    more = "reward.aggregation=normalize_then_sum"
    both = make_groups(samples(4), None, more, rewards=two_rewards(wide, narrow, wide=1.0, narrow=1.0))
    experience = both.collect(0, Phases(CPU))
    assert experience.num_informative == 2 and experience.metrics["frac_reward_zero_std"] == 0.5
    one = make_groups(samples(4), None, more, rewards=two_rewards(wide, narrow, wide=1.0, narrow=0.0))
    assert one.collect(0, Phases(CPU)).num_informative == 1
    summed = make_groups(samples(4), None, rewards=two_rewards(wide, narrow, wide=1.0, narrow=1.0))
    assert summed.collect(0, Phases(CPU)).num_informative == 1  # 1 + 2 is 2 + 1


def test_normalizing_one_by_one_has_one_scale():
    with pytest.raises(ValueError, match="leave loss.scale at group, not batch"):
        load_config("grpo", None, ["reward.aggregation=normalize_then_sum", "loss.scale=batch"])
