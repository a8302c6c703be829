"""Streamed text: pieces are whole characters, add up to the whole, and part thought from answer by the grammar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.text import format_response, parse_response
from threedr1.utils.text_stream import ANSWER, PLAIN, THOUGHT, ResponseParts, TokenText

WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30)


def stream(content: bytes, cuts: list[int]) -> list[str]:
    """Pieces of a text whose tokens are the parts of its bytes between cuts."""
    edges = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    tokens = [content[low:high] for low, high in zip(edges, edges[1:], strict=False)]
    text = TokenText(lambda ids: b"".join(tokens[index] for index in ids).decode("utf-8", errors="replace"))
    return [*(text.push(index) for index in range(len(tokens))), text.end()]


@given(WORDS, st.lists(st.integers(0, 200)))
def test_pieces_are_whole_characters_and_add_up(words: str, cuts: list[int]):
    pieces = stream(words.encode(), cuts)
    assert "".join(pieces) == words
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_once_it_is_whole():
    assert stream("a🪑b".encode(), [1, 2, 3, 4, 5]) == ["a", "", "", "", "🪑", "b", ""]


def test_half_a_character_at_the_end_is_told_at_the_end():
    assert stream("é".encode()[:1], []) == ["", "\ufffd"]


@given(st.binary(max_size=30), st.lists(st.integers(0, 200)))
def test_no_bytes_are_lost(content: bytes, cuts: list[int]):
    """What is no UTF-8 shows as replacement characters, perhaps as many as there are pieces, and ends nothing."""
    pieces = "".join(stream(content, cuts))
    whole = content.decode("utf-8", errors="replace")
    assert pieces.replace("\ufffd", "") == whole.replace("\ufffd", "")


@pytest.mark.parametrize("byte_level", [True, False])
def test_the_tokenizer_of_a_model(tiny_qwen, byte_level):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    said = "The café’s 🪑 is <obj12>, 椅子.<|im_end|>" if byte_level else "red chair"
    ids = tokenizer(said).input_ids
    text = TokenText(lambda some: tokenizer.decode(list(some), skip_special_tokens=True))
    pieces = [*(text.push(token) for token in ids), text.end()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == said.removesuffix("<|im_end|>")
    assert all("\ufffd" not in piece for piece in pieces)


def joined(pieces: list[str]) -> list[tuple[str, str]]:
    """Parts of a response that comes in pieces, neighbours of one kind put together."""
    parts, found = ResponseParts(), []
    for part, text in [*(found for piece in pieces for found in parts.push(piece)), *parts.end()]:
        if found and found[-1][0] == part:
            found[-1] = (part, found[-1][1] + text)
        else:
            found.append((part, text))
    return found


@given(WORDS.filter(lambda word: "<" not in word), WORDS.filter(lambda word: "<" not in word), st.integers(1, 9))
def test_thought_and_answer_are_those_of_the_grammar(think: str, answer: str, size: int):
    response = format_response(think, f"{answer} <obj3> a < b")
    pieces = [response[start : start + size] for start in range(0, len(response), size)]
    said = {part: text.strip() for part, text in joined(pieces)}
    whole = parse_response(response)
    assert (said.get(THOUGHT, ""), said[ANSWER]) == (whole.think, whole.answer)


@given(st.text(alphabet="<think>/answer obj1\n", max_size=60), st.lists(st.integers(0, 60)))
def test_pieces_do_not_change_the_parts(response: str, cuts: list[int]):
    edges = sorted({0, len(response), *(cut % (len(response) + 1) for cut in cuts)})
    assert joined([response[low:high] for low, high in zip(edges, edges[1:], strict=False)]) == joined([response])


def test_a_response_without_tags_is_plain():
    assert joined(["two ", "chairs <obj1", "> <"]) == [(PLAIN, "two chairs <obj1> <")]
