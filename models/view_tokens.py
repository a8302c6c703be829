"""Features of the chosen views from frozen encoders beside Qwen's vision tower: SigLIP-2's patches and depth.

The paper's image and depth encoders (1.1). Each view gets a fixed number of tokens from each: patches of the
picture pooled to a small grid, and cells of its depth map (depth_encoder.py). The connector projects them, and the
input assembler puts them behind their view. Features are computed once and kept in the scene's Observation.

Shapes: V views, n tokens of a view, E width of the image encoder, P numbers of a depth cell, h x w patches.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .depth_encoder import CELL_WIDTH, DepthEncoder, depth_cells, grid_side, load_depth_encoder, view_depths
from .dual_encoder import DualEncoder, prepare_pictures
from .image_encoder import Encoder, SentenceEncoder, load_text_encoder
from .observation import Observation, SceneSettings
from .view_selector import ViewSelector

IMAGE_FEATURES, DEPTH_CELLS = "image", "depth"  # names in Observation.view_features
Shown = Sequence[tuple[Observation, int]]  # views, each by its scene and its place in the scene's pool


class ViewFeatures:
    """The frozen encoders of the view tokens. No part of the model's state: its settings name them.

    Args:
        num_image_tokens: of each view, a square number; 0 for none.
        image_encoder: gives the encoder of the pictures where there are image tokens; called, since the view selector
            lends its own.
        num_depth_tokens: of each view, a square number; 0 for none.
        depth_encoder: of frames without a sensor's depth; None takes rendered depth for these.
    """

    def __init__(
        self,
        *,
        num_image_tokens: int,
        image_encoder: Callable[[], Encoder] | None,
        num_depth_tokens: int,
        depth_encoder: DepthEncoder | None,
    ):
        grid_side(num_image_tokens), grid_side(num_depth_tokens)
        self.num_image_tokens = num_image_tokens
        self.num_depth_tokens = num_depth_tokens
        self.image_encoder = image_encoder
        self.depth_encoder = depth_encoder
        self.image_width = patch_width(image_encoder()) if num_image_tokens and image_encoder is not None else 0

    def images(self, shown: Shown, device: torch.device) -> Tensor:
        """Features [V, n, E] of the pictures of views."""

        def make(observation: Observation) -> Tensor:
            assert self.image_encoder is not None and observation.pool is not None
            encoder = self.image_encoder().to(device)
            return embed_patches(encoder, list(observation.pool.images_VHW3), grid_side(self.num_image_tokens))

        return _kept(shown, IMAGE_FEATURES, make)

    def depths(self, shown: Shown, device: torch.device) -> Tensor:
        """Cells [V, n, P] of the depth maps of views."""

        def make(observation: Observation) -> Tensor:
            assert observation.pool is not None
            maps_VHW = view_depths(observation.scene, observation.pool, self.depth_encoder, device)
            return depth_cells(maps_VHW, self.num_depth_tokens)

        return _kept(shown, DEPTH_CELLS, make)


def _kept(shown: Shown, kind: str, make: Callable[[Observation], Tensor]) -> Tensor:
    """What is kept of the views, made of a scene's whole pool at once where it is not yet.

    Encoders give other last bits in a batch of another size; of the whole pool they are the same whichever views are
    asked for first, and so after a resume.
    """
    for observation, _ in shown:
        if kind not in observation.view_features:
            observation.view_features[kind] = make(observation)
    return torch.stack([observation.view_features[kind][view] for observation, view in shown])


def build_view_features(settings: SceneSettings, selector: ViewSelector | None) -> ViewFeatures | None:
    """The encoders that a model's settings name; None where views have no tokens beside the vision tower's."""
    if not (settings.view_image_tokens or settings.view_depth_tokens):
        return None
    if selector is None:
        raise ValueError("Tokens of views need views; set model.views.source, or the numbers of tokens to 0.")
    named = settings.view_image_encoder if settings.view_image_tokens else ""
    if named:
        own = load_text_encoder(named)
        lend: Callable[[], Encoder] = lambda: own  # noqa: E731
    else:
        lend = lambda: selector.encoder  # noqa: E731
    depth = settings.view_depth_encoder if settings.view_depth_tokens else ""
    return ViewFeatures(
        num_image_tokens=settings.view_image_tokens,
        image_encoder=lend,
        num_depth_tokens=settings.view_depth_tokens,
        depth_encoder=load_depth_encoder(depth) if depth else None,
    )


def token_sizes(features: ViewFeatures | None) -> dict[str, int]:
    """The connector's arguments about view tokens."""
    if features is None:
        return {}
    return {
        "num_view_image_tokens": features.num_image_tokens,
        "view_image_width": features.image_width,
        "num_view_depth_tokens": features.num_depth_tokens,
        "view_depth_width": CELL_WIDTH,
    }


def patch_width(encoder: Encoder) -> int:
    """E; ValueError for an encoder that has no picture side."""
    if isinstance(encoder, SentenceEncoder):
        raise ValueError(
            "Image tokens of views need an encoder of pictures, but this one reads text only; name a SigLIP-2 or CLIP "
            "checkpoint as model.views.token_encoder, or set model.views.image_encoder_tokens to 0."
        )
    if isinstance(encoder, DualEncoder):
        return encoder.image.out.in_features
    return int(encoder.model.config.vision_config.hidden_size)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def embed_patches(encoder: Encoder, images: Sequence[np.ndarray], side: int, batch_size: int = 16) -> Tensor:
    """Features [V, side * side, E], float32, of pictures [H, W, 3] uint8: patches averaged over a square grid."""
    rows = []
    for start in range(0, len(images), batch_size):
        for patches_hwE in _patches(encoder, images[start : start + batch_size]):
            pooled_Ess = F.adaptive_avg_pool2d(patches_hwE.permute(2, 0, 1).float(), side)
            rows.append(pooled_Ess.flatten(1).T)
    return torch.stack(rows)


def _patches(encoder: Encoder, images: Sequence[np.ndarray]) -> list[Tensor]:
    """Patch features [h, w, E] of each picture."""
    if isinstance(encoder, DualEncoder):
        pictures = prepare_pictures(images, encoder.config["image_size"])
        weight = next(encoder.parameters())
        return list(encoder.image.body(pictures.to(weight.device, weight.dtype)).permute(0, 2, 3, 1))
    assert not isinstance(encoder, SentenceEncoder)
    inputs = encoder.prepare(images)
    hidden_VLE = encoder.model.vision_model(**inputs).last_hidden_state  # type: ignore[operator, union-attr]
    if "spatial_shapes" in inputs:  # SigLIP-2 at its pictures' own shape: padded behind h * w patches
        shapes = inputs["spatial_shapes"].tolist()
    else:
        side = int(hidden_VLE.shape[1] ** 0.5)
        shapes = [(side, side)] * len(images)
        hidden_VLE = hidden_VLE[:, -side * side :]  # CLIP puts a class token first
    return [hidden_LE[: h * w].unflatten(0, (h, w)) for hidden_LE, (h, w) in zip(hidden_VLE, shapes, strict=True)]
