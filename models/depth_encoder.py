"""Depth of the views in metres, and what depth tokens are made of.

A posed frame has its sensor's depth, a rendered view the renderer's. For frames without a sensor Depth-Anything-V2
(transformers, frozen) says what is near and what is far. The relative checkpoints predict inverse depth up to a scale
and a shift, which are found from the scan's points that the view sees; the metric ones predict metres.

Shapes: V views, H rows, W columns, n points, G cells a side, P numbers a cell.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from ..datasets.frames import read_depth
from ..datasets.scene import Frame, Scene
from ..utils.camera import Camera
from ..utils.render import splat_batch
from .view_pool import ViewPool, display_colors

CELL = 8  # samples a side of the depth that one token is made of
CELL_WIDTH = 2 * CELL * CELL  # P: log(1 + metres), and the share of pixels with a depth, of each sample
_FARTHEST = 20.0  # metres; a prediction beyond is no measurement
_LEAST_POINTS = 16  # to find a scale and a shift from
_ROUNDS = 30  # of reweighting, each of which trusts points less that are far off the line


class DepthEncoder(nn.Module):
    """Depth-Anything (V1 or V2), frozen.

    Args:
        model: transformers' DepthAnythingForDepthEstimation.
        image_processor: its PIL image processor.
    """

    def __init__(self, model: nn.Module, image_processor: object):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.is_metric: bool = model.config.depth_estimation_type == "metric"  # type: ignore[union-attr]

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray], batch_size: int = 8) -> Tensor:
        """Predictions [V, H, W], float32, of pictures [H, W, 3] uint8 of one size.

        In metres with a metric checkpoint, else inverse depth up to scale and shift, larger for what is nearer.
        """
        assert len(images), "a batch of pictures is never empty"
        weight = next(self.model.parameters())
        found = []
        for start in range(0, len(images), batch_size):
            part = list(images[start : start + batch_size])
            pixels_V3HW = self.image_processor(images=part, return_tensors="pt")["pixel_values"]  # type: ignore[operator]
            predicted_VHW = self.model(pixels_V3HW.to(weight.device, weight.dtype)).predicted_depth
            size = part[0].shape[:2]
            found.append(F.interpolate(predicted_VHW[:, None].float(), size, mode="bilinear")[:, 0])
        return torch.cat(found)


def load_depth_encoder(name: str, *, dtype: torch.dtype = torch.float32) -> DepthEncoder:
    """Load Depth-Anything by hub name or local folder; ValueError where that is not what is there."""
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "depth_anything":
            raise ValueError(f"it is of the kind {config.model_type}, not depth_anything")
        model = AutoModelForDepthEstimation.from_pretrained(name, dtype=dtype)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Cannot load the depth encoder {name!r} ({reason}); give a folder or a hub name of Depth-Anything-V2, "
            "for instance depth-anything/Depth-Anything-V2-Large-hf, or leave model.depth.encoder empty."
        ) from error
    return DepthEncoder(model, processor)


def align_depth(inverse_HW: Tensor, uv_n2: np.ndarray, depth_n: np.ndarray) -> Tensor:
    """Metric depth [H, W] of a relative prediction, metres, 0 where it is not known.

    1 / depth = scale * prediction + shift is fitted to points that the view sees, by least absolute deviations, so
    that points seen through a hole or at a rim do not bend it. All is 0 where fewer than 16 points are given, where
    the prediction is the same at all of them, and where it says that near points are far.

    Args:
        inverse_HW: the prediction.
        uv_n2: image coordinates of the points, pixels (u along the columns); those outside are left out.
        depth_n: their depth in metres; points that are not in front of the camera are left out.
    """
    height, width = inverse_HW.shape
    column_n, row_n = np.rint(uv_n2).astype(np.int64).reshape(-1, 2).T
    used_n = (column_n >= 0) & (column_n < width) & (row_n >= 0) & (row_n < height) & (depth_n > 0)
    nothing_HW = torch.zeros_like(inverse_HW)
    if used_n.sum() < _LEAST_POINTS:
        return nothing_HW
    predicted_n = inverse_HW.cpu().numpy()[row_n[used_n], column_n[used_n]].astype(np.float64)
    if np.ptp(predicted_n) <= 1e-6 * max(1e-6, float(np.abs(predicted_n).max())):
        return nothing_HW
    scale, shift = _fit_line(predicted_n, 1 / depth_n[used_n].astype(np.float64))
    if scale <= 0:
        return nothing_HW
    metric_HW = scale * inverse_HW + shift
    return torch.where(metric_HW >= 1 / _FARTHEST, 1 / metric_HW.clamp(min=1 / _FARTHEST), 0.0)


def _fit_line(x_n: np.ndarray, y_n: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the line of least absolute deviations, by reweighted least squares."""
    design_n2 = np.stack([x_n, np.ones_like(x_n)], axis=1)
    weight_n = np.ones_like(x_n)
    line_2 = np.zeros(2)
    for _ in range(_ROUNDS):
        root_n = np.sqrt(weight_n)
        line_2 = np.linalg.lstsq(design_n2 * root_n[:, None], y_n * root_n, rcond=None)[0]
        weight_n = 1 / np.maximum(np.abs(design_n2 @ line_2 - y_n), 1e-5)
    return float(line_2[0]), float(line_2[1])


def view_depths(
    scene: Scene, pool: ViewPool, encoder: DepthEncoder | None, device: str | torch.device = "cpu"
) -> Tensor:
    """Depth maps [V, H, W] of a pool's views: metres along z, float32, 0 for none.

    The sensor's where the frame has it. Of a frame without one, the encoder's prediction, or, without an encoder, the
    rendered depth of the scan, which is also that of rendered views.

    Raises:
        ValueError: a depth file that cannot be read.
    """
    found: dict[int, Tensor] = {}
    without, rendered = [], []
    for view, name in enumerate(pool.names):
        frame = _frame_of(scene, name)
        if frame is not None and frame.depth_path is not None:
            found[view] = torch.from_numpy(_sensor_depth(frame.depth_path, pool.cameras[view])).to(device)
        elif frame is not None and encoder is not None:
            without.append(view)
        else:
            rendered.append(view)
    if without and encoder is not None:
        maps_VHW = encoder.to(device).predict([pool.images_VHW3[view] for view in without])
        for view, map_HW in zip(without, maps_VHW, strict=True):
            found[view] = map_HW if encoder.is_metric else align_depth(map_HW, *_seen_points(pool, view))
    if rendered:
        cameras = [pool.cameras[view] for view in rendered]
        renders = splat_batch(scene.points_N3, display_colors(scene), cameras, smooth=False, device=device)
        for view, render in zip(rendered, renders, strict=True):
            found[view] = torch.from_numpy(np.array(render.depth_HW)).to(device)
    return torch.stack([found[view].float() for view in range(len(pool))])


def _frame_of(scene: Scene, name: str) -> Frame | None:
    """The frame that a view of a pool is, by its name; None for a rendered view."""
    kind, _, number = name.partition(" ")
    return scene.frames[int(number)] if kind == "frame" else None


def _sensor_depth(path: str, camera: Camera) -> np.ndarray:
    depth = Image.fromarray(read_depth(path))
    return np.array(depth.resize((camera.width, camera.height), Image.Resampling.NEAREST))


def _seen_points(pool: ViewPool, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates [n, 2] and depth [n] of the scan's points that a view sees."""
    return pool.cameras[view].project(pool.points_N3[pool.seen_VN[view]])


def depth_cells(depth_VHW: Tensor, num_tokens: int) -> Tensor:
    """What depth tokens are made of: [V, G * G, P], cells of the picture row by row, `num_tokens` = G * G.

    Each cell is averaged down to 8 x 8 samples over the pixels that have a depth. A sample is log(1 + metres), 0 where
    no pixel has a depth, and the share of its pixels that have one.
    """
    side = grid_side(num_tokens)
    known_VHW = (torch.isfinite(depth_VHW) & (depth_VHW > 0)).float()
    depth_VHW = torch.where(known_VHW > 0, depth_VHW, 0.0)
    both_V2HW = F.adaptive_avg_pool2d(torch.stack([depth_VHW, known_VHW], dim=1), side * CELL)
    share_VHW = both_V2HW[:, 1]
    mean_VHW = torch.where(share_VHW > 0, both_V2HW[:, 0] / share_VHW.clamp(min=1e-6), 0.0)
    samples_V2HW = torch.stack([mean_VHW.log1p(), share_VHW], dim=1)
    cells = samples_V2HW.unflatten(3, (side, CELL)).unflatten(2, (side, CELL))  # V, 2, row, y, column, x
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(depth_VHW), num_tokens, CELL_WIDTH)


def grid_side(num_tokens: int) -> int:
    """Side of the square grid of a view's tokens; ValueError where it is none."""
    side = round(max(num_tokens, 0) ** 0.5)
    if side * side != num_tokens:
        raise ValueError(f"A view's tokens form a square grid, so {num_tokens} cannot be; take 1, 4, 9, 16 or 25.")
    return side
