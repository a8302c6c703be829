"""Pictures of a scene for a teacher that sees: uniform frames, or views that the caller chooses.

A `ViewsOf` is called with a scene's id and a question's text and returns JPEG or PNG files. The command line hands in
one that asks a trained view selector, which this package must not import.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..scene import Scene
from ..scene_store import SceneStore

ViewsOf = Callable[[str, str], Sequence[bytes]]
MOST_VIEWS = 16
# Gemini takes 20 MB a request with its pictures inside; base64 makes four bytes of three.
MOST_BYTES = 14_000_000
_KEPT_BYTES = 512_000_000  # 6 views of some 1,200 scans


def shrink(picture: Image.Image, longest: int) -> bytes:
    """A picture as JPEG, its longest side at most `longest` pixels; smaller ones keep their size."""
    image = picture.convert("RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    return stream.getvalue()


def uniform_files(scene: Scene, count: int) -> list[str]:
    """At most `count` of a scene's pictures, evenly spaced over the scan; posed ones where it has them."""
    pictures = scene.frames or scene.pictures
    rows = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    return [pictures[row].color_path for row in rows]


def read_uniform(scene: Scene, count: int, longest: int) -> tuple[bytes, ...]:
    """Uniform frames of a scene as JPEG.

    Raises:
        ValueError: the scene has no pictures, or one cannot be read.
    """
    files = uniform_files(scene, count)
    if not files:
        raise no_pictures(scene.scene_id)
    views = []
    for file in files:
        try:
            with Image.open(file) as picture:
                views.append(shrink(picture, longest))
        except OSError as error:
            raise ValueError(f"{file} is not a whole picture ({error}); copy it again from its source.") from None
    return tuple(views)


def no_pictures(scene_id: str) -> ValueError:
    """What is said of a scene that views are asked of, and that has none."""
    return ValueError(
        f"Scene {scene_id} has no pictures to show the teacher; export its frames and prepare it again, or ask "
        "without views."
    )


class UniformViews:
    """A `ViewsOf` of uniform frames; the latest scenes' pictures are kept, half a gigabyte of them.

    Questions come in any order, so that one scene's are far apart, and a run that goes on needs the pictures of every
    question again to know what it has asked. Threads may share it.

    Args:
        store: prepared scenes.
        count: pictures a scene, 1 to MOST_VIEWS.
        longest: pixels of their longest side.

    Raises:
        ValueError: a count or size that no teacher takes.
    """

    def __init__(self, store: SceneStore, count: int, longest: int = 768):
        if not 1 <= count <= MOST_VIEWS:
            raise ValueError(f"A teacher is shown 1 to {MOST_VIEWS} views, not {count}.")
        if not 64 <= longest <= 2048:
            raise ValueError(f"Views are 64 to 2048 pixels on their longest side, not {longest}.")
        self._store, self._count, self._longest = store, count, longest
        self._recent: OrderedDict[str, tuple[bytes, ...]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def require(self, scene_ids: Iterable[str]) -> None:
        """ValueError where one of the scenes has no pictures: said before anything is paid for."""
        for scene_id in sorted(set(scene_ids)):
            files = uniform_files(self._store[scene_id], self._count)
            if not files:
                raise no_pictures(scene_id)
            absent = next((file for file in files if not Path(file).is_file()), "")
            if absent:
                raise ValueError(
                    f"Scene {scene_id} lost its picture {absent}; put it back, or prepare the scene again."
                )

    def __call__(self, scene_id: str, question: str) -> tuple[bytes, ...]:  # noqa: ARG002
        """The same pictures for every question about a scene."""
        with self._lock:
            if scene_id not in self._recent:
                self._recent[scene_id] = views = read_uniform(self._store[scene_id], self._count, self._longest)
                self._size += sum(map(len, views))
                while self._size > _KEPT_BYTES and len(self._recent) > 1:
                    self._size -= sum(map(len, self._recent.popitem(last=False)[1]))
            self._recent.move_to_end(scene_id)
            return self._recent[scene_id]


def within_limits(views: Sequence[bytes], scene_id: str) -> tuple[bytes, ...]:
    """The views, where a teacher takes so many in one request.

    Raises:
        ValueError: none, too many, or too many bytes.
    """
    if not views:
        raise no_pictures(scene_id)
    size = sum(map(len, views))
    if len(views) > MOST_VIEWS or size > MOST_BYTES:
        raise ValueError(
            f"The {len(views)} views of scene {scene_id} take {size / 1e6:.1f} MB; a request takes {MOST_VIEWS} views "
            f"and {MOST_BYTES / 1e6:.0f} MB, so show fewer or smaller ones."
        )
    return tuple(views)
