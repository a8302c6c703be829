"""Views that were chosen once, kept on the disk, so that a run that goes on shows the teacher the very same pictures.

A request's pictures are part of its key in the journal. A model on a GPU may choose otherwise the second time, where
two views score alike, and what was paid for would be asked for again.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import orjson

from ...utils.files import replacing
from .views import ViewsOf

INDEX = "index.jsonl"


class KeptViews:
    """A `ViewsOf` that asks another one once for each scene and question. Threads may share it.

    Args:
        views_of: who chooses.
        folder: where pictures lie, by the hash of their bytes, with `index.jsonl`; made when it is needed.
        by: what the choice depends on beside scene and question; another one chooses anew.
        read_only: use what is kept and keep nothing.
    """

    def __init__(self, views_of: ViewsOf, folder: str | Path, *, by: str, read_only: bool = False):
        self._views_of, self._folder, self._by, self._read_only = views_of, Path(folder), by, read_only
        self._chosen: dict[tuple[str, str], list[str]] | None = None
        self._lock = threading.Lock()

    def __call__(self, scene_id: str, question: str) -> tuple[bytes, ...]:
        """The pictures for a question."""
        with self._lock:
            if self._chosen is None:
                self._chosen = self._read()
            kept = self._load(self._chosen.get((scene_id, question), []))
            if kept:
                return kept
            views = tuple(self._views_of(scene_id, question))
            if views and not self._read_only:
                self._chosen[scene_id, question] = self._keep(scene_id, question, views)
            return views

    def _read(self) -> dict[tuple[str, str], list[str]]:
        """Names of pictures by scene and question. A row that a kill cut off is left out."""
        path, chosen = self._folder / INDEX, {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if row["by"] == self._by:
                chosen[row["scene_id"], row["question"]] = row["views"]
        return chosen

    def _load(self, names: Sequence[str]) -> tuple[bytes, ...]:
        """Pictures by name; none where one is gone or broken, so that they are chosen again."""
        views = []
        for name in names:
            path = self._folder / name
            view = path.read_bytes() if path.exists() else b""
            if _name(view) != name:
                return ()
            views.append(view)
        return tuple(views)

    def _keep(self, scene_id: str, question: str, views: Sequence[bytes]) -> list[str]:
        self._folder.mkdir(parents=True, exist_ok=True)
        names = [_name(view) for view in views]
        for name, view in zip(names, views, strict=True):
            if not self._load([name]):
                with replacing(self._folder / name, sync=True) as partial:
                    partial.write_bytes(view)
        row = {"by": self._by, "scene_id": scene_id, "question": question, "views": names}
        # begins a line, as a kill may have cut the last one off
        _append(self._folder / INDEX, b"\n" + orjson.dumps(row) + b"\n")
        return names


def _name(view: bytes) -> str:
    return hashlib.sha256(view).hexdigest()[:32]


def _append(path: Path, content: bytes) -> None:
    """Add to a file and sync it."""
    with path.open("ab") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
