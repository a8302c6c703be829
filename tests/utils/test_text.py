"""The answer grammar: strict and lenient reading, pointers, and that writing and reading are inverse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.text import (
    find_boxes,
    find_pointers,
    format_box,
    format_name,
    format_response,
    parse_response,
    replace_boxes,
    resolve_boxes,
    split_at_boxes,
    strip_pointers,
)

CHAIR = [1.0, 2.0, 0.5, 0.6, 0.6, 1.0, 0.0]
DESK = [3.0, 2.0, 0.4, 1.4, 0.7, 0.8, 0.0]


def test_a_well_formed_response():
    response = parse_response(" <think>Two chairs.</think>\n<answer>The red one.</answer>\n")
    assert (response.think, response.answer, response.well_formed) == ("Two chairs.", "The red one.", True)


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>a</think><answer>b</answer> more", "a", "b"),
        ("<answer>b</answer>", "", "b"),
        ("<think>a</think> b", "a", "b"),
        ("<think>a", "a", ""),
        ("b", "", "b"),
        ("", "", ""),
        ("<think>a</think><answer>x</answer><answer>b</answer>", "a", "b"),
        ("<think>a</think><answer>b", "a", "b"),
        ("<answer>b</answer><think>a</think>", "a", "b"),
        ("<think>a<think>c</think></think><answer>b</answer>", "a<think>c", "b"),
        ("<THINK>a</THINK><answer>b</answer>", "", "b"),
    ],
)
def test_other_responses_are_read_leniently(text: str, think: str, answer: str):
    response = parse_response(text)
    assert (response.think, response.answer, response.well_formed) == (think, answer, False)


words = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40).map(str.strip)


@given(words, words)
def test_a_written_response_is_read_back(think: str, answer: str):
    response = parse_response(format_response(think, answer))
    assert (response.think, response.answer, response.well_formed) == (think, answer, True)


def test_box_text():
    assert format_box(CHAIR) == "<box>1.00, 2.00, 0.50, 0.60, 0.60, 1.00</box>"
    assert format_box([*CHAIR[:6], math.pi / 2]) == "<box>1.00, 2.00, 0.50, 0.60, 0.60, 1.00, 1.57</box>"
    assert format_box([-0.004, 0, 0, 1, 1, 1]) == "<box>0.00, 0.00, 0.00, 1.00, 1.00, 1.00</box>"


centimetres = st.integers(-2000, 2000).map(lambda number: number / 100)
sizes = st.integers(1, 1000).map(lambda number: number / 100)
headings = st.just(0.0) | st.integers(1, 314).map(lambda number: number / 100)


@given(st.tuples(centimetres, centimetres, centimetres, sizes, sizes, sizes, headings))
def test_a_written_box_is_read_back(box: tuple[float, ...]):
    assert find_pointers(format_box(box)) == [list(box)]


def test_names_and_boxes_resolve_in_order_and_once():
    text = f"The chair {format_name(1)} by {format_box(CHAIR)}, not {format_name(1)}"
    assert resolve_boxes(text, [CHAIR, DESK]) == [DESK, CHAIR]


@pytest.mark.parametrize(
    "text",
    [
        "<obj2>",
        "<obj-1>",
        "<obj12345>",
        "<box>1, 2, 3, 0, 1, 1</box>",
        "<box>1, 2, 3, 1, 1</box>",
        "<box>1, 2, 3, 1, 1, 1, 0, 9</box>",
        "<box>1, 2, 3, 1, -1, 1</box>",
        "<box>1, 2, 3, nan, 1, 1</box>",
        "<box>1 2 3 1 1 1</box>",
        "a box",
    ],
)
def test_what_is_not_a_box_resolves_to_nothing(text: str):
    assert resolve_boxes(text, [CHAIR, DESK]) == []


def test_numbers_beyond_float_range_are_left_out():
    assert resolve_boxes(f"<box>1, 2, 3, {'9' * 400}, 1, 1</box>", []) == []


def test_rewriting_boxes_to_names():
    text = f"It is {format_box(CHAIR)} or {format_box(DESK)}."
    assert replace_boxes(text, lambda box: format_name([CHAIR, DESK].index(box))) == "It is <obj0> or <obj1>."


def test_a_box_that_becomes_nothing_leaves_no_space():
    text = f"The chair {format_box(CHAIR)}, {format_box(DESK)} and the desk {format_box(DESK)}."
    kept = replace_boxes(text, lambda box: "" if box == DESK else "<obj0>")
    assert kept == "The chair <obj0>, and the desk."
    assert replace_boxes("a  <box>1, 2</box>, b", lambda box: "") == "a  <box>1, 2</box>, b"


def test_words_without_pointers():
    assert strip_pointers(f"The chair {format_box(CHAIR)} , and the desk <obj4>.") == "The chair, and the desk."


def test_boxes_are_the_pointers_that_are_no_names_and_a_text_is_split_at_them():
    text = f"the chair {format_box(CHAIR)} by <obj3>, <box>1, 2</box> and {format_box(DESK)}{format_box(CHAIR)}"
    assert find_boxes(text) == [CHAIR, DESK, CHAIR]
    assert find_boxes(text) == [pointer for pointer in find_pointers(text) if not isinstance(pointer, int)]
    between, boxes = split_at_boxes(text)
    assert boxes == [format_box(CHAIR), format_box(DESK), format_box(CHAIR)]
    assert between == ["the chair ", " by <obj3>, <box>1, 2</box> and ", "", ""]
    assert split_at_boxes("none") == (["none"], [])
