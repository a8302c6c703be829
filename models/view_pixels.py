"""Views as the vision tower takes them: patches made where it runs, and where each patch attends.

Qwen's image processor works on the host, one picture after the other, and its float32 patches are 24 times the bytes
of the pictures. Views have a size that needs no resizing, so all that it does to them is arithmetic: it is done here
on the device, for all views at once. A picture of another size goes through the processor.

Shapes: V views, H rows, W columns, P patches of all views, C numbers of a patch, T merged tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import vision_utils

Grid = tuple[int, int, int]  # (1, rows, columns) of patches, before merging


@dataclass(frozen=True)
class PatchSettings:
    """What Qwen's image processor does to a picture."""

    patch: int
    temporal: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, processor: Any) -> "PatchSettings":
        """The settings of a loaded processor; ValueError where it leaves a step out."""
        if not (processor.do_rescale and processor.do_normalize):
            raise ValueError("The image processor does not rescale or not normalise; take Qwen2.5-VL's own.")
        size = processor.size
        limits = [size[name] if isinstance(size, dict) else getattr(size, name) for name in _LIMITS]
        return cls(
            processor.patch_size,
            processor.temporal_patch_size,
            processor.merge_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            processor.rescale_factor,
            *limits,
        )

    def grid(self, height: int, width: int) -> Grid | None:
        """The patches of a picture of this size; None where it is resized first."""
        side = self.patch * self.merge
        if height % side or width % side or not self.min_pixels <= height * width <= self.max_pixels:
            return None
        return 1, height // self.patch, width // self.patch


_LIMITS = ("shortest_edge", "longest_edge")  # of the number of pixels


def patchify(images_VHW3: Tensor, settings: PatchSettings) -> Tensor:
    """Patches [P, C] of pictures (uint8) in Qwen's order: merged squares by rows, channels first, frame repeated."""
    mean_3, std_3 = (torch.tensor(values, device=images_VHW3.device) for values in (settings.mean, settings.std))
    normal_VHW3 = (images_VHW3.float() * settings.rescale - mean_3) / std_3
    count, height, width, channels = images_VHW3.shape
    patch, merge = settings.patch, settings.merge
    blocks = normal_VHW3.view(
        count, height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, channels
    )
    blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)  # view, row, column, row and column in the square, channel, pixel
    frames = blocks.unsqueeze(6).expand(*blocks.shape[:6], settings.temporal, patch, patch)
    return frames.reshape(-1, channels * settings.temporal * patch * patch)


def stack_images(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Pictures [H, W, 3] of one size on the device [V, H, W, 3], without waiting for what it is doing."""
    return to_device(torch.from_numpy(np.stack(images)), device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device; from pageable memory a copy would wait until the GPU has done all it was told."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def tower_arguments(grids: Sequence[Grid], vision_tower: Any, device: torch.device) -> dict[str, Any]:
    """What the vision tower would make of the grids, waiting for the device each time: places and windows."""
    arguments = _tower_arguments(
        tuple(grids),
        vision_tower.spatial_merge_size,
        vision_tower.window_size,
        vision_tower.patch_size,
    )
    return {
        name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }


@lru_cache(maxsize=64)
def _tower_arguments(grids: tuple[Grid, ...], merge: int, window: int, patch: int) -> dict[str, Any]:
    grids_V3 = torch.tensor(grids)
    lengths = vision_utils.get_vision_cu_seqlens(grids_V3)
    window_index_T, windows = vision_utils.get_vision_window_index(grids_V3, merge, window, patch)
    return {
        "position_ids": vision_utils.get_vision_position_ids(grids_V3, merge),
        "cu_seqlens": lengths,
        "max_seqlen": int(lengths.diff().max()),
        "window_index": window_index_T,
        "cu_window_seqlens": windows,
        "max_window_seqlen": int(windows.diff().max()),
    }
