"""The text that stands for a scene in a teacher's prompt: a caption, what the scene holds, and every object's box.

Captions come from `annotations/scene_caption.json`, and for scenes that it lacks from 3D-LLM's scene descriptions,
where these files are there.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...utils.text import format_box
from ..rooms.words import counted, joined
from ..scene_store import SceneInfo
from ..tasks.rows import read_json
from .sources import Question, source_files
from .views import ViewsOf

CAPTION_FILE = "scene_caption.json"
FULL, OBJECTS, NONE = "full", "objects", "none"
MODES = (FULL, OBJECTS, NONE)  # what of a description the teacher is told


@dataclass(frozen=True)
class InputOptions:
    """What is asked, and what the teacher is told and shown.

    `sources` are names out of sources.SOURCES, empty for those of the paper that are there. `description` is full
    (caption and boxes), objects (the boxes alone) or none. `views` are uniform frames to show, 0 for none, their
    longest side `view_size` pixels; `views_of` gives other pictures instead, by scene and question, and `views_by`
    says for the report who that is.
    """

    sources: tuple[str, ...] = ()
    description: str = FULL
    views: int = 0
    view_size: int = 768
    views_of: ViewsOf | None = None
    views_by: str = ""


def caption_lists(root: str | Path, split: str = "") -> dict[str, list[str]]:
    """Captions by scene id, of `scene_caption.json` and, where a split is named, of its 3D-LLM descriptions.

    Formats: {scene_id: {"captions": [text, …]}} and [{"scene_id", "answers": [text, …]}].

    Raises:
        ValueError: a file of another form.
    """
    captions: dict[str, list[str]] = {}
    path = Path(root) / "annotations" / CAPTION_FILE
    if path.exists():
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a table of scenes; use the file that came with Scene-30K.")
        for scene_id, entry in content.items():
            texts = entry.get("captions") if isinstance(entry, dict) else None
            captions[scene_id] = _texts(texts, "captions", path, scene_id)
    described = Path(root) / "annotations" / source_files(split)["scene_description"]
    if split and described.exists():
        content = read_json(described)
        rows = content if isinstance(content, list) else [content]
        told = {scene_id for scene_id, texts in captions.items() if texts}
        for row in rows:
            scene_id = row.get("scene_id") if isinstance(row, dict) else None
            if not isinstance(scene_id, str):
                raise ValueError(f"{described} is not a list of records with scene_id; use the official file.")
            if scene_id not in told:
                captions.setdefault(scene_id, []).extend(_texts(row.get("answers"), "answers", described, scene_id))
    return captions


def _texts(texts: object, name: str, path: Path, scene_id: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: scene {scene_id} lacks a list `{name}` of texts; mend the file.")
    return [text.strip() for text in texts if text.strip()]


def load_captions(root: str | Path, split: str = "") -> dict[str, str]:
    """The captions of `caption_lists`, those of a scene joined; empty where there is no file."""
    return join_captions(caption_lists(root, split))


def join_captions(captions: Mapping[str, list[str]]) -> dict[str, str]:
    """The captions of each scene as one text."""
    return {scene_id: " ".join(texts) for scene_id, texts in captions.items()}


def inventory(info: SceneInfo) -> str:
    """What a scene holds, most frequent first: "This scene holds three chairs, one bed and one desk."."""
    if not info.object_labels:
        return "This scene holds no labelled object."
    counts = sorted(Counter(info.object_labels).items(), key=lambda item: (-item[1], item[0]))
    return f"This scene holds {joined([counted(count, label) for label, count in counts])}."


def object_list(info: SceneInfo) -> str:
    """Every labelled object with its box in the model frame, which a thought about places needs."""
    boxes_K7 = info.to_model(info.boxes_K7)
    entries = [
        f"{label} {format_box(box_7.tolist())}" for label, box_7 in zip(info.object_labels, boxes_K7, strict=True)
    ]
    return f"Objects, each with its box (centre x, y, z and size in metres): {'; '.join(entries)}." if entries else ""


def describe(info: SceneInfo, captions: Mapping[str, str]) -> str:
    """A scene's caption where one is given, else its inventory; then its objects."""
    return f"{captions.get(info.scene_id) or inventory(info)} {object_list(info)}".strip()


class Describer:
    """What the teacher is told of the scene that a question is about.

    Args:
        index: labels and boxes of the scenes.
        captions: by scene id; not told where a description is what is asked for, as they would be the answer.
        mode: full, objects (the boxes alone), or none, which leaves the teacher the views it is shown.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, index: Mapping[str, SceneInfo], captions: Mapping[str, str], mode: str = FULL):
        if mode not in MODES:
            raise ValueError(f"There is no description {mode!r}; there are {', '.join(MODES)}.")
        self._index, self._captions, self._mode = index, captions, mode
        self._told: dict[tuple[str, bool], str] = {}

    def __call__(self, question: Question) -> str:
        """The description for a question's prompt; "" where the mode is none."""
        if self._mode == NONE:
            return ""
        key = (question.scene_id, question.task == "scene_description")
        if key not in self._told:
            info = self._index[question.scene_id]
            told = describe(info, {} if key[1] else self._captions) if self._mode == FULL else object_list(info)
            self._told[key] = told
        return self._told[key]
