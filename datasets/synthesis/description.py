"""The text that stands for a scene in a teacher's prompt."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...utils.text import format_box
from ..rooms.words import counted, joined
from ..scene_store import SceneInfo
from ..tasks.rows import read_json

CAPTION_FILE = "scene_caption.json"


def load_captions(root: str | Path) -> dict[str, str]:
    """Scene captions by scene id from `annotations/scene_caption.json`; empty where there is no such file.

    Format: {scene_id: {"captions": [text, …]}}.
    """
    path = Path(root) / "annotations" / CAPTION_FILE
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a table of scenes; use the file that came with Scene-30K.")
    captions = {}
    for scene_id, entry in content.items():
        texts = entry.get("captions") if isinstance(entry, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: scene {scene_id} lacks a list `captions` of texts; mend the file.")
        captions[scene_id] = " ".join(text.strip() for text in texts if text.strip())
    return captions


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
