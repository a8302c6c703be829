"""Rows of detection files: what a detector found in one scene, and what is there.

Boxes are [x, y, z, dx, dy, dz(, heading)] in metres; classes are the 18 of utils.labels, by index.
"""

from collections.abc import Iterator
from typing import Any

from ..json_rows import Row, boxes_fault, shown
from ..labels import NUM_CLASSES

_SLACK = 1e-4  # rounding of written probabilities


def detection_faults(row: Row) -> Iterator[tuple[str, str | None]]:
    """(field, fault) of a detector's row: `boxes`, `class_probs` [K][18] and `objectness` [K], in [0, 1]."""
    boxes, probabilities, objectness = (row.get(name) for name in ("boxes", "class_probs", "objectness"))
    yield "boxes", boxes_fault(boxes)
    length = len(boxes) if isinstance(boxes, list) else None
    yield (
        "class_probs",
        _list_fault(probabilities, length)
        or next((fault for numbers in _items(probabilities) if (fault := _shares_fault(numbers, NUM_CLASSES))), None),
    )
    yield "objectness", _list_fault(objectness, length) or _shares_fault(objectness, length)


def truth_faults(row: Row) -> Iterator[tuple[str, str | None]]:
    """(field, fault) of a scene's ground truth: `boxes`, and `classes` in 0..17."""
    boxes, classes = row.get("boxes"), row.get("classes")
    yield "boxes", boxes_fault(boxes, flat=True)
    wrong = next((entry for entry in _items(classes) if not _is_class(entry)), None)
    fault = _list_fault(classes, len(boxes) if isinstance(boxes, list) else None)
    if fault is None and not all(map(_is_class, _items(classes))):
        fault = f"a class must be a whole number in 0..{NUM_CLASSES - 1}, not {shown(wrong)}"
    yield "classes", fault


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _list_fault(value: Any, length: int | None) -> str | None:
    if not isinstance(value, list):
        return f"must be a list, not {shown(value)}"
    if length is not None and len(value) != length:
        return f"must have one entry for each of the {length} boxes, not {len(value)}"
    return None


def _shares_fault(value: Any, length: int | None) -> str | None:
    good = isinstance(value, list) and length in (None, len(value)) and all(map(_is_share, value))
    return None if good else f"must be {length} numbers in 0..1, not {shown(value)}"


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_SLACK <= value <= 1 + _SLACK


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NUM_CLASSES
