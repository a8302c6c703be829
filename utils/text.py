"""The answer grammar, in one place: prompts, rewards, metrics and the viewer all read and write it here.

A well-formed response is exactly one `<think>…</think>` followed by exactly one `<answer>…</answer>`, and nothing
else but white space. An answer points at things in two ways, both resolved to boxes by `resolve_boxes`:

- `<obj12>`: the name of detected proposal 12 (its name stands beside its scene token in the prompt);
- `<box>x, y, z, dx, dy, dz</box>`: centre and size in metres, model frame (see `datasets.scene.Scene.origin_3`),
  two decimals, with an optional seventh number, the heading in radians, counter-clockwise seen from above.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TAG = re.compile(r"</?(?:think|answer)>")
_LAYOUT = ["<think>", "</think>", "<answer>", "</answer>"]
# bounded, and with one way only to match a text: longer runs of digits made the search quadratic
_NUMBER = r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_BOX = re.compile(rf"<box>\s*({_NUMBER}(?:\s*,\s*{_NUMBER}){{5,6}})\s*</box>")
_SPACED_BOX = re.compile(rf"( ?){_BOX.pattern}")
_NAME = re.compile(r"<obj(\d{1,4})>")
_POINTER = re.compile(rf"{_BOX.pattern}|{_NAME.pattern}")
_SPACED_STOP = re.compile(r" ([.,;:?!])")


@dataclass(frozen=True)
class Response:
    """A model's response taken apart. `well_formed` is the strict reading; `think` and `answer` the lenient one."""

    think: str
    answer: str
    well_formed: bool


def parse_response(text: str) -> Response:
    """Take a response apart.

    A response that is not well formed still yields the best reading of its answer, so that evaluation does not
    punish format twice: the text after the last `<answer>`, or else all text outside the thought.
    """
    tags = list(itertools.islice(_TAG.finditer(text), len(_LAYOUT) + 1))
    if [tag[0] for tag in tags] == _LAYOUT:
        edges = [0, *(edge for tag in tags for edge in tag.span()), len(text)]
        before, think, between, answer, after = (text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
        if not (before + between + after).strip():
            return Response(think.strip(), answer.strip(), True)
    think = text.partition("<think>")[2].partition("</think>")[0].strip()
    answer = text.rpartition("<answer>")[2] if "<answer>" in text else _outside_thoughts(text)
    return Response(think, _TAG.sub("", answer.partition("</answer>")[0]).strip(), False)


def _outside_thoughts(text: str) -> str:
    """A text without what stands between `<think>` and the next `</think>`, or the end."""
    before, *thoughts = text.split("<think>")
    return before + "".join(thought.partition("</think>")[2] for thought in thoughts)


def format_response(think: str, answer: str) -> str:
    """The well-formed response made of a thought and an answer."""
    return f"<think>{think}</think><answer>{answer}</answer>"


def format_box(box: Sequence[float]) -> str:
    """Write one box (cx, cy, cz, dx, dy, dz[, heading]) in metres; a heading below half a degree is left out."""
    numbers = list(box[:6])
    if len(box) > 6 and abs(box[6]) >= math.radians(0.5):
        numbers.append(box[6])
    # "+ 0.0" after rounding turns -0.0 into 0.0
    return "<box>" + ", ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in numbers) + "</box>"


def format_name(index: int) -> str:
    """The name of proposal `index`, as it stands in prompts and answers."""
    return f"<obj{index}>"


def is_name(text: str) -> bool:
    """Whether a text is the name of a proposal and nothing else."""
    return _NAME.fullmatch(text) is not None


def parse_box(numbers: str) -> list[float]:
    """Numbers of one `<box>` as 7 floats."""
    return list(_parsed(numbers))


@functools.lru_cache(maxsize=1 << 16)  # training reads the boxes of its scenes over and over
def _parsed(numbers: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in numbers.split(","))
    return values + (0.0,) * (7 - len(values))


def find_pointers(text: str) -> list[int | list[float]]:
    """All pointers of a text in order: an int for `<obj12>`, 7 floats for `<box>…</box>`."""
    return [
        int(match.group(2)) if match.group(2) is not None else parse_box(match.group(1))
        for match in _POINTER.finditer(text)
    ]


def find_boxes(text: str) -> list[list[float]]:
    """All `<box>…</box>` of a text in order, as 7 floats each; names are passed over."""
    return [parse_box(match[1]) for match in _BOX.finditer(text)]


def resolve_boxes(text: str, proposals: Sequence[Sequence[float]]) -> list[list[float]]:
    """Boxes a text points at, in order and without repeats, in the frame of `proposals` (model frame).

    Names of proposals that do not exist and boxes without positive finite sizes are left out.
    """
    boxes: dict[tuple[float, ...], list[float]] = {}
    for pointer in find_pointers(text):
        if isinstance(pointer, int):
            if pointer >= len(proposals):
                continue
            box = [float(value) for value in proposals[pointer]]
        else:
            box = pointer
        if all(map(math.isfinite, box)) and min(box[3:6]) > 0:
            boxes.setdefault(tuple(box), box)
    return list(boxes.values())


def named_boxes(text: str, proposals: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """The box of each proposal that a text names, by its name (`format_name`); names of none are left out."""
    said = dict.fromkeys(pointer for pointer in find_pointers(text) if isinstance(pointer, int))
    known = [index for index in said if index < len(proposals)]
    return {format_name(index): [float(value) for value in proposals[index]] for index in known}


def replace_boxes(text: str, replace: Callable[[list[float]], str]) -> str:
    """Rewrite every `<box>…</box>` of a text, for instance to the name of the proposal that covers it.

    One that becomes nothing takes the space before it along.
    """

    def rewrite(match: re.Match[str]) -> str:
        written = replace(parse_box(match[2]))
        return match[1] + written if written else ""

    return _SPACED_BOX.sub(rewrite, text)


def split_at_boxes(text: str) -> tuple[list[str], list[str]]:
    """What stands between the `<box>…</box>` of a text, one piece more than there are boxes, and these as written."""
    return _BOX.sub("\0", text).split("\0"), [match[0] for match in _BOX.finditer(text)]


def strip_pointers(text: str) -> str:
    """The words of an answer: pointers removed, white space folded. This is what the text metrics score."""
    return _SPACED_STOP.sub(r"\1", " ".join(_POINTER.sub(" ", text).split()))
