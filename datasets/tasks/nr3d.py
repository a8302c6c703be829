"""Nr3D: `annotations/nr3d.csv`, one file for all splits; a row belongs to the split of its scan.

Columns used: assignmentid, stimulus_id ("scene-label-n-target-distractors"), scan_id, target_id, instance_type,
utterance, tokens, mentions_target_class. As in referit3d, utterances that do not mention the class are left out.
"""

import ast
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...utils.text import format_box
from ..scannet import read_split
from ..scene import Sample
from ..scene_store import as_index
from .common import Row, Scenes, annotation_file, boxes_of, scene_of

VIEW_WORDS = frozenset(
    ("front", "behind", "back", "right", "left", "facing", "leftmost", "rightmost", "looking", "across")
)
EASY_OBJECTS = 2  # at most so many objects of the class, the target included
_COLUMNS = ("assignmentid", "stimulus_id", "scan_id", "target_id", "instance_type", "utterance", "tokens")
_STIMULUS = re.compile(r"(?P<scene>[^-]+)-(?P<label>.+?)-(?P<count>\d+)-(?P<target>\d+)(?P<others>(?:-\d+)*)")


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
    match = _STIMULUS.fullmatch(text)
    if match is None:
        raise ValueError(f"stimulus_id {text!r} is not of the form scene-label-n-target-distractors.")
    distractors = [int(number) for number in match["others"].split("-") if number]
    label = match["label"].replace("_", " ")
    return Stimulus(match["scene"], label, int(match["count"]), int(match["target"]), distractors)


def _read(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        try:
            missing = [name for name in (*_COLUMNS, "mentions_target_class") if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the column {missing[0]!r}; use the official nr3d.csv.")
            for number, record in enumerate(reader, 1):
                yield Row(path, number, record)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a whole CSV file ({error}); copy it again from its source.") from None


def _tokens(row: Row) -> list[str]:
    try:
        tokens = ast.literal_eval(row.text("tokens"))
    except (ValueError, SyntaxError):
        raise ValueError(
            f"{row.place}: 'tokens' is not a list in Python's syntax; use the official nr3d.csv."
        ) from None
    return [str(token) for token in tokens]


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Grounding samples of one split; question_type is `easy` or `hard`.

    Meta: view_dependent, distractor_ids, instance_type, and `multiple` (another object of the class is there).
    """
    index = as_index(scenes)
    scene_ids = set(read_split(root, split))
    samples = []
    for row in _read(annotation_file(root, "nr3d.csv")):
        scene_id = row.text("scan_id")
        if scene_id not in scene_ids or row.text("mentions_target_class").lower() != "true":
            continue
        info, object_id = scene_of(index, scene_id, row), row.integer("target_id")
        boxes_K7 = boxes_of(info, [object_id], row)
        if len(boxes_K7) == 0:
            raise ValueError(f"{row.place} describes object {object_id}, a wall, floor or ceiling without a box.")
        try:
            stimulus = parse_stimulus(row.text("stimulus_id"))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        name = row.text("instance_type").replace("_", " ")
        samples.append(
            Sample(
                sample_id=f"nr3d-{row.text('assignmentid')}",
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
                    "view_dependent": not VIEW_WORDS.isdisjoint(_tokens(row)),
                    "distractor_ids": stimulus.distractor_ids,
                    "instance_type": name,
                    "multiple": stimulus.count > 1,
                },
            )
        )
    return samples
