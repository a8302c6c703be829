"""Nr3D: `annotations/nr3d.csv`, one file for all splits; a row belongs to the split of its scan.

Columns used: assignmentid, stimulus_id ("scene-label-n-target-distractors"), scan_id, target_id, instance_type,
utterance, tokens, mentions_target_class. As in referit3d, utterances that do not mention the class are left out.
"""

import ast
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...utils.text import format_box
from ..scannet import read_split
from ..scene import Sample
from .common import Benchmark, Index, Inputs, boxes_of, scene_of, target_box
from .problems import Report
from .rows import Row, annotation_file, first_time, read_csv, shown

FILE = "nr3d.csv"

VIEW_WORDS = frozenset(
    ("front", "behind", "back", "right", "left", "facing", "leftmost", "rightmost", "looking", "across")
)
EASY_OBJECTS = 2  # at most so many objects of the class, the target included
COLUMNS = (
    "assignmentid",
    "stimulus_id",
    "scan_id",
    "target_id",
    "instance_type",
    "utterance",
    "tokens",
    "mentions_target_class",
)
_STIMULUS = re.compile(
    r"(?P<scene>[^-]+)-(?P<label>.+?)-(?P<count>[0-9]{1,9})-(?P<target>[0-9]{1,9})(?P<others>(?:-[0-9]{1,9})*)"
)
_MAX_STIMULUS = 1_000  # characters; the pattern takes quadratic time
_MAX_TOKENS = 20_000
_TEXT = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
_TOKENS = re.compile(rf"\[\s*(?:{_TEXT}\s*(?:,\s*{_TEXT}\s*)*)?\]")


@dataclass(frozen=True)
class Stimulus:
    """A stimulus_id taken apart: `count` objects of one class, the target among them."""

    scene_id: str
    label: str
    count: int
    target_id: int
    distractor_ids: list[int]


def parse_stimulus(text: str) -> Stimulus:
    """Take a stimulus_id apart; ValueError where it is not one."""
    match = _STIMULUS.fullmatch(text) if len(text) <= _MAX_STIMULUS else None
    if match is None:
        raise ValueError(f"stimulus_id {shown(text)!r} is not of the form scene-label-n-target-distractors.")
    distractors = [int(number) for number in match["others"].split("-") if number]
    count = int(match["count"])
    if count != len(distractors) + 1:
        raise ValueError(f"stimulus_id {shown(text)!r} says {count} objects and names {len(distractors) + 1}.")
    return Stimulus(match["scene"], match["label"].replace("_", " "), count, int(match["target"]), distractors)


def read_nr3d(root: Path, report: Report) -> Iterator[Row]:
    """Rows of nr3d.csv."""
    return read_csv(annotation_file(root, FILE), COLUMNS, report)


def tokens_of(row: Row) -> list[str]:
    """The utterance's tokens, a list of texts in Python's syntax."""
    text = row.text("tokens")
    try:
        # the pattern first: literal_eval alone is slow or overflows on what is nested deep
        if len(text) > _MAX_TOKENS or not _TOKENS.fullmatch(text):
            raise ValueError
        tokens = ast.literal_eval(text)
        " ".join(tokens).encode()  # an escape may name half a character
    except (ValueError, SyntaxError):
        raise row.bad("tokens", "'tokens' is not a list of texts in Python's syntax; use the official file.") from None
    return tokens


def _mentions_class(row: Row) -> bool:
    value = row.text("mentions_target_class").lower()
    if value not in ("true", "false"):
        raise row.bad(
            "mentions_target_class",
            f"'mentions_target_class' is {shown(value)!r}, not True or False; use the official file.",
        )
    return value == "true"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Grounding samples of one split; question_type is `easy` or `hard`.

    Meta: view_dependent, target_object_id, distractor_ids, distractor_boxes (those that have one), instance_type,
    num_tokens, and `multiple` (another object of the class is there).
    """
    scene_ids = set(read_split(root, split))
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> Sample | None:
        scene_id = row.text("scan_id")
        if scene_id not in scene_ids or not _mentions_class(row):
            return None
        assignment_id = row.name("assignmentid")
        first_time(seen, assignment_id, row, "assignmentid")
        info, object_id = scene_of(index, scene_id, row), row.integer("target_id")
        boxes_K7 = target_box(info, object_id, row)
        try:
            stimulus = parse_stimulus(row.text("stimulus_id"))
        except ValueError as error:
            raise row.bad("stimulus_id", f"{error}") from None
        name, tokens = row.text("instance_type").replace("_", " "), tokens_of(row)
        return Sample(
            sample_id=f"nr3d-{assignment_id}",
            task="grounding",
            dataset="nr3d",
            scene_id=scene_id,
            question=row.filled("utterance"),
            answer=f"{name} {format_box(info.to_model(boxes_K7)[0].tolist())}",
            references=[name],
            target_object_ids=[object_id],
            target_boxes_K7=boxes_K7,
            question_type="easy" if stimulus.count <= EASY_OBJECTS else "hard",
            meta={
                "view_dependent": not VIEW_WORDS.isdisjoint(tokens),
                "target_object_id": object_id,
                "distractor_ids": stimulus.distractor_ids,
                "distractor_boxes": boxes_of(info, stimulus.distractor_ids, row).tolist(),
                "instance_type": name,
                "num_tokens": len(tokens),
                "multiple": stimulus.count > 1,
            },
        )

    return report.keep(read_nr3d(root, report), read)


def at_most_tokens(samples: Iterable[Sample], limit: int = 24) -> list[Sample]:
    """Nr3D samples of up to `limit` tokens, which some papers evaluate alone; never applied on reading.

    The default is what referit3d is said to use, not verified against its code.
    """
    return [sample for sample in samples if sample.meta["num_tokens"] <= limit]


BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{FILE}", f"scannetv2_{split}.txt")))
