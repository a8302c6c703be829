"""Scenes of the demo: generated rooms, prepared scenes and uploads, opened within limits and kept for a while.

Nothing here knows of a web framework. What a visitor sends is a number, a name that must be one of ours, or a file
that lies in the folder for uploads; nothing else of theirs becomes a path.

Shapes: K objects.
"""

import contextlib
import re
import secrets
import tempfile
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..datasets.readers import read_scene
from ..datasets.rooms import generate_room
from ..datasets.rooms.as_scene import room_as_scene
from ..datasets.scene import Scene
from ..datasets.scene_store import SceneStore
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..utils.labels import DETECTION_CLASSES
from ..utils.text import format_name
from .predict import Session

ROOM_POINTS = 200_000
MAX_ROOM = 10**9  # numbers of generated rooms
UPLOAD_SECONDS = 900.0  # that an upload may wait to be opened
_HEADER_BYTES = 65_536
_ELEMENT = re.compile(rb"^element\s+(\S+)\s+(\d{1,18})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What one visitor may take.

    Args:
        file_bytes: of an upload.
        rows: points of an upload, and triangles.
        characters: of a question.
        new_tokens: of an answer.
        seconds: that the model may work on one answer.
        waiting: visitors in the queue.
        scenes: kept open for all visitors together; the one not used for longest goes first.
    """

    file_bytes: int = 256 * 2**20
    rows: int = 5_000_000
    characters: int = 1000
    new_tokens: int = 256
    seconds: float = 120.0
    waiting: int = 20
    scenes: int = 16


@dataclass(frozen=True, eq=False)
class Opened:
    """A scene that can be asked about, with what the model detected in it (world frame, metres)."""

    title: str
    session: Session
    objects_K7: np.ndarray
    names: list[str]  # of the K objects, "<obj3> chair"

    @property
    def scene(self) -> Scene:
        return self.session.scene

    @property
    def observation(self) -> Observation:
        return self.session.observation


class Shelf:
    """Opened scenes under keys that cannot be guessed, the least recently used put away first. Thread-safe."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Opened] = OrderedDict()

    def put(self, opened: Opened) -> str:
        """Keep a scene; its key."""
        key = secrets.token_hex(16)
        with self._lock:
            self._kept[key] = opened
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        return key

    def get(self, key: str | None) -> Opened:
        """The scene of a key; ValueError where there is none, or it was put away."""
        if not key:
            raise ValueError("There is no scene yet; make a room, choose a scene or upload a PLY file first.")
        with self._lock:
            if key not in self._kept:
                raise ValueError("Your scene was put away, as others opened theirs; open it again.")
            self._kept.move_to_end(key)
            return self._kept[key]

    def drop(self, key: str | None) -> None:
        """Put a scene away, if it is there."""
        with self._lock:
            self._kept.pop(key or "", None)


class Openings:
    """Counts the scenes that are being opened, so that the process can wait for them before it ends. Thread-safe.

    The framework's threads do not outlive the process, and one that is in torch as it ends aborts it.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._under_way = 0
        self._ended = False

    @contextlib.contextmanager
    def begin(self) -> Iterator[bool]:
        """A block in which a scene is opened and drawn; False where none may be begun any more."""
        with self._changed:
            may_begin = not self._ended
            self._under_way += may_begin
        try:
            yield may_begin
        finally:
            with self._changed:
                self._under_way -= may_begin
                self._changed.notify_all()

    def end(self) -> None:
        """Let no further one begin, and wait for those that are under way."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._under_way)


def shown_name(name: str) -> str:
    """A file's name as it may be shown: its last part, without control characters, 60 characters at most."""
    last = re.split(r"[/\\]", name)[-1]
    plain = "".join(each for each in last if unicodedata.category(each)[0] not in "CZ" or each == " ").strip()
    return plain[:60] or "upload"


def check_header(path: Path, rows: int) -> None:
    """Refuse what is no PLY file, or states more rows of anything than `rows`, before it is read.

    Raises:
        ValueError: with the reason.
    """
    with path.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
    header, end, _ = start.replace(b"\r\n", b"\n").partition(b"end_header")
    if not start.startswith(b"ply") or not end:
        raise ValueError(f"{path} is not a PLY file: its header is missing or broken; export the scan as .ply again.")
    for name, count in _ELEMENT.findall(header):
        if int(count) > rows:
            kind = {b"vertex": "points", b"face": "faces"}.get(name, "rows of another kind")
            raise ValueError(
                f"{path} has {int(count):,} {kind}; this demo takes up to {rows:,}: thin the scan out, or ask "
                "about it with `python main.py infer`."
            )


def read_upload(uploaded: Path, uploads: Path, limits: Limits) -> Scene:
    """Read an uploaded PLY file as a scene. The file is gone afterwards, whatever became of it.

    It is moved to a private folder, under a name of ours, before anything is read.

    Args:
        uploads: folder in which uploads lie; a file elsewhere is refused, and left alone.

    Raises:
        ValueError: the file is elsewhere, too large, no PLY file or unreadable; paths are not told.
    """
    path = uploaded.resolve()
    if not path.is_relative_to(uploads.resolve()) or uploaded.is_symlink() or not path.is_file():
        raise ValueError("The upload did not arrive whole; choose the file again.")
    name = shown_name(uploaded.name)
    with tempfile.TemporaryDirectory(prefix="threedr1-upload-", dir=uploads.parent) as private:
        mine = path.rename(Path(private, "upload.ply"))
        if not name.lower().endswith(".ply"):
            raise ValueError(f"{name} is no PLY file; save the scan as .ply and upload that.")
        size = mine.stat().st_size
        if size > limits.file_bytes:
            raise ValueError(
                f"{name} has {size / 2**20:.0f} MB; this demo takes up to {limits.file_bytes / 2**20:.0f} MB."
            )
        try:
            check_header(mine, limits.rows)
            scene = read_scene(mine)
        except ValueError as error:
            raise ValueError(str(error).replace(str(mine), name)) from None
    scene.scene_id = "upload"
    return scene


def sweep(uploads: Path, older: float) -> None:
    """Remove what arrived more than so many seconds ago and was not opened, and folders that are empty."""
    for path in sorted(uploads.rglob("*"), reverse=True):  # what is in a folder before the folder
        with contextlib.suppress(FileNotFoundError):  # another visitor's request sweeps, or opens it, meanwhile
            if path.stat().st_mtime > time.time() - older:
                continue
            if not path.is_dir():
                path.unlink()
            elif not any(path.iterdir()):
                with contextlib.suppress(OSError):  # something has just come into it
                    path.rmdir()


def waiting_bytes(uploads: Path) -> int:
    """Bytes of the uploads that nobody has opened yet."""
    total = 0
    for path in uploads.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@dataclass(eq=False)
class DemoScenes:
    """Opens scenes and keeps them.

    Args:
        lock: held while the model works.
        uploads: folder in which uploads arrive.
        data: data root whose prepared scenes are offered; None offers none.

    Raises:
        ValueError: there are no prepared scenes in `data`.
    """

    model: SceneVLM
    lock: threading.Lock
    uploads: Path
    limits: Limits = Limits()
    data: Path | None = None
    shelf: Shelf = field(init=False)
    openings: Openings = field(init=False, default_factory=Openings)
    prepared: list[str] = field(init=False)  # names of the scenes on offer

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.limits.scenes)
        self._store = SceneStore(self.data / "prepared") if self.data is not None else None
        self.prepared = list(self._store.scene_ids) if self._store is not None else []

    def room(self, number: int | float | None) -> str:
        """Open the generated room of a number; its key."""
        if number is None or not 0 <= number <= MAX_ROOM or number != int(number):
            raise ValueError(f"A room has a whole number from 0 to {MAX_ROOM:,}; write one.")
        room = generate_room(f"room-{int(number)}", int(number), points_only=True)
        return self._open(room_as_scene(room, ROOM_POINTS), f"Generated room {int(number)}: {room.kind}")

    def prepared_scene(self, name: str | None) -> str:
        """Open a prepared scene; its key. ValueError where the name is none of those on offer."""
        if self._store is None or name not in self.prepared:
            raise ValueError("There is no such scene here; choose one from the list.")
        return self._open(self._store[name], f"Scene {name}")

    def upload(self, path: str | Path | None) -> str:
        """Open an uploaded PLY file; its key."""
        if not path:
            raise ValueError("There is no file yet; choose a PLY file first.")
        sweep(self.uploads, UPLOAD_SECONDS)
        scene = read_upload(Path(path), self.uploads, self.limits)
        return self._open(scene, f"Upload {shown_name(str(path))}")

    def _open(self, scene: Scene, title: str) -> str:
        with self.lock:
            opened = opened_scene(self.model, scene, title)
        return self.shelf.put(opened)


def opened_scene(model: SceneVLM, scene: Scene, title: str) -> Opened:
    """A scene with what the model detects in it."""
    model.eval()
    session = Session(model, scene)
    encoded = session.observation.encoded
    assert encoded is not None
    classes_K = encoded.host_probs_nC.argmax(-1).tolist()
    objects_K7 = scene.to_world(encoded.proposals)
    return Opened(title, session, objects_K7, object_names(classes_K))


def object_names(classes_K: Sequence[int]) -> list[str]:
    """What the K detected objects are called in lists, by their classes; their numbers are those of answers."""
    return [
        f"{format_name(number)} {DETECTION_CLASSES[index]}" if index < len(DETECTION_CLASSES) else format_name(number)
        for number, index in enumerate(classes_K)
    ]
