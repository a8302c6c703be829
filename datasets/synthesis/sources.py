"""Where Scene-30K's questions come from: the training questions of ScanQA, ScanRefer, Nr3D and SceneVerse.

3D-LLM's scene descriptions are a source too, which has to be named: by default they describe scenes to the teacher.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..scannet import read_split
from ..scene import Sample
from ..scene_store import SceneInfo, SceneStore
from ..tasks import load_samples
from ..tasks.scene30k import held_out_scenes
from .sceneverse import FOLDER, load_sceneverse, sceneverse_files
from .wording import names_target

DEFAULT_SOURCES = ("scanqa", "scanrefer", "nr3d", "sceneverse")
SOURCES = (*DEFAULT_SOURCES, "scene_description")
_SPEAKERS = re.compile(r"^\s*###\s*human:\s*|\s*###\s*assistant:\s*$", re.IGNORECASE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One question of an existing benchmark, with what its record and the filters need. Boxes: model frame, metres."""

    question_id: str
    source: str
    scene_id: str
    task: str  # qa, grounding or scene_description
    text: str
    object_ids: tuple[int, ...]
    target_names: tuple[str, ...]  # what the last step of a thought may call the target
    gold_answers: tuple[str, ...]
    target_boxes: tuple[tuple[float, ...], ...]


def source_files(split: str) -> dict[str, str]:
    """File below annotations/ that each source reads; for SceneVerse the folder."""
    return {
        "scanqa": f"ScanQA_v1.0_{split}.json",
        "scanrefer": f"ScanRefer_filtered_{split}.json",
        "nr3d": "nr3d.csv",
        "sceneverse": f"{FOLDER}/",
        "scene_description": f"3d_llm_scene_description_{split}.json",
    }


def present_sources(root: str | Path, split: str, wanted: Sequence[str] = ()) -> list[str]:
    """The sources to read: those `wanted`, which must be there, or those of DEFAULT_SOURCES that are.

    Raises:
        ValueError: an unknown source, a wanted one whose file is absent, or none at all.
    """
    files, folder = source_files(split), Path(root) / "annotations"
    for name in wanted:
        if name not in files:
            raise ValueError(f"Unknown source {name!r}; there are {', '.join(SOURCES)}.")
    there = {name: (folder / file).is_file() for name, file in files.items()}
    there["sceneverse"] = bool(sceneverse_files(root))
    for name in wanted:
        if not there[name]:
            raise ValueError(f"The source {name} needs {folder / files[name]}; put it there, or name other sources.")
    if wanted:
        return list(dict.fromkeys(wanted))
    present = [name for name in DEFAULT_SOURCES if there[name]]
    if not present:
        raise ValueError(
            f"There are no questions in {folder}; put {', '.join(files[name] for name in DEFAULT_SOURCES)} there, "
            "one of them or several (data/README.md)."
        )
    # SceneVerse is a choice of the user's own, not a file that is missing
    absent = sorted({*DEFAULT_SOURCES} - {"sceneverse", *present})
    if absent:
        _log.warning("Not asked, as their files are absent: %s.", ", ".join(absent))
    return present


def check_training_scenes(root: str | Path, split: str, scene_ids: Sequence[str]) -> None:
    """Refuse what is not training data: a split or a scene that evaluation is measured on.

    Raises:
        ValueError: the split is val or test, or a scene is held out or not in the split's list.
    """
    if split in ("val", "test"):
        raise ValueError(
            f"Scene-30K is training data, so the split {split!r} is refused; leave --split out, or name a list of "
            "training scenes."
        )
    held_out, listed = held_out_scenes(root), set(read_split(root, split))
    for scene_id in sorted({*scene_ids, *listed}):
        if scene_id in held_out:
            raise ValueError(
                f"Scene {scene_id} belongs to the validation or test split and must not be trained on; take it out "
                f"of scannetv2_{split}.txt and of the questions."
            )
        if scene_id not in listed:
            raise ValueError(
                f"A question is about scene {scene_id}, which scannetv2_{split}.txt does not list; add it there, or "
                "take its questions out."
            )


def to_question(sample: Sample, info: SceneInfo) -> Question:
    """What the engine needs of a sample."""
    rows = [row for object_id in sample.target_object_ids if (row := info.row_of(object_id)) is not None]
    names = [info.object_labels[row] for row in rows]
    names += [str(name) for name in sample.meta.get("object_names", [])]
    names += [str(sample.meta[key]) for key in ("object_name", "instance_type") if key in sample.meta]
    if sample.task == "qa":
        names += sample.references
    elif sample.task == "scene_description":
        told = " ".join(sample.references)
        names += [label for label in dict.fromkeys(info.object_labels) if names_target(told, [label])]
    boxes_K7 = info.to_model(sample.target_boxes_K7)
    return Question(
        question_id=f"{sample.dataset}-{sample.sample_id.removeprefix(sample.dataset + '-')}",
        source=sample.dataset,
        scene_id=sample.scene_id,
        task=sample.task,
        text=_SPEAKERS.sub("", sample.question).strip(),
        object_ids=tuple(sample.target_object_ids),
        target_names=tuple(dict.fromkeys(name.replace("_", " ").strip().lower() for name in names)),
        gold_answers=tuple(sample.references),
        target_boxes=tuple(tuple(float(value) for value in box_7) for box_7 in boxes_K7),
    )


def load_questions(
    root: str | Path, store: SceneStore, *, split: str, seed: int, limit: int, sources: Sequence[str] = ()
) -> tuple[list[Question], Counter[str]]:
    """Training questions in an order drawn from `seed`, the first `limit` of them (0: all), and what was left out.

    A question that another one repeats word by word about the same scene is asked once, any of their answers being
    right, unless they point at different targets, which makes them two ambiguous questions that are both left out.

    Args:
        sources: names out of SOURCES; empty for those of DEFAULT_SOURCES that are there.

    Raises:
        ValueError: no source file, a broken one, or a question about a scene that is not a training scene.
    """
    check_training_scenes(root, split, [])
    left_out: Counter[str] = Counter()
    names = present_sources(root, split, sources)
    samples = load_samples(root, split, [name for name in names if name != "sceneverse"], scenes=store)
    if "sceneverse" in names:
        samples += load_sceneverse(root, split, store.index, left_out)
    check_training_scenes(root, split, [sample.scene_id for sample in samples])
    questions = _unambiguous([to_question(sample, store.index[sample.scene_id]) for sample in samples], left_out)
    if not questions:
        raise ValueError(f"The question files of split {split!r} below {root} hold no question; check them.")
    # by hash and not by position, so that a question added to a file does not move the others
    salt = str(np.random.default_rng(seed).integers(2**63)).encode()
    questions.sort(key=lambda question: hashlib.sha256(salt + question.question_id.encode()).digest())
    return questions[: limit or None], +left_out


def _unambiguous(questions: Sequence[Question], left_out: Counter[str]) -> list[Question]:
    """Each text about a scene once, with every answer it was given; those that mean different things are left out."""
    groups: dict[tuple[str, str, str], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.scene_id, question.task, question.text.lower()), []).append(question)
    kept = []
    for group in groups.values():
        if len({frozenset(question.object_ids) for question in group}) > 1:
            left_out["ambiguous"] += len(group)
            continue
        left_out["repeated"] += len(group) - 1
        answers = dict.fromkeys(answer for question in group for answer in question.gold_answers)
        names = dict.fromkeys(name for question in group for name in question.target_names)
        kept.append(replace(group[0], gold_answers=tuple(answers), target_names=tuple(names)))
    return kept
