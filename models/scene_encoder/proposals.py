"""Detected objects out of an encoded scene, in a fixed order.

Shapes: B scenes, Q queries, K proposals, D width, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.boxes import batched_nms_3d
from .encoder import SceneEncoding


@dataclass
class Proposals:
    """Objects of a batch, in the order of `select_proposals` (of equals the lower query first), padded with zeros.

    Boxes are in the frame of the encoded points, metres. Class probabilities leave out `no object` and sum to the
    objectness. Features carry gradients; the rest does not.
    """

    boxes_BK7: Tensor
    features_BKD: Tensor
    class_probs_BKC: Tensor
    objectness_BK: Tensor
    valid_BK: Tensor  # bool
    query_BK: Tensor  # int64, the query behind each proposal; 0 where not valid

    @property
    def classes_BK(self) -> Tensor:
        """Likeliest class, int64; 0 where not valid."""
        return self.class_probs_BKC.argmax(-1)


def select_proposals(
    encoding: SceneEncoding,
    num_proposals: int,
    nms_iou: float = 0.25,
    min_objectness: float = 0.0,
    *,
    left_to_right: bool = False,
) -> Proposals:
    """The `num_proposals` most object-like boxes of each scene after suppression within a class.

    A box goes when a better one of the same class overlaps it by more than `nms_iou`, or when its objectness is below
    `min_objectness`. What stays is ordered by falling objectness, or from left to right (rising x), and that order
    names the objects (`<obj0>` is the first).
    """
    if num_proposals < 1:
        raise ValueError(f"num_proposals must be at least 1, not {num_proposals}.")
    probability_BQC = encoding.class_logits_BQC1.detach().float().softmax(-1)[..., :-1]
    objectness_BQ = encoding.objectness_BQ.detach()
    boxes_BQ7 = encoding.boxes_BQ7.detach()
    # chosen on the host, for all scenes at once
    kept_of = batched_nms_3d(boxes_BQ7, objectness_BQ, nms_iou, probability_BQC.argmax(-1))
    read_BQ2 = torch.stack([objectness_BQ, boxes_BQ7[..., 0]], dim=2).cpu()
    query_BK = torch.zeros(len(boxes_BQ7), num_proposals, dtype=torch.int64)
    counts_B = torch.zeros(len(boxes_BQ7), dtype=torch.int64)
    for scene, kept in enumerate(kept_of):
        kept = kept[read_BQ2[scene, kept, 0] >= min_objectness][:num_proposals]
        if left_to_right:
            kept = kept[read_BQ2[scene, kept, 1].argsort(stable=True)]
        query_BK[scene, : len(kept)] = kept
        counts_B[scene] = len(kept)
    valid_BK = (torch.arange(num_proposals) < counts_B[:, None]).to(boxes_BQ7.device)
    query_BK = query_BK.to(boxes_BQ7.device)

    def pick(values_BQX: Tensor) -> Tensor:
        index_BKX = query_BK[..., None].expand(-1, -1, values_BQX.shape[-1])
        return torch.where(valid_BK[..., None], values_BQX.gather(1, index_BKX), 0)

    return Proposals(
        boxes_BK7=pick(boxes_BQ7),
        features_BKD=pick(encoding.query_features_BQD),
        class_probs_BKC=pick(probability_BQC),
        objectness_BK=pick(objectness_BQ[..., None])[..., 0],
        valid_BK=valid_BK,
        query_BK=query_BK,
    )
