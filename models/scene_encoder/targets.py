"""Ground truth of a batch of scenes, packed for the criterion.

Shapes: B scenes, T objects of all scenes one after the other, K objects of the fullest scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DetectionTargets:
    """Boxes and classes of a batch, in the frame of the points, metres. `of` packs them scene by scene.

    Packed, a batch moves to a GPU in a few transfers, and all of its objects are compared at once.
    """

    boxes_T7: Tensor
    classes_T: Tensor  # int64
    scene_T: Tensor  # int64, the scene of each object; scenes in order
    slot_BK: Tensor  # int64, where each scene's objects stand among the T; T where the scene has no more
    counts: tuple[int, ...]  # objects of each scene

    @classmethod
    def of(cls, boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> "DetectionTargets":
        """From one [K, 7] and one [K] tensor a scene; ValueError: they disagree."""
        counts = tuple(len(part) for part in boxes)
        if counts != tuple(len(part) for part in classes) or not counts:
            raise ValueError("Targets need as many classes as boxes in every scene, and at least one scene.")
        counts_B = torch.tensor(counts)
        slot_K = torch.arange(max(counts))
        slot_BK = (counts_B.cumsum(0) - counts_B)[:, None] + slot_K
        slot_BK = torch.where(slot_K < counts_B[:, None], slot_BK, sum(counts))
        return cls(
            torch.cat(list(boxes)).float(),
            torch.cat(list(classes)).long(),
            torch.arange(len(counts)).repeat_interleave(counts_B),
            slot_BK,
            counts,
        )

    def of_scene(self, scene: int) -> tuple[Tensor, Tensor]:
        """Boxes [K, 7] and classes [K] of one scene."""
        first = sum(self.counts[:scene])
        own = slice(first, first + self.counts[scene])
        return self.boxes_T7[own], self.classes_T[own]

    def to(self, device: torch.device | str) -> "DetectionTargets":
        return DetectionTargets(
            self.boxes_T7.to(device),
            self.classes_T.to(device),
            self.scene_T.to(device),
            self.slot_BK.to(device),
            self.counts,
        )
