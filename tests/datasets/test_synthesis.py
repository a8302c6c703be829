"""The Scene-30K engine: filters by hand-made cases, a journal that survives a kill, teachers against local servers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from threedr1.datasets.scene_store import SceneInfo, SceneStore
from threedr1.datasets.synthesis import FilterOptions, synthesize
from threedr1.datasets.synthesis.description import describe, inventory, load_captions
from threedr1.datasets.synthesis.filters import (
    check_consistency,
    check_gold,
    check_response,
    last_step,
    names_target,
    near_duplicates,
    similarity,
    step_starts,
)
from threedr1.datasets.synthesis.prompts import answer_prompt, check_prompt
from threedr1.datasets.synthesis.rule_solvers import locate, solve_question
from threedr1.datasets.synthesis.rule_teacher import answer_of_thought, write_thought
from threedr1.datasets.synthesis.scene_reading import CannotTell, SceneReading
from threedr1.datasets.synthesis.sources import Question, load_questions
from threedr1.datasets.synthesis.teacher import (
    RetryOptions,
)
from threedr1.datasets.tasks import load_samples
from threedr1.main import main

from .. import data_factory as factory

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = FilterOptions()
FAST = RetryOptions(attempts=3, first_delay=0.001, longest_delay=0.01)
BOX = (0.5, 0.25, 0.45, 0.5, 0.5, 0.9, 0.0)
THINK = (
    "Step 1: The question asks for the thing on the left of the chair, which stands near the middle of the room. "
    "Step 2: From there the table is the only object on that side of it. Conclusion: It is the table."
)
GOOD = f"<think>{THINK}</think><answer>The table.</answer>"


def question(**changes) -> Question:
    base = Question(
        "scanqa-1", "scanqa", "s", "qa", "What is left of the chair?", (3,), ("table",), ("table",), (BOX,)
    )
    return replace(base, **changes)


# ---- filters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        ("", "format"),
        (THINK, "format"),
        (f"<think>{THINK}</think>The table.", "format"),
        (f"{GOOD} And more.", "format"),
        (f"<think>{THINK}</think><answer></answer>", "format"),
        ("<think>First, a. Next, b. Last, the table.</think><answer>table</answer>", "think_short"),
        (GOOD.replace("Step 2: From", "From").replace("Conclusion: ", ""), "few_steps"),
        (GOOD.replace("It is the table.", "It is that one."), "target_unnamed"),
    ],
)
def test_response_filters_by_hand(text, reason):
    assert check_response(text, question(), OPTIONS) == reason


def test_length_filters_count_words_without_boxes_and_can_be_switched():
    strict = FilterOptions(min_answer_words=20)
    assert check_response(GOOD, question(), strict) == "answer_short"
    long_answer = GOOD.replace("The table.", "word " * 19 + "table")
    assert check_response(long_answer, question(), strict) == ""
    boxed = GOOD.replace("The table.", "word " * 18 + "table <box>1, 2, 3, 4, 5, 6</box>")
    assert check_response(boxed, question(), strict) == "answer_short"
    short = "<think>First, a. Next, b. Last, the table.</think><answer>table</answer>"
    assert check_response(short, question(), FilterOptions(min_think_words=0)) == ""


def test_steps_are_cues_that_open_sentences():
    assert len(step_starts("First, a. Next, b. Last, c.")) == 3
    assert len(step_starts("Step 1: a\nStep 2: b\nConclusion: c")) == 3
    assert len(step_starts("Step 1: First, a. **Step 2:** Then b.")) == 2
    assert len(step_starts("1. First, a\n2. Second, b\n- Finally, c")) == 3
    assert len(step_starts("Next to the bed is a lamp. The last chair and the first one are red.")) == 0
    assert last_step("First, the chair. Last, the table.") == "Last, the table."
    assert last_step("no cue") == "no cue"


def test_target_names_take_plurals_and_last_words_but_no_parts_of_words():
    assert names_target("Last, two office chairs.", ["office chair"])
    assert names_target("Last, this chair.", ["office chair"])
    assert not names_target("Last, the armchair.", ["chair"])
    assert not names_target("Last, the bed.", ["table", "desk"])


def test_consistency_is_character_levenshtein_similarity():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "") == 1.0
    assert check_consistency("abcdefghij", "abcdefghXX", OPTIONS) == ""  # exactly 0.8
    assert check_consistency("abcdefghij", "abcdefgXXX", OPTIONS) == "inconsistent"
    assert check_consistency("The table. ", "\nThe table.", OPTIONS) == ""


def test_gold_answers_agree_as_whole_words_and_boxes_by_overlap():
    assert check_gold("There are 3 chairs.", question(gold_answers=("three",)), OPTIONS) == ""
    assert check_gold("It is brown.", question(gold_answers=("white", "brown")), OPTIONS) == ""
    assert check_gold("It is on the tablecloth.", question(gold_answers=("table",)), OPTIONS) == "gold_answer"
    grounding = question(task="grounding")
    assert check_gold("It is <box>0.5, 0.25, 0.45, 0.5, 0.5, 0.9</box>.", grounding, OPTIONS) == ""
    # moved by half its width: IoU 1/3
    assert check_gold("It is <box>0.75, 0.25, 0.45, 0.5, 0.5, 0.9</box>.", grounding, OPTIONS) == "gold_box"
    assert check_gold("It is the chair.", grounding, OPTIONS) == "gold_box"


def test_near_duplicates_need_the_same_target_question_and_answer():
    first = question(text="the chair that is closest to the table")
    same = question(text="The chair that is closest to the table.")
    pairs = [(first, "The chair."), (same, "the chair"), (same, "A wholly different answer.")]
    assert near_duplicates(pairs, OPTIONS) == [1]
    other = [(replace(same, object_ids=(4,)), "The chair."), (replace(same, scene_id="t"), "The chair.")]
    assert near_duplicates([pairs[0], *other], OPTIONS) == []


# ---- sources, descriptions, prompts


def train_and_val(root: Path) -> tuple[list[str], list[str]]:
    return (root / "scannetv2_train.txt").read_text().split(), (root / "scannetv2_val.txt").read_text().split()


def test_questions_are_those_of_training_scenes_in_an_order_of_the_seed(root):
    store, (train, _) = SceneStore(root / "prepared"), train_and_val(root)
    questions, _ = load_questions(root, store, split="train", seed=0, limit=0)
    assert {one.source for one in questions} == {"scanqa", "scanrefer", "nr3d"}
    assert {one.scene_id for one in questions} == set(train)
    assert len({one.question_id for one in questions}) == len(questions)
    again, _ = load_questions(root, store, split="train", seed=0, limit=2)
    assert again == questions[:2]
    orders = {
        tuple(one.question_id for one in load_questions(root, store, split="train", seed=seed, limit=0)[0])
        for seed in range(5)
    }
    assert len(orders) > 1
    chair = next(one for one in questions if one.source == "scanrefer")
    expected = np.array(factory.OBJECTS[factory.CHAIR][0]) - store.index[chair.scene_id].origin_3
    np.testing.assert_allclose(chair.target_boxes[0][:3], expected, atol=0.02)


def test_repeated_questions_are_asked_once_and_ambiguous_ones_never(root):
    path, store = root / "annotations" / "ScanQA_v1.0_train.json", SceneStore(root / "prepared")
    rows = json.loads(path.read_text())
    repeated = {**rows[0], "question_id": "again"}
    other = {**rows[0], "question": "Which one?", "question_id": "a"}
    path.write_text(json.dumps([*rows, repeated, other, {**other, "object_ids": [factory.CHAIR], "question_id": "b"}]))
    questions, left_out = load_questions(root, store, split="train", seed=0, limit=0)
    assert left_out == {"repeated": 1, "ambiguous": 2}
    assert [one.text for one in questions].count(rows[0]["question"]) == len(rows)
    assert "Which one?" not in [one.text for one in questions]


def test_held_out_scenes_are_refused(root, tmp_path):
    train, val = train_and_val(root)
    with pytest.raises(ValueError, match="training data"):
        synthesize(root, tmp_path / "o.jsonl", split="val")
    path = root / "annotations" / "ScanQA_v1.0_train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {**rows[0], "scene_id": val[0], "question_id": "leak"}]))
    with pytest.raises(ValueError, match=rf"{val[0]} belongs to the validation"):
        synthesize(root, tmp_path / "o.jsonl")
    path.write_text(json.dumps(rows))
    (root / "scannetv2_train.txt").write_text("\n".join([*train, *val]))
    with pytest.raises(ValueError, match="belongs to the validation"):
        synthesize(root, tmp_path / "o.jsonl")
    assert not list(tmp_path.glob("o.jsonl"))


def test_missing_questions_are_one_sentence(root, tmp_path):
    for path in (root / "annotations").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="There are no questions"):
        synthesize(root, tmp_path / "o.jsonl")


def info_of(*things: tuple[int, str, tuple[float, ...]]) -> SceneInfo:
    """A scene made of labelled boxes, world frame, floor centre at (1, 2, 0)."""
    boxes_K7 = np.array([[*box, 0.0] for _, _, box in things], np.float32).reshape(-1, 7)
    return SceneInfo(
        scene_id="s",
        object_ids_K=np.array([number for number, _, _ in things], np.int32),
        object_labels=[label for _, label, _ in things],
        class_ids_K=np.zeros(len(things), np.int32),
        boxes_K7=boxes_K7,
        structure_ids=frozenset(),
        axis_align_44=np.eye(4),
        origin_3=np.array([1, 2, 0], np.float32),
        raw_middle_3=np.zeros(3),
    )


ROOM = info_of(
    (0, "desk", (3, 2, 0.4, 1.6, 0.8, 0.8)),
    (1, "monitor", (3, 2, 1.0, 0.6, 0.2, 0.4)),
    (2, "chair", (2, 2, 0.5, 0.5, 0.5, 1.0)),
    (3, "chair", (-1, 2, 0.6, 0.5, 0.5, 1.2)),
    (4, "office chair", (1, 4, 0.4, 0.5, 0.5, 0.8)),
    (5, "bed", (-2, 0, 0.3, 2.0, 1.5, 0.6)),
)


def test_descriptions_use_the_caption_where_there_is_one_and_always_list_boxes(root):
    assert inventory(ROOM) == ("This scene holds two chairs, one bed, one desk, one monitor and one office chair.")
    text = describe(ROOM, {})
    assert text.startswith("This scene holds") and "desk <box>2.00, 0.00, 0.40, 1.60, 0.80, 0.80</box>" in text
    assert describe(ROOM, {"s": "A study."}).startswith("A study. Objects")
    path = root / "annotations" / "scene_caption.json"
    path.write_text(json.dumps({"s": {"captions": ["A study.", "It is small. "]}}))
    assert load_captions(root) == {"s": "A study. It is small."}
    path.write_text(json.dumps({"s": {"caption": "A study."}}))
    with pytest.raises(ValueError, match="captions"):
        load_captions(root)


def test_prompts_hold_the_papers_words_and_take_braces_as_they_are():
    prompt = answer_prompt(question(text="Is {this} it?"), "A {question} room.")
    assert prompt.startswith("A {question} room. Following the scene description, think step by step and answer")
    assert prompt.endswith("Question: Is {this} it?")
    assert "<box>" in answer_prompt(question(task="grounding"), "A room.")
    assert "my {thoughts}" in check_prompt(question(), "my {thoughts}")


# ---- rule teacher


@pytest.mark.parametrize(
    ("description", "object_id"),
    [
        ("it is the bed.", 5),
        ("this is the chair closest to the desk. it is red.", 2),
        ("find the chair that is farthest away from the desk", 3),
        ("pick the tallest chair in the room", 3),
        ("the desk with a monitor on it", 0),
        ("the monitor that is on the desk", 1),
        ("the chair to the left of the desk as seen from the middle of the room", None),  # one stands right ahead
        ("the office chair to the left of the desk as seen from the middle of the room", 4),
        ("the chair between the desk and the bed", 2),
        ("there is a wooden chair. it is the chair nearest to the monitor", 2),
        ("the red chair", None),  # boxes have no colours
        ("the piano", None),
        ("the thing beside the white bed", None),
    ],
)
def test_rules_find_what_a_description_means_or_say_that_they_cannot(description, object_id):
    scene = SceneReading(ROOM)
    if object_id is None:
        with pytest.raises(CannotTell):
            locate(scene, description)
    else:
        assert locate(scene, description).thing.object_id == object_id


@pytest.mark.parametrize(
    ("asked", "gold"),
    [
        ("How many chairs are in the room?", "three"),  # office chairs are chairs
        ("How many office chairs are there?", "1"),
        ("Are there more chairs than desks, fewer, or the same number?", "more"),
        ("Are there more beds than desks, fewer, or the same number?", "the same"),
        ("Which is closer to the monitor, the bed or the desk?", "desk"),
        ("Which is the tallest, the bed, the office chair or the desk?", None),  # the last two are as high
        ("Which is the shortest, the bed, the office chair or the desk?", "bed"),
        ("What is on the desk?", "monitor"),
        ("What is the monitor standing on?", "desk"),
        ("What on the floor is closest to the monitor?", "desk"),
        ("What is the chair made of?", None),
    ],
)
def test_rules_answer_questions_of_known_forms(asked, gold):
    scene = SceneReading(ROOM)
    if gold is None:
        with pytest.raises(CannotTell):
            solve_question(scene, asked)
        return
    solution = solve_question(scene, asked)
    assert check_gold(solution.answer, question(gold_answers=(gold,)), OPTIONS) == ""
    think = write_thought(solution)
    answer = answer_of_thought(think)
    assert answer == solution.answer[0].upper() + solution.answer[1:] + "."
    named = question(target_names=tuple(ROOM.object_labels))
    assert check_response(f"<think>{think}</think><answer>{answer}</answer>", named, OPTIONS) == ""


def test_the_rule_teachers_records_train_and_every_box_it_writes_is_an_objects_own(root, tmp_path):
    out = tmp_path / "out.jsonl"
    report = synthesize(root, out, teacher="rules", workers=2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert report["kept"] == len(rows) > 0
    assert report["questions"] == report["kept"] + sum(report["rejected"].values())
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report
    rejects = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == sum(report["rejected"].values()) and all(row["reason"] for row in rejects)
    (root / "annotations" / "Scene-30K.jsonl").write_bytes(out.read_bytes())
    store = SceneStore(root / "prepared")
    samples = load_samples(root, "train", ["scene30k"], scenes=store)
    assert [sample.scene_id for sample in samples] == [row["scene_id"] for row in rows]
    assert all(sample.think and sample.answer for sample in samples)
    for row in rows:
        listed = describe(store.index[row["scene_id"]], {})
        boxes = [part.split("</box>")[0] for part in row["cot"].split("<box>")[1:]]
        assert boxes and all(box in listed for box in boxes)


def test_the_command_reports_what_it_kept_and_refuses_in_one_sentence(root, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["synthesize", "--root", str(root), "--out", str(out), "--limit", "2"]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert "questions 2" in " ".join(printed[0].split()) and f"wrote {out}" in printed
    assert main(["synthesize", "--root", str(root), "--out", str(out), "--split", "val"]) == 1
    assert "training data" in capsys.readouterr().err
