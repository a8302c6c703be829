"""What the model takes of a scene and what it has made of it so far.

Shapes: B boxes, K proposals, T encoder tokens, E encoder width, C classes, N points, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ..datasets.scene import Scene
from .named_proposals import NamedProposals
from .scene_encoder.object_query import NOTHING, QueriedObjects, click_boxes, query_boxes
from .view_pixels import to_device
from .view_pool import ViewPool


@dataclass(frozen=True)
class SceneSettings:
    """What the model takes of a scene; saved with the weights, since they were trained on it."""

    num_points: int = 40_000
    use_color: bool = True
    use_height: bool = True
    use_normal: bool = False
    multiview_dim: int = 0  # channels of multi-view features a point; 0 for none
    num_proposals: int = 64  # 0: none has a token or a name; views are chosen by 64 all the same
    left_to_right: bool = False  # proposals are in the order of their x, not of their objectness
    view_source: str = "mixed"  # kinds of candidate views (view_kinds.py)
    num_candidates: int = 16
    view_size: int = 336
    # tokens of each chosen view beside the vision tower's (view_tokens.py), and the frozen encoders by name
    view_image_tokens: int = 0
    view_image_encoder: str = ""  # "" for the view selector's
    view_depth_tokens: int = 0
    view_depth_encoder: str = ""  # "" where frames without a sensor's depth take rendered depth


@dataclass
class EncodedScene:
    """Output of the scene encoder for one scene; boxes in the model frame, proposals in their fixed order.

    Which proposals are valid is known on the host: to select by a mask on a GPU would wait for it each time.
    """

    features_KE: torch.Tensor
    boxes_K7: torch.Tensor
    class_probs_KC: torch.Tensor
    objectness_K: torch.Tensor
    token_xyz_T3: torch.Tensor
    tokens_TE: torch.Tensor
    colors_K6: (
        torch.Tensor
    )  # of the points in each proposal's box (scene_encoder/object_color.py); zeros without colours
    valid_n: torch.Tensor  # indices of the valid ones, int64, on the host
    found: NamedProposals  # the valid ones, whether they are named or not
    are_named: bool = True  # whether the language model is told of the proposals

    @property
    def valid_K(self) -> torch.Tensor:
        """Which are valid, bool, on the host."""
        return torch.zeros(len(self.boxes_K7), dtype=torch.bool).index_fill_(0, self.valid_n, True)

    @cached_property
    def host_probs_nC(self) -> torch.Tensor:
        """Class probabilities of the valid ones, float32, on the host, fetched once for all questions."""
        valid_n = to_device(self.valid_n, self.class_probs_KC.device)
        return self.class_probs_KC.detach()[valid_n].float().cpu()

    @property
    def proposals(self) -> np.ndarray:
        """Boxes of the valid proposals [n, 7], float32, model frame."""
        return self.found.boxes_n7

    @cached_property
    def told(self) -> NamedProposals:
        """The proposals that the language model knows by name; none where it has no tokens of any."""
        return self.found if self.are_named else NamedProposals(np.zeros((0, 7), dtype=np.float32))

    @property
    def named(self) -> np.ndarray:
        """Their boxes [n, 7], model frame."""
        return self.told.boxes_n7

    def showing(self, rows: Sequence[int]) -> "EncodedScene":
        """The same scene with these of its valid proposals alone, in their order.

        A box keeps the proposal that covers it in the whole scene or, where that is not among them, has none.
        """
        return replace(self, valid_n=self.valid_n[list(rows)], found=self.found.showing(rows))


@dataclass
class Observation:
    """One scene as the model sees it, with what was computed of it so far."""

    scene: Scene
    points_N3: torch.Tensor
    features_NF: torch.Tensor
    seed: int
    encoded: EncodedScene | None = None
    pool: ViewPool | None = None
    pixels: dict[int, tuple[torch.Tensor, tuple[int, int, int]]] = field(default_factory=dict)
    image_tokens: dict[int, torch.Tensor] = field(default_factory=dict)  # of a frozen vision tower
    view_features: dict[str, torch.Tensor] = field(default_factory=dict)  # of the whole pool (view_tokens.py)
    choices: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model said; boxes are [x, y, z, dx, dy, dz, heading], metres, world frame.

    `boxes` are those that the answer points at, `named` the proposals that the text names, thought and all, by name.
    """

    text: str
    think: str
    answer: str
    well_formed: bool
    boxes: list[list[float]]
    named: dict[str, list[float]]


def asked_objects(boxes_B7: Sequence[Sequence[float]], scenes: Sequence[EncodedScene]) -> QueriedObjects:
    """The objects in boxes (model frame), each of its own scene; a proposal counts where it would lend its name.

    Raises:
        ValueError: a box that is not finite.
    """
    device, asked_B7 = scenes[0].boxes_K7.device, torch.tensor(boxes_B7, dtype=torch.float32)
    if not bool(asked_B7.isfinite().all()):
        raise ValueError("The box that is asked about is not finite; give metres in the scene's frame.")
    covering = [scene.found.covering([box])[0] for box, scene in zip(boxes_B7, scenes, strict=True)]
    proposals = [
        NOTHING if row is None else int(scene.valid_n[row]) for row, scene in zip(covering, scenes, strict=True)
    ]
    return query_boxes(
        to_device(asked_B7, device),
        proposal_B=to_device(torch.tensor(proposals), device),
        features_BKE=torch.stack([scene.features_KE for scene in scenes]),
        class_probs_BKC=torch.stack([scene.class_probs_KC for scene in scenes]),
        colors_BK6=torch.stack([scene.colors_K6 for scene in scenes]),
        token_xyz_BT3=torch.stack([scene.token_xyz_T3 for scene in scenes]),
        tokens_BTE=torch.stack([scene.tokens_TE for scene in scenes]),
    )


def clicked_box(
    point_3: Sequence[float] | np.ndarray, scene: Scene, encoded: EncodedScene
) -> tuple[np.ndarray, float]:
    """What a click means: the box [7] of a detected object, and how far from it the click is; world frame, metres.

    The smallest object that contains the click, else the nearest one, out of those that are more likely an object than
    not (of all proposals where none is); without a proposal a small cube around the click, at an infinite distance.

    Raises:
        ValueError: a click that is not finite.
    """
    model_3 = torch.from_numpy(scene.to_model(np.asarray(point_3, dtype=np.float32)))
    valid_K = encoded.valid_K.to(encoded.objectness_K.device)
    likely_K = valid_K & (encoded.objectness_K >= 0.5)
    if not bool(likely_K.any()):
        likely_K = valid_K
    boxes_17, distance_1 = click_boxes(
        model_3[None].to(encoded.boxes_K7.device), encoded.boxes_K7[None], likely_K[None]
    )
    return scene.to_world(boxes_17[0].detach().cpu().numpy()), float(distance_1[0])
