"""The answer grammar on anything a model may write: never an error, never a wait, and always the same reading."""

import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.metrics.qa import clean_answer
from threedr1.utils.text import find_pointers, format_box, parse_response, replace_boxes, resolve_boxes, strip_pointers

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<box>", "</box>", "<obj", "<obj3>", ">", "<", ",", ".", "-"]
PIECES += ["+", "0", "12", "1.5", ".5", "1.", "9" * 401, "1, 2, 3, 1, 1, 1", "٣", " ", "\n", "\u2028", "a", "é", "nan"]
PIECES += [format_box([1, 2, 3, 1, 1, 1]), format_box([0, 0, 0, 1, 2, 1, 0.5])]
soup = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join)
gaps = st.sampled_from(["", " ", "\n", "x", "<think>", "</answer>"])
# the four tags in order with anything between, so that well-formed texts are not rare
tagged = st.tuples(gaps, gaps, gaps, gaps, gaps).map(
    "{0[0]}<think>{0[1]}</think>{0[2]}<answer>{0[3]}</answer>{0[4]}".format
)
PROPOSALS = [[1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 0.0], [math.nan] * 7, [0.0] * 7, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 0.0]]

_TAG = re.compile(r"</?(?:think|answer)>")
_WELL_FORMED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def by_definition(text: str) -> tuple[str, str, bool]:
    """The grammar as one expression, which says what is meant but takes quadratic time."""
    match = _WELL_FORMED.fullmatch(text)
    if match and not _TAG.search(match[1]) and not _TAG.search(match[2]):
        return match[1].strip(), match[2].strip(), True
    think = re.search(r"<think>(.*?)(?:</think>|$)", text, re.DOTALL)
    outside = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.DOTALL)
    answer = text.rpartition("<answer>")[2] if "<answer>" in text else outside
    return think[1].strip() if think else "", _TAG.sub("", answer.partition("</answer>")[0]).strip(), False


@given(soup | tagged)
def test_responses_are_read_by_the_definition(text: str):
    response = parse_response(text)
    assert (response.think, response.answer, response.well_formed) == by_definition(text)


@given(soup)
def test_pointers_resolve_to_real_boxes_and_once(text: str):
    boxes = resolve_boxes(text, PROPOSALS)
    assert len({tuple(box) for box in boxes}) == len(boxes) <= len(find_pointers(text))
    for box in boxes:
        assert len(box) == 7 and all(map(math.isfinite, box)) and min(box[3:6]) > 0


@given(soup)
def test_boxes_are_rewritten_one_by_one(text: str):
    seen: list[list[float]] = []

    def record(box: list[float]) -> str:
        seen.append(box)
        return "<obj1>"

    names = find_pointers(replace_boxes(text, record))
    assert seen == [pointer for pointer in find_pointers(text) if isinstance(pointer, list)]
    assert names.count(1) >= len(seen)


@given(soup, soup)
def test_words_between_pointers_stay(before: str, after: str):
    kept = strip_pointers(f"{before} word <obj1> other {after}")
    assert "word other" in kept


@given(st.text(st.sampled_from(" \nx"), max_size=12))
def test_blanks_at_the_ends_of_an_answer_go_as_published(text: str):
    trimmed = re.sub("^[ ]+", "", re.sub("[ ]+$", "", text))
    assert clean_answer(text) == re.sub(" {2,}", " ", trimmed)


MEGABYTE = 1_000_000
HANGS = {
    "one endless number": "<box>" + "7" * MEGABYTE,
    "endless numbers": ("<box>" + "7" * 500) * (MEGABYTE // 505),
    "a box that never ends": "<box>" + "1, " * (MEGABYTE // 3),
    "blanks in a box": "<box>" + " " * MEGABYTE,
    "blanks in a number": "<box>1" + " " * MEGABYTE + ", 2",
    "opened boxes": "<box>" * (MEGABYTE // 5),
    "opened names": "<obj" * (MEGABYTE // 4),
    "long names": "<obj" + "1" * MEGABYTE + ">",
    "repeated responses": "<think>a</think><answer>" * (MEGABYTE // 24),
    "opened thoughts": "<think>" * (MEGABYTE // 7),
    "closed thoughts": "</think>" * (MEGABYTE // 8),
    "opened answers": "<think>a</think>" + "<answer>" * (MEGABYTE // 8),
    "blanks": "a" + " " * MEGABYTE + "b",
    "digits": "chair" + "2" * MEGABYTE,
}


@pytest.mark.parametrize("name", HANGS)
def test_a_megabyte_is_read_at_once(name: str):
    text = HANGS[name]
    start = time.process_time()
    parse_response(text)
    resolve_boxes(text, PROPOSALS)
    replace_boxes(text, format_box)
    strip_pointers(text)
    clean_answer(text)
    assert time.process_time() - start < 2


def test_many_boxes_are_told_apart_at_once():
    text = "".join(format_box([index / 100, 0, 0, 1, 1, 1]) for index in range(22_500)) * 2
    distinct = "".join(format_box([index / 100, 0, 0, 1, 1, 1]) for index in range(45_000))
    start = time.process_time()
    assert len(resolve_boxes(text, [])) == 22_500
    assert len(resolve_boxes(distinct, [])) == 45_000
    assert time.process_time() - start < 2
