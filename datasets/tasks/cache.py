"""Samples read once and kept: `prepared/annotations/<dataset>-<split>.npz`, an index of a data set's annotations.

What is kept depends on every file that the reader reads (size and time), on the scenes' index (its content) and on the
readers' own code; where one of them differs, the annotations are read anew. Text is JSON, numbers are plain arrays.

Shapes: S samples, M boxes of all samples, Q samples with a query box, P samples with a pose.
"""

import functools
import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ...utils.files import write_whole
from ..scene import Sample
from ..scene_store import SceneStore, as_index
from .common import Benchmark, Index, Scenes
from .problems import Problem, Report

FOLDER = "annotations"
_COLUMNS = (
    "sample_id",
    "task",
    "dataset",
    "scene_id",
    "question",
    "answer",
    "think",
    "target_object_ids",
    "situation",
    "question_type",
    "meta",
)
_log = logging.getLogger(__name__)


def read_samples(
    benchmark: Benchmark, name: str, root: Path, split: str, scenes: Scenes, *, strict: bool
) -> tuple[list[Sample], Report]:
    """Samples of one data set and split with what was left out, from the cache where it is current.

    The cache lies beside the prepared scenes, so only annotations of a SceneStore are kept.

    Args:
        strict: the caller refuses data with problems; a refused command writes nothing.
    """
    index = as_index(scenes)
    if not isinstance(scenes, SceneStore):
        return _read(benchmark, name, root, split, index)
    path = scenes.prepared_dir / FOLDER / f"{name}-{split}.npz"
    # before reading: a file that changes meanwhile makes the cache old, not wrong
    key = _key(benchmark, root, split, index)
    kept = _load(path, key, Report(name, split)) if path.exists() else None
    if kept is not None:
        return kept
    samples, report = _read(benchmark, name, root, split, index)
    if samples and not (strict and report.problems):
        _save(path, key, samples, report)
    return samples, report


def _read(benchmark: Benchmark, name: str, root: Path, split: str, index: Index) -> tuple[list[Sample], Report]:
    report = Report(name, split)
    return benchmark.load(root, split, index, report), report


def _key(benchmark: Benchmark, root: Path, split: str, index: Index) -> dict[str, Any]:
    stamps: dict[str, list[int] | None] = {}
    for name in benchmark.inputs(split).all:
        try:
            status = (root / name).stat()
            stamps[name] = [status.st_size, status.st_mtime_ns]
        except FileNotFoundError:
            stamps[name] = None
    return {"code": code_hash(), "root": str(root.resolve()), "inputs": stamps, "scenes": _digest(index)}


@functools.cache
def code_hash() -> str:
    """Hash of the source of all readers, and of the text and labels that they build on: other code, other samples."""
    package = Path(__file__).resolve().parents[2]
    files = [*(package / "datasets").rglob("*.py"), package / "utils" / "text.py", package / "utils" / "labels.py"]
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return content.hexdigest()


def _digest(index: Index) -> str:
    """Hash of all that annotations may take from the scenes."""
    content = orjson.dumps([index[scene_id] for scene_id in sorted(index)], default=_plain, option=_NUMPY)
    return hashlib.sha256(content).hexdigest()


def _plain(value: Any) -> Any:
    # frozen sets, and arrays whose memory order orjson does not take
    return value.tolist() if isinstance(value, np.ndarray) else sorted(value)


_NUMPY = orjson.OPT_SERIALIZE_NUMPY


def _save(path: Path, key: dict[str, Any], samples: Sequence[Sample], report: Report) -> None:
    """Write a cache file whole or not at all; one that cannot be written is a warning."""
    queries = [(row, sample.query_box_7) for row, sample in enumerate(samples) if sample.query_box_7 is not None]
    poses = [
        (row, sample.situation_pose_7) for row, sample in enumerate(samples) if sample.situation_pose_7 is not None
    ]
    # samples about one object share its list of references; kept once each, they cannot grow with its square
    shared = {id(sample.references): sample.references for sample in samples}
    numbers = {key: number for number, key in enumerate(shared)}
    header = {
        "key": key,
        "references": list(shared.values()),
        "columns": {name: [getattr(sample, name) for sample in samples] for name in _COLUMNS},
        "problems": report.problems,
        "notes": report.notes,
    }
    boxes = [sample.target_boxes_K7 for sample in samples]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.frombuffer(orjson.dumps(header, option=_NUMPY), dtype=np.uint8),
        reference_rows_S=np.array([numbers[id(sample.references)] for sample in samples], np.int64),
        counts_S=np.array([len(one) for one in boxes], np.int64),
        boxes_M7=np.concatenate([np.zeros((0, 7), np.float32), *boxes]),
        query_rows_Q=np.array([row for row, _ in queries], np.int64),
        queries_Q7=np.array([box_7 for _, box_7 in queries], np.float32).reshape(-1, 7),
        pose_rows_P=np.array([row for row, _ in poses], np.int64),
        poses_P7=np.array([pose_7 for _, pose_7 in poses], np.float64).reshape(-1, 7),
    )
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, buffer.getbuffer())
    except OSError as error:
        _log.warning("%s cannot be written (%s): these annotations are read anew at each start.", path, error.strerror)


def _load(path: Path, key: dict[str, Any], report: Report) -> tuple[list[Sample], Report] | None:
    """Content of a cache file; None where it is of another key or broken."""
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = orjson.loads(arrays.pop("header").tobytes())
        if header["key"] != key:
            return None
        report.problems = [Problem(**problem) for problem in header["problems"]]
        report.notes = header["notes"]
        return _unpack(header["columns"], header["references"], arrays), report
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        _log.warning("%s is not readable (%s) and is written anew.", path, error)
        return None


def _unpack(columns: dict[str, list[Any]], references: list[list[str]], arrays: dict[str, np.ndarray]) -> list[Sample]:
    ends_S = np.cumsum(arrays["counts_S"])
    boxes = np.split(arrays["boxes_M7"], ends_S[:-1]) if len(ends_S) else []
    own = [references[number] for number in arrays["reference_rows_S"].tolist()]
    samples = [
        Sample(**dict(zip(_COLUMNS, row, strict=True)), references=texts, target_boxes_K7=boxes_K7)
        for *row, texts, boxes_K7 in zip(*(columns[name] for name in _COLUMNS), own, boxes, strict=True)
    ]
    for row, box_7 in zip(arrays["query_rows_Q"].tolist(), arrays["queries_Q7"], strict=True):
        samples[row].query_box_7 = box_7
    for row, pose_7 in zip(arrays["pose_rows_P"].tolist(), arrays["poses_P7"], strict=True):
        samples[row].situation_pose_7 = pose_7
    return samples
