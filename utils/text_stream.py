"""Text of a model while it is being written: tokens to whole characters, and those to thought and answer.

The parts that come in pieces add up to what `text.parse_response` makes of the whole response.
"""

from collections.abc import Callable, Sequence

THOUGHT, ANSWER = "think", "answer"
PLAIN = ""  # outside of both: the answer of a response that is not well formed
_INCOMPLETE = "\ufffd"  # what half a character is decoded to
_MODES = {"<think>": THOUGHT, "</think>": PLAIN, "<answer>": ANSWER, "</answer>": PLAIN}


class TokenText:
    """Tokens one by one, text as soon as its characters are whole.

    A character of several bytes may be spread over tokens, so the end of the text waits until it decodes. Only the
    tokens since the last whole character are decoded, behind those of the piece before: a tokenizer may write a token
    differently at the beginning of a text.

    Args:
        decode: text of a list of tokens, special ones left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._told = 0  # of these, how many have been handed out

    def push(self, token_id: int) -> str:
        """The text that has become whole with one more token; often none, or several characters."""
        self._ids.append(token_id)
        before, text = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What is left at the end, half characters included."""
        piece = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        self._ids, self._told = [], 0
        return piece


class ResponseParts:
    """A response piece by piece, taken apart into (part, text): THOUGHT, ANSWER, or PLAIN outside of both.

    Tags are left out, and so is white space between parts. What may become a tag waits for the next piece.
    """

    def __init__(self) -> None:
        self._part = PLAIN
        self._waiting = ""
        self._begun = False  # whether the part has had text

    def push(self, piece: str) -> list[tuple[str, str]]:
        """The parts that one more piece of text makes sure of."""
        self._waiting += piece
        found: list[tuple[str, str]] = []
        while self._waiting:
            start = self._waiting.find("<")
            if start < 0:
                found += self._take(len(self._waiting))
                break
            found += self._take(start)
            tag = next((tag for tag in _MODES if self._waiting.startswith(tag)), None)
            if tag is not None:
                self._waiting = self._waiting[len(tag) :]
                self._part, self._begun = _MODES[tag], False
            elif any(tag.startswith(self._waiting) for tag in _MODES):
                break
            else:
                found += self._take(1)
        return found

    def end(self) -> list[tuple[str, str]]:
        """What has waited for more."""
        return self._take(len(self._waiting))

    def _take(self, count: int) -> list[tuple[str, str]]:
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        return [(self._part, text)] if text else []
