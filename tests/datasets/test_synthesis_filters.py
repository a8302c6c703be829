"""The filters against hand-made cases, the paper's own rows, and brute force."""

import string
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.synthesis.filters import (
    FILTERS,
    FilterOptions,
    check_boxes,
    check_consistency,
    check_gold,
    check_response,
    count_words,
    is_near_duplicate,
    near_duplicates,
    similarity,
    step_starts,
)
from threedr1.datasets.synthesis.sources import Question
from threedr1.datasets.synthesis.wording import contains_words, names_target
from threedr1.utils.boxes import box3d_iou
from threedr1.utils.text import format_box

OPTIONS = FilterOptions()
BOXES_K7 = np.array([[0, 0, 0.5, 1, 1, 1, 0], [3, 0, 0.5, 2, 1, 1, 0], [0, 3, 1.5, 0.004, 0.5, 0.4, 0]], np.float32)
TEXTS = st.text(alphabet="ab c", max_size=7)


def sofa(**changes) -> Question:
    base = Question("q", "scanqa", "s", "qa", "What color is the sofa?", (1,), ("sofa", "black"), ("black",), ())
    return replace(base, **changes)


def reply(think: str, answer: str) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


# The paper's example answer has seven words, where its filter asks for twenty.
PAPER_ANSWER = "The sofa in the scene is black."
THINK = (
    "Step 1: The question asks for the color of the sofa, so the sofa has to be found in the description first. "
    "Step 2: The description says that one sofa stands by the wall and that it is covered in dark leather. "
    "Step 3: Conclusion: The sofa in the scene is black."
)


# ---- one by one, in order


def test_the_papers_answer_passes_unless_twenty_words_are_asked_for():
    assert count_words(PAPER_ANSWER) == 7
    text = reply(THINK, PAPER_ANSWER)
    assert check_response(text, sofa(), OPTIONS) == "" and check_gold(PAPER_ANSWER, sofa(), OPTIONS) == ""
    assert check_response(text, sofa(), FilterOptions(min_answer_words=20)) == "answer_short"


# each breaks one filter more than the one before it; the first reason is the one that is given
WORSE = (
    (reply(THINK, PAPER_ANSWER), ""),
    (reply(THINK.replace("The sofa in the scene is black.", "It is dark."), PAPER_ANSWER), "target_unnamed"),
    (
        reply(THINK.replace("Step 2: ", "").replace("The sofa in the scene is black.", "It."), PAPER_ANSWER),
        "few_steps",
    ),
    (reply("Step 1: It.", PAPER_ANSWER), "think_short"),
    (f"So: {reply('Step 1: It.', PAPER_ANSWER)}", "format"),
)


@pytest.mark.parametrize(("text", "reason"), WORSE)
def test_the_first_filter_that_fails_gives_the_reason(text, reason):
    assert check_response(text, sofa(), OPTIONS) == reason


def test_every_filter_but_format_can_be_skipped():
    everything = FilterOptions(skipped=FILTERS[1:])
    assert check_response(reply("It.", "x"), sofa(), everything) == ""
    assert check_response("It.", sofa(), everything) == "format"
    assert check_consistency("a", "b", everything) == check_gold("x", sofa(), everything) == ""
    assert check_boxes("<obj1>", BOXES_K7, everything) == ""
    assert near_duplicates([(sofa(), "a")] * 3, everything) == []
    for name in FILTERS[1:5]:  # skipping one shows the next that fails
        only = FilterOptions(min_answer_words=20, skipped=tuple(other for other in FILTERS[1:5] if other != name))
        assert check_response(reply("It.", "x"), sofa(), only) == name
    assert asdict(everything)["skipped"] == FILTERS[1:]


@pytest.mark.parametrize("name", ["format", "long"])
def test_what_cannot_be_skipped_is_one_sentence(name):
    with pytest.raises(ValueError, match=f"no filter '{name}' to skip; there are think_short"):
        FilterOptions(skipped=(name,))


@pytest.mark.parametrize(
    ("think", "steps"),
    [
        ("Step 1: a. Step 2: b. Step 3: c.", 3),
        ("step 1 a.\nstep 2 b.\nlast c.", 3),
        ("First, a. Next, b. Last, c.", 3),
        ("Firstly a. Secondly b. Thirdly c. Finally d.", 4),
        ("At first, a; the next one and the last one.", 0),
        ("Steps 1 to 3 are skipped.", 0),
        ("- First, a\n- Next, b\n* Last, c", 3),
        ("Step 1. First, a. Step 2. Next, b. Step 3. Last, c.", 3),
    ],
)
def test_step_cues(think, steps):
    assert len(step_starts(think)) == steps


# ---- boxes that exist


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no box", ""),
        ("<box>0.00, 0.00, 0.50, 1.00, 1.00, 1.00</box> and <box>3, 0, 0.5, 2, 1, 1</box>", ""),
        # moved by a quarter of its width: IoU 0.75 / 1.25 = 0.6; by a half: 1/3
        ("<box>0.25, 0.00, 0.50, 1.00, 1.00, 1.00</box>", ""),
        ("<box>0.50, 0.00, 0.50, 1.00, 1.00, 1.00</box>", "box_unknown"),
        ("<box>0, 0, 0.5, 1, 1, 1</box> then <box>9, 9, 0.5, 1, 1, 1</box>", "box_unknown"),
        # 4 mm thick: two decimals make it 0, as the description does
        ("<box>0.00, 3.00, 1.50, 0.00, 0.50, 0.40</box>", ""),
        ("<box>0.00, 3.00, 1.50, 0.00, 0.50, 0.90</box>", "box_unknown"),
        ("the chair <obj0>", "box_unknown"),
    ],
)
def test_boxes_mentioned_must_be_objects_of_the_scene(text, reason):
    assert check_boxes(text, BOXES_K7, OPTIONS) == reason


def test_a_scene_without_objects_has_no_boxes_to_mention():
    empty_07 = np.zeros((0, 7), np.float32)
    assert check_boxes("a lamp", empty_07, OPTIONS) == ""
    assert check_boxes("<box>0, 0, 0, 1, 1, 1</box>", empty_07, OPTIONS) == "box_unknown"


NUMBERS = st.floats(-2, 2).map(lambda value: round(value, 2))
SIZES = st.floats(0.1, 2).map(lambda value: round(value, 2))
BOX = st.tuples(NUMBERS, NUMBERS, NUMBERS, SIZES, SIZES, SIZES)


@settings(max_examples=60, deadline=None)
@given(st.lists(BOX, min_size=1, max_size=4), st.lists(BOX, max_size=3), st.floats(0.05, 0.95))
def test_boxes_exist_where_the_best_overlap_reaches_the_threshold(known, mentioned, threshold):
    boxes_K7 = np.array([[*box, 0.0] for box in known])
    text = " ".join(format_box(box) for box in mentioned)
    overlaps = [max(float(box3d_iou([[*box, 0.0]], [one])[0, 0]) for one in boxes_K7.tolist()) for box in mentioned]
    expected = "" if all(overlap >= threshold for overlap in overlaps) else "box_unknown"
    assert check_boxes(text, boxes_K7, FilterOptions(min_box_iou=threshold)) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(BOX, min_size=1, max_size=5))
def test_boxes_copied_from_a_description_always_exist(known):
    boxes_K7 = np.array([[*box, 0.0] for box in known], np.float32)
    assert check_boxes(" ".join(format_box(box) for box in known), boxes_K7, FilterOptions(min_box_iou=1.0)) == ""


# ---- brute force


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance by his recursion, as a table."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.text(max_size=12), st.text(max_size=12))
def test_similarity_is_the_papers_formula(first, second):
    longer = max(len(first), len(second))
    expected = 1 - edit_distance(first, second) / longer if longer else 1.0
    assert similarity(first, second) == pytest.approx(expected)
    reason = check_consistency(first, second, OPTIONS)
    a, b = first.strip(), second.strip()
    # 5 d <= n is 1 - d / n >= 0.8 without rounding
    assert (reason == "") == (5 * edit_distance(a, b) <= max(len(a), len(b)))


@given(st.text(alphabet="ab -'", max_size=10), st.text(alphabet="ab", min_size=1, max_size=3))
def test_words_are_contained_whole(text, word):
    letters = set(string.ascii_letters)
    places = [i for i in range(len(text)) if text.startswith(word, i)]
    ends = [(text[i - 1 : i], text[i + len(word) : i + len(word) + 1]) for i in places]
    assert contains_words(text, word) == any(not ({*before, *after} & letters) for before, after in ends)


@given(st.sampled_from(["chair", "office chair", "bookshelf", "box"]), st.booleans())
def test_names_are_found_in_any_form(name, upper):
    forms = {"chair": "chairs", "office chair": "office chairs", "bookshelf": "bookshelves", "box": "boxes"}
    for form in (name, forms[name], name.split()[-1]):
        step = f"Last, see the {form}."
        assert names_target(step.upper() if upper else step, [name])
    assert not names_target("Last, see the lamp.", [name])


QUESTIONS = st.builds(
    lambda scene, ids, text, answer: (sofa(scene_id=scene, object_ids=ids, text=text), answer),
    st.sampled_from("st"),
    st.sampled_from([(1,), (1, 2), (2, 1)]),
    TEXTS,
    TEXTS,
)


@settings(deadline=None)
@given(st.lists(QUESTIONS, max_size=12), st.sampled_from([0.5, 0.8, 0.9, 1.0]))
def test_near_duplicates_are_those_of_the_quadratic_search(accepted, threshold):
    options = FilterOptions(duplicate_similarity=threshold)
    kept, repeated = [], []
    for index, pair in enumerate(accepted):
        if any(is_near_duplicate(accepted[other], pair, options) for other in kept):
            repeated.append(index)
        else:
            kept.append(index)
    assert near_duplicates(accepted, options) == repeated
