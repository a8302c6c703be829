"""Annotation files of generated rooms, in the official schemas of the benchmarks.

`write_annotations(root, {"train": rooms, "val": rooms}, seed)` writes root/annotations/: ScanRefer, Nr3D (csv),
ScanQA, SQA3D, 3D-LLM's dialogue, planning and scene description, Scene-30K (train rooms only) with its scene captions,
and the objects' colours, for inventories. Everything follows from the rooms and the seed. `ANNOTATION_VERSION` changes
whenever the questions or their answers would.
"""

import gc
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .activities import describe_room, dialogue_questions, planning_questions
from .balance import choose, thin, trim
from .chain_of_thought import grounding_record, question_record
from .grounding import Chooser, Picked, Utterance, nr3d_utterances, scanrefer_utterances, short_enough
from .questions import Describer, Question, hidden_descriptions, room_questions
from .relations import RoomFacts
from .room import Room
from .schemas import (
    NR3D_COLUMNS,
    nr3d_rows,
    scanqa_records,
    scanrefer_records,
    sqa3d_file,
    sqa3d_records,
    text_records,
    write_csv,
    write_json,
    write_jsonl,
)
from .situated import situated_questions

ANNOTATION_VERSION = "annotations-5"
SPLITS = ("train", "val")

# Questions a room, at most; what cannot be asked truthfully, unambiguously and in balance is left out.
PER_ROOM = {"scanrefer": 10, "nr3d": 8, "qa": 12, "situated_qa": 10, "dialogue": 2, "planning": 3}
SCENE30K_PER_ROOM = {"scanrefer": 4, "nr3d": 4, "qa": 5, "situated_qa": 3, "dialogue": 2, "planning": 3}

# What can be said of an object takes a megabyte a room, so not of all rooms at once.
_TOGETHER = 256

Map = Callable[..., Iterable[Any]]  # as the built-in `map`, or spread over processes

_SQA3D_FIRST_ID = {"train": 220602000000, "val": 220603000000}


@dataclass
class _Split:
    """Everything asked about the rooms of one split, by scene_id where it belongs to a room."""

    facts: dict[str, RoomFacts] = field(default_factory=dict)
    scanrefer: dict[str, list[Utterance]] = field(default_factory=dict)
    nr3d: dict[str, list[Utterance]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    questions: dict[str, list[Question]] = field(default_factory=dict)  # by task


@dataclass
class _Known:
    """What can be said of the objects of a room."""

    facts: RoomFacts
    descriptions: Describer
    short: Describer


@dataclass
class _Asked:
    """What is said and may be asked of a room."""

    scanrefer: list[Utterance]
    nr3d: list[Utterance]
    description: str
    pools: dict[str, list[Question]]  # by task


def write_annotations(
    root: Path, rooms_by_split: dict[str, list[Room]], seed: int, spread: Map = map
) -> dict[str, Any]:
    """Write all annotation files of the rooms under root/annotations/ and say what was written.

    Args:
        root: the data folder.
        rooms_by_split: "train" and "val" rooms; they need boxes, visible_share and either vertices or floor_centre_3,
            but no faces.
        seed: chooses questions and wordings.
        spread: how work on single rooms is done: `map`, or that of a pool of processes. It changes nothing but time.

    Returns:
        {"version": ..., "counts": {file name: number of records}, "question_types": {split: {type: number}}}.

    Raises:
        ValueError: unknown or overlapping splits, a room without visibility or vertices.
    """
    _check_splits(rooms_by_split)
    with _without_collection():
        return _write_all(Path(root) / "annotations", rooms_by_split, seed, spread)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for cycles: of millions of records that all stay, it takes more than half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _write_all(folder: Path, rooms_by_split: dict[str, list[Room]], seed: int, spread: Map) -> dict[str, Any]:
    counts: dict[str, int] = {}
    types: dict[str, dict[str, int]] = {}
    nr3d: list[dict[str, Any]] = []
    for number, name in enumerate(SPLITS):
        split = _annotate(rooms_by_split.get(name, []), seed, number, spread)
        counts |= _write_split(folder, name, split)
        for scene_id, facts in split.facts.items():
            nr3d += nr3d_rows(facts, split.nr3d[scene_id], len(nr3d))
        asked = [question for questions in split.questions.values() for question in questions]
        types[name] = dict(sorted(Counter(question.question_type for question in asked).items()))
        if name == "train":
            counts |= _write_scene30k(folder, split, np.random.default_rng([seed, 2]))
    write_csv(folder / "nr3d.csv", nr3d, NR3D_COLUMNS)
    rooms = [room for its in rooms_by_split.values() for room in its]
    colors = {room.scene_id: {str(thing.object_id): thing.color for thing in room.objects} for room in rooms}
    write_json(folder / "object_colors.json", colors)
    counts |= {"nr3d.csv": len(nr3d), "object_colors.json": len(colors)}
    return {"version": ANNOTATION_VERSION, "counts": counts, "question_types": types}


def _check_splits(rooms_by_split: dict[str, list[Room]]) -> None:
    unknown = sorted(set(rooms_by_split) - set(SPLITS))
    if unknown:
        raise ValueError(f"Unknown split {unknown[0]!r}; annotations are written for {' and '.join(SPLITS)}.")
    names = Counter(room.scene_id for rooms in rooms_by_split.values() for room in rooms)
    seeds = Counter(room.seed for rooms in rooms_by_split.values() for room in rooms)
    for what, counter in (("scene_id", names), ("seed", seeds)):
        repeated = [value for value, count in counter.items() if count > 1]
        if repeated:
            raise ValueError(f"Two rooms have the {what} {repeated[0]}; train and val rooms must all differ.")


def _annotate(rooms: Sequence[Room], seed: int, number: int, spread: Map) -> _Split:
    """Ask everything about the rooms of split `number`: per room first, then chosen over the whole split."""
    split = _Split()
    rng = np.random.default_rng([seed, number])
    chooser, nr3d_chooser = Chooser(rng), Chooser(rng)
    pools: dict[str, dict[str, list[Question]]] = {task: {} for task in ("qa", "situated_qa", "dialogue", "planning")}
    with tqdm(total=len(rooms), desc=f"annotate {SPLITS[number]}", unit="room", delay=3) as bar:
        for start in range(0, len(rooms), _TOGETHER):
            knowing: list[_Known] = []
            picked: list[list[Picked]] = []
            picked_nr3d: list[list[Picked]] = []
            for known in spread(_know, rooms[start : start + _TOGETHER]):
                knowing.append(known)
                picked.append(chooser.choose(known.descriptions, PER_ROOM["scanrefer"]))
                picked_nr3d.append(nr3d_chooser.choose(known.short, PER_ROOM["nr3d"], fewest_distractors=1))
            for known, asked in zip(knowing, spread(partial(_ask, seed), knowing, picked, picked_nr3d), strict=True):
                scene_id = known.facts.room.scene_id
                split.facts[scene_id] = known.facts
                split.scanrefer[scene_id], split.nr3d[scene_id] = asked.scanrefer, asked.nr3d
                split.descriptions[scene_id] = asked.description
                for task, questions in asked.pools.items():
                    pools[task][scene_id] = questions
                bar.update()
    pools["qa"] = thin(pools["qa"], rng)
    for task, pool in pools.items():
        split.questions[task] = choose(pool, PER_ROOM[task], rng)
    return split


def _know(room: Room) -> _Known:
    facts = RoomFacts(room)
    descriptions = hidden_descriptions(facts)
    return _Known(facts, descriptions, short_enough(descriptions))


def _ask(seed: int, known: _Known, picked: Sequence[Picked], picked_nr3d: Sequence[Picked]) -> _Asked:
    facts, descriptions = known.facts, known.descriptions
    # A stream of its own for each room, so that its pool does not depend on the other rooms.
    own = np.random.default_rng([seed, zlib.crc32(facts.room.scene_id.encode())])
    return _Asked(
        scanrefer_utterances(facts, own, picked),
        nr3d_utterances(own, picked_nr3d),
        describe_room(facts, own),
        {
            "qa": room_questions(facts, own, descriptions),
            "situated_qa": situated_questions(facts, own),
            "dialogue": dialogue_questions(facts, own, descriptions),
            "planning": planning_questions(facts, own, descriptions),
        },
    )


def _by_room(split: _Split, task: str) -> dict[str, list[Question]]:
    grouped: dict[str, list[Question]] = {scene_id: [] for scene_id in split.facts}
    for question in split.questions[task]:
        grouped[question.scene_id].append(question)
    return grouped


def _write_split(folder: Path, name: str, split: _Split) -> dict[str, int]:
    """One split's JSON files; the number of records of each."""
    files: dict[str, list[dict[str, Any]]] = {}
    qa, situated = _by_room(split, "qa"), _by_room(split, "situated_qa")
    scanrefer, scanqa, asked, annotated = [], [], [], []
    for scene_id, facts in split.facts.items():
        scanrefer += scanrefer_records(facts, split.scanrefer[scene_id])
        scanqa += scanqa_records(facts, qa[scene_id], name)
        records = sqa3d_records(facts, situated[scene_id], _SQA3D_FIRST_ID[name] + len(asked))
        asked += records[0]
        annotated += records[1]
    files[f"ScanRefer_filtered_{name}.json"] = scanrefer
    files[f"ScanQA_v1.0_{name}.json"] = scanqa
    for task, file_name in (("dialogue", "embodied_dialogue_filtered"), ("planning", "embodied_planning_filtered")):
        files[f"3d_llm_{file_name}_{name}.json"] = text_records(split.questions[task])
    files[f"3d_llm_scene_description_{name}.json"] = [
        {"question": "### human: Describe the room. ### assistant:", "scene_id": scene_id, "answers": [text]}
        for scene_id, text in split.descriptions.items()
    ]
    for file_name, records in files.items():
        write_json(folder / file_name, records)
    counts = {file_name: len(records) for file_name, records in files.items()}
    for key, stem, records in (("questions", "questions", asked), ("annotations", "sqa_annotations", annotated)):
        file_name = f"v1_balanced_{stem}_{name}_scannetv2.json"
        write_json(folder / file_name, sqa3d_file(key, records))
        counts[file_name] = len(records)
    return counts


def _write_scene30k(folder: Path, split: _Split, rng: np.random.Generator) -> dict[str, int]:
    """Scene-30K of the train rooms: a share of the questions above, each with its thought; and scene captions."""
    picked: list[Question] = []
    for task in split.questions:
        for questions in _by_room(split, task).values():
            order = rng.permutation(len(questions))[: SCENE30K_PER_ROOM[task]]
            picked += [questions[k] for k in sorted(order)]
    of_scene: dict[str, list[Question]] = defaultdict(list)
    for question in trim(picked, rng):
        of_scene[question.scene_id].append(question)
    rows: list[dict[str, Any]] = []
    for scene_id, facts in split.facts.items():
        own: list[dict[str, Any]] = []
        for source, utterances in (("scanrefer", split.scanrefer[scene_id]), ("nr3d", split.nr3d[scene_id])):
            for k in sorted(rng.permutation(len(utterances))[: SCENE30K_PER_ROOM[source]]):
                own.append(grounding_record(facts, utterances[k].description, utterances[k].text))
        own += [question_record(facts, question) for question in of_scene[scene_id]]
        for number, record in enumerate(own):
            rows.append({"scene_id": scene_id, "question_id": f"train-{scene_id.split('_')[0]}-{number}"} | record)
    write_jsonl(folder / "Scene-30K.jsonl", rows)
    captions = {scene_id: {"captions": [text]} for scene_id, text in split.descriptions.items()}
    write_json(folder / "scene_caption.json", captions)
    return {"Scene-30K.jsonl": len(rows), "scene_caption.json": len(captions)}
