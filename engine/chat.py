"""What `infer` shows in a terminal: answers as they are written, and a dialogue about one scan."""

from collections.abc import Callable, Sequence

from ..utils.predictions import Prediction
from ..utils.text_stream import ANSWER, PLAIN, THOUGHT, ResponseParts
from .predict import Session
from .rollout import Rollout

_HEADS = {THOUGHT: "think   ", ANSWER: "answer  ", PLAIN: "answer  "}
_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"
_HELP = "Ask about the scan. /new begins another dialogue, /help shows this; Ctrl-D or Ctrl-C ends."


class Printer:
    """Writes a response as it comes, its thought and its answer each on a line of its own.

    Args:
        write: takes text, without adding a line end.
        dim: set the thought apart in grey, for a terminal.
    """

    def __init__(self, write: Callable[[str], object], *, dim: bool = False):
        self._write, self._dim = write, dim
        self._parts, self._line, self._answered = ResponseParts(), "", False

    def __call__(self, piece: str) -> None:
        """One more piece of the response."""
        self._show(self._parts.push(piece))

    def end(self, boxes: Sequence[Sequence[float]] = ()) -> None:
        """The response is whole: finish its line, then its boxes."""
        self._show(self._parts.end())
        self._close()
        if not self._answered:
            self._write(_HEADS[ANSWER] + "\n")
        for box in boxes:
            self._write("box     " + ", ".join(f"{number:.2f}" for number in box) + "\n")
        self._parts, self._answered = ResponseParts(), False

    def _show(self, parts: Sequence[tuple[str, str]]) -> None:
        for part, text in parts:
            if _HEADS[part] != self._line:
                self._close()
                self._line = _HEADS[part]
                self._answered = self._answered or part != THOUGHT
                self._write((_DIM if self._dim and part == THOUGHT else "") + self._line)
            self._write(text)

    def _close(self) -> None:
        if self._line:
            self._write((_NORMAL if self._dim and self._line == _HEADS[THOUGHT] else "") + "\n")
        self._line = ""


def chat(
    session: Session,
    read: Callable[[str], str],
    write: Callable[[str], object],
    *,
    dim: bool = False,
    on_answer: Callable[[Prediction, Rollout], object] = lambda *_: None,
) -> int:
    """A dialogue about one scan until the user ends it; the number of answers.

    Args:
        read: shows a prompt and gives a line, as `input`; EOFError and KeyboardInterrupt end the dialogue, also in
            the middle of an answer, which is then not kept.
        on_answer: called with each whole answer.
    """
    printer, count = Printer(write, dim=dim), 0
    write(_HELP + "\n")
    try:
        while True:
            line = read("you     ").strip()
            if line == "/new":
                session.forget()
                write("A new dialogue.\n")
            elif line.startswith("/"):
                write(_HELP + "\n")
            elif line:
                prediction, rollout = session.reply(line, printer)
                printer.end(prediction.boxes)
                on_answer(prediction, rollout)
                count += 1
    except (EOFError, KeyboardInterrupt):
        write((_NORMAL if dim else "") + "\n")
    return count
