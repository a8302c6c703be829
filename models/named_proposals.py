"""Proposals that the language model knows by name: which of them covers a box, and how a text points at it.

Numbers and words alone, no device: texts are written from it in other processes too.

Shapes: n named proposals, K proposals, M boxes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..utils.boxes import box3d_iou
from ..utils.text import find_boxes, format_box, format_name, replace_boxes

# A box is spoken of by a proposal's name where the proposal covers it at least this much.
NAME_IOU = 0.25


class NamedProposals:
    """The named proposals of a scene, in their order.

    Args:
        boxes_n7: their boxes, float32, model frame.
    """

    def __init__(self, boxes_n7: np.ndarray):
        self.boxes_n7 = boxes_n7
        self.covered: dict[tuple[float, ...], int | None] = {}  # what `covering` has found
        self._part_of: tuple[NamedProposals, dict[int, int]] | None = None  # the whole, and where its rows are here

    def __len__(self) -> int:
        return len(self.boxes_n7)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "covered": {}}

    def covering(self, boxes: Sequence[Sequence[float]] | np.ndarray) -> list[int | None]:
        """For each box (model frame) the proposal that covers it best, where one does; worked out once a box.

        Training asks for the same boxes of a scene again and again.
        """
        if self._part_of is not None:
            whole, place = self._part_of
            return [None if row is None else place.get(row) for row in whole.covering(boxes)]
        keys = [tuple(box) for box in (boxes.tolist() if isinstance(boxes, np.ndarray) else boxes)]
        new = list(dict.fromkeys(key for key in keys if key not in self.covered))
        boxes_M7 = np.asarray(new, dtype=np.float32).reshape(-1, 7)
        self.covered.update(zip(new, best_proposals(boxes_M7, self.boxes_n7), strict=True))
        return [self.covered[key] for key in keys]

    def showing(self, rows: Sequence[int]) -> "NamedProposals":
        """These of them alone, in their order.

        A box keeps the proposal that covers it among all or, where that is not among these, has none.
        """
        part = NamedProposals(self.boxes_n7[list(rows)])
        part._part_of = (self, {row: number for number, row in enumerate(rows)})
        return part

    def pointed(self, text: str, names: Sequence[int] | None = None, *, only: bool = False) -> str:
        """A text with each `<box>` replaced by the name of the proposal that covers it, where one does.

        `names` are as in `pointer_to`; `only` leaves out boxes that have no name.
        """
        found = iter(self.covering(find_boxes(text)))

        def pointer(box: list[float]) -> str:
            index = next(found)
            return "" if only and index is None else pointer_to(box, index, names)

        return replace_boxes(text, pointer)


def best_proposals(boxes_M7: np.ndarray, proposals_K7: np.ndarray) -> list[int | None]:
    """For each box the index of the proposal that covers it best, where any covers it enough to be its name."""
    if len(proposals_K7) == 0 or len(boxes_M7) == 0:
        return [None] * len(boxes_M7)
    overlaps_MK = box3d_iou(torch.as_tensor(boxes_M7, dtype=torch.float32), torch.as_tensor(proposals_K7))
    best_M, index_M = overlaps_MK.max(1)
    found = zip(best_M.tolist(), index_M.tolist(), strict=True)
    return [index if best >= NAME_IOU else None for best, index in found]


def pointer_to(box_7: Sequence[float] | np.ndarray, index: int | None, names: Sequence[int] | None = None) -> str:
    """The pointer to a box (model frame): the name of the proposal that covers it, else its numbers.

    Args:
        index: of that proposal; None where there is none.
        names: numbers that the proposals are called by; None: 0, 1, 2 …
    """
    if index is None:
        return format_box([float(value) for value in box_7])
    return format_name(index if names is None else names[index])
