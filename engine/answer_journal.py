"""What an evaluation has answered so far, on disk, so that a run that was killed goes on where it was.

Questions are answered in blocks, and a block is on disk as a whole or not at all. Which questions are in a block, and
how they are batched in it, is a matter of the questions alone: so answers are the same however often a run was
interrupted and on however many GPUs, to the bit where the hardware gives the same for the same batch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..utils.files import read_log
from ..utils.predictions import Prediction

FOLDER = "answers"


def fingerprint(*facts: Any) -> str:
    """Hash of what answers depend on, anything that JSON takes."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def model_facts(folder: Path) -> list[list[Any]]:
    """Which files a model has: names, sizes, times of the last change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return [[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


class AnswerJournal:
    """Answers of one evaluation, in `<run>/answers`.

    Every process of every life of the run has a file of its own, whose first line says what its answers depend on;
    files of another model, other questions or other settings are left aside.

    Args:
        key: what `fingerprint` gave.
    """

    def __init__(self, run_dir: Path, key: str, rank: int = 0):
        self.folder = run_dir / FOLDER
        self.key = key
        self.done: dict[tuple[str, int], list[Prediction]] = {}
        self.stale = 0  # files of something else
        files = sorted(self.folder.glob("*.jsonl"))
        for file in files:
            head, *rows = read_log(file) or [{}]
            if head.get("key") != key:
                self.stale += 1
                continue
            for row in rows:
                self.done[row["dataset"], row["block"]] = [Prediction(**entry) for entry in row["predictions"]]
        numbers = [int(file.stem.split("-")[0]) for file in files]
        self._path = self.folder / f"{max(numbers, default=-1) + 1:04d}-{rank}.jsonl"

    def add(self, dataset: str, block: int, predictions: Sequence[Prediction]) -> None:
        """Write a block's answers and wait until they are on the disk."""
        self.done[dataset, block] = list(predictions)
        rows: list[dict[str, Any]] = []
        if not self._path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            rows.append({"key": self.key})
        rows.append({"dataset": dataset, "block": block, "predictions": [asdict(entry) for entry in predictions]})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """The evaluation is done: its predictions are in a file of their own."""
        shutil.rmtree(self.folder, ignore_errors=True)
