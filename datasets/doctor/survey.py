"""What an annotation file holds, whatever its schema: records by scene. No scene has to be there."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks import cap3d, nr3d
from ..tasks.problems import Report
from ..tasks.rows import read_csv, read_json, read_rows, rows_of

_LISTS = ("questions", "annotations")  # SQA3D's two files keep their records under one of these


@dataclass(frozen=True)
class Survey:
    """Records of a file, and how many of them name each scene."""

    records: int
    scenes: Counter[str]

    def on(self, scene_ids: set[str]) -> int:
        """Records on some scenes."""
        return sum(count for scene_id, count in self.scenes.items() if scene_id in scene_ids)


def survey(path: Path) -> Survey:
    """Count an annotation file's records.

    Raises:
        ValueError: the file cannot be read as a whole; one sentence.
        OSError: it cannot be opened.
    """
    report = Report("", "")
    if path.suffix == ".csv":
        captions = path.name == cap3d.FILE
        columns = ("uid", "caption") if captions else nr3d.COLUMNS
        rows = [row.record for row in read_csv(path, columns, report, header=not captions)]
    elif path.suffix == ".jsonl":
        rows = [row.record for row in read_rows(path, report)]
    else:
        content = read_json(path)
        if isinstance(content, dict):
            name = next((name for name in _LISTS if isinstance(content.get(name), list)), None)
            if name is None:
                return _survey_table(content)
            content = content[name]
        rows = [row.record for row in rows_of(path, content, report)]
    scenes = Counter(scene_id for scene_id in map(_scene_of, rows) if scene_id)
    return Survey(len(rows) + len(report.problems), scenes)


def _survey_table(content: dict[str, Any]) -> Survey:
    """A file of entries by scene; an entry is a list of records or one record."""
    scenes = Counter({scene_id: len(entry) if isinstance(entry, list) else 1 for scene_id, entry in content.items()})
    return Survey(sum(scenes.values()), scenes)


def _scene_of(record: dict[str, Any]) -> str:
    found = record.get("scene_id", record.get("scan_id", record.get("uid", "")))
    return found if isinstance(found, str) else ""
