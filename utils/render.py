"""Rendering in plain torch, on the CPU or a GPU: triangles (`rasterize`), points (`splat`), box wireframes.

Both renderers settle visibility with one int64 key a candidate, (depth, index), and a scatter-minimum a pixel, so
that they are vectorised, deterministic, and name exactly which face or point each pixel shows. Numpy in and out.

Shapes: V vertices, F faces, T triangles after clipping, R (triangle, row) pairs, P candidate pixels, L pixels
of the picture in one line, H rows, W columns, K boxes. World frame, metres.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .camera import NEAR_PLANE, Camera, Render, look_at, pinhole
from .projection import visible_points
from .splat import EMPTY, splat, splat_batch

__all__ = [
    "NEAR_PLANE",
    "Camera",
    "Render",
    "draw_boxes",
    "look_at",
    "pinhole",
    "rasterize",
    "splat",
    "splat_batch",
    "visible_points",
]

Color = tuple[int, int, int]
_CHUNK = 1 << 20  # candidate pixels at a time: bounds memory at about 100 MB
_BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


def rasterize(
    vertices_V3: np.ndarray,
    faces_F3: np.ndarray,
    colors_V3: np.ndarray,
    camera: Camera,
    *,
    background: Color = (255, 255, 255),
    device: str | torch.device = "cpu",
) -> Render:
    """Render a coloured mesh, both sides of every face, with perspective-correct vertex colours.

    `index_HW` of the result is the row of `faces_F3`. Faces that cross the near plane are clipped to it, so a
    camera may stand inside the mesh. A pixel belongs to a face when its centre lies inside or on the edge; at equal
    depth the face with the lower index wins.
    """
    vertices_V3, colors_V3 = np.asarray(vertices_V3), np.asarray(colors_V3)
    faces_F3 = np.asarray(faces_F3).reshape(-1, 3)
    if vertices_V3.ndim != 2 or vertices_V3.shape[1] != 3 or colors_V3.shape != vertices_V3.shape:
        raise ValueError(
            f"A mesh needs vertices [V, 3] and as many colours, not {vertices_V3.shape} and {colors_V3.shape}."
        )
    if len(faces_F3) and not (faces_F3.min() >= 0 and faces_F3.max() < len(vertices_V3)):
        raise ValueError(f"The mesh has a face that names a vertex outside 0..{len(vertices_V3) - 1}.")
    points_V3 = torch.from_numpy(camera.to_camera(vertices_V3)).to(device)
    faces = torch.from_numpy(faces_F3.astype(np.int64)).to(device)
    colors = torch.from_numpy(colors_V3.astype(np.float64)).to(device)
    corners_T36, face_T = _clip_near(torch.cat([points_V3[faces], colors[faces]], dim=2))
    planes = _Planes(corners_T36, torch.as_tensor(camera.intrinsics_33, dtype=torch.float64, device=device))
    key_HW = _resolve(planes, face_T, camera.width, camera.height)
    return _shade(key_HW, planes, corners_T36[..., 3:], face_T, background)


def _clip_near(corners_F36: Tensor) -> tuple[Tensor, Tensor]:
    """Clip triangles (camera-frame xyz and colour a corner) to the near plane: corners [T, 3, 6] and face of each.

    One corner in front leaves a triangle, two leave a quadrilateral: two triangles.
    """
    front_F3 = corners_F36[..., 2] >= NEAR_PLANE
    count_F = front_F3.sum(1)
    parts, owners = [corners_F36[count_F == 3]], [torch.nonzero(count_F == 3)[:, 0]]
    for count in (1, 2):
        row = torch.nonzero(count_F == count)[:, 0]
        # turn each triangle so that its odd corner (alone in front, or alone behind) comes first
        odd = (front_F3[row] if count == 1 else ~front_F3[row]).int().argmax(1)
        order_3 = (odd[:, None] + torch.arange(3, device=odd.device)) % 3
        a, b, c = corners_F36[row[:, None], order_3].unbind(1)
        ab, ac = _meet_near(a, b), _meet_near(a, c)
        pieces = [(a, ab, ac)] if count == 1 else [(ab, b, c), (ab, c, ac)]
        parts += [torch.stack(piece, dim=1) for piece in pieces]
        owners += [row] * len(pieces)
    return torch.cat(parts), torch.cat(owners)


def _meet_near(start_T6: Tensor, end_T6: Tensor) -> Tensor:
    """Where segments that cross the near plane meet it, with their colours."""
    share_T1 = ((NEAR_PLANE - start_T6[:, 2]) / (end_T6[:, 2] - start_T6[:, 2]))[:, None]
    met_T6 = torch.lerp(start_T6, end_T6, share_T1)
    met_T6[:, 2] = NEAR_PLANE
    return met_T6


class _Planes:
    """Projected triangles: edges `a u + b v + c >= 0` inside, and per corner the affine weight over 1 / depth.

    `edges_T33[t, i]` is the edge opposite corner i, so that its value at a pixel, over twice the area, is the
    screen-space barycentric weight of corner i.
    """

    def __init__(self, corners_T36: Tensor, intrinsics_33: Tensor):
        self.depth_T3 = corners_T36[..., 2]
        uv_T32 = (corners_T36[..., :3] @ intrinsics_33.T)[..., :2] / self.depth_T3[..., None]
        start_T32, end_T32 = uv_T32.roll(-1, 1), uv_T32.roll(-2, 1)
        a_T3 = start_T32[..., 1] - end_T32[..., 1]
        b_T3 = end_T32[..., 0] - start_T32[..., 0]
        # antisymmetric in start and end: neighbours get the same line, so no cracks open between them
        c_T3 = start_T32[..., 0] * end_T32[..., 1] - end_T32[..., 0] * start_T32[..., 1]
        edges_T33 = torch.stack([a_T3, b_T3, c_T3], dim=2)
        area_T = c_T3.sum(1)
        self.edges_T33 = edges_T33 * torch.sign(area_T)[:, None, None]
        self.area_T = area_T.abs()
        self.lower_T2, self.upper_T2 = uv_T32.amin(1), uv_T32.amax(1)
        self.inverse_T3 = torch.einsum("tke,tk->te", self.edges_T33, 1 / self.depth_T3)
        self.inverse_T3 /= self.area_T.clamp(min=1e-12)[:, None]

    def inverse_depth(self, triangle_R: Tensor, u_R: Tensor, v_R: Tensor) -> Tensor:
        """1 / depth [R] of triangles at image coordinates, held between those of their corners."""
        a_R, b_R, c_R = self.inverse_T3[triangle_R].unbind(1)
        nearest_R, farthest_R = self.depth_T3[triangle_R].amin(1), self.depth_T3[triangle_R].amax(1)
        return (a_R * u_R + b_R * v_R + c_R).clamp(1 / farthest_R, 1 / nearest_R)

    def weights(self, triangle_P: Tensor, u_P: Tensor, v_P: Tensor) -> Tensor:
        """Screen-space barycentric weights [P, 3] over corner depth; their sum is 1 / depth of the pixel."""
        a_P3, b_P3, c_P3 = self.edges_T33[triangle_P].unbind(2)
        inside_P3 = (a_P3 * u_P[:, None] + b_P3 * v_P[:, None] + c_P3).clamp(min=0)
        # normalised by their own sum (not the area): the same number up to rounding, never outside the triangle
        return inside_P3 / inside_P3.sum(1, keepdim=True).clamp(min=1e-300) / self.depth_T3[triangle_P]


def _resolve(planes: _Planes, face_T: Tensor, width: int, height: int) -> Tensor:
    """Z-buffer [H, W] of int64 keys: float32 depth bits above, triangle below; EMPTY where nothing is seen."""
    key_L = torch.full((height * width,), EMPTY, dtype=torch.int64, device=face_T.device)
    first_T = planes.lower_T2[:, 1].ceil().clamp(0, height).long()
    last_T = planes.upper_T2[:, 1].floor().clamp(-1, height - 1).long()
    hidden_T = (planes.area_T <= 1e-12) | (planes.upper_T2[:, 0] < 0) | (planes.lower_T2[:, 0] > width - 1)
    rows_T = torch.where(hidden_T, 0, last_T - first_T + 1).clamp(min=0)
    for triangle_R, step_R in _expand_chunks(rows_T, _CHUNK // 16):
        row_R = first_T[triangle_R] + step_R
        left_R, right_R = _spans(planes.edges_T33[triangle_R], row_R.double(), width)
        width_R = (right_R - left_R + 1).clamp(min=0)
        # 1 / depth is linear along a row of one triangle
        start_R = planes.inverse_depth(triangle_R, left_R.double(), row_R.double())
        end_R = planes.inverse_depth(triangle_R, right_R.double(), row_R.double())
        slope_R = (end_R - start_R) / (width_R - 1).clamp(min=1)
        pixel_R = row_R * width + left_R
        for pair_P, step_P in _expand_chunks(width_R, _CHUNK):
            depth_P = 1 / torch.addcmul(start_R[pair_P], slope_R[pair_P], step_P)
            # positive float32 bits keep their order as integers
            bits_P = depth_P.float().view(torch.int32).long()
            key_L.scatter_reduce_(0, pixel_R[pair_P] + step_P, (bits_P << 32) | triangle_R[pair_P], "amin")
    return key_L.view(height, width)


def _expand_chunks(count_T: Tensor, limit: int):
    """Yield (item, step) index pairs, step 0..count-1 of every item, about `limit` (or one item) at a time."""
    live = torch.nonzero(count_T)[:, 0]
    if not len(live):
        return
    total = torch.cumsum(count_T[live], 0)
    chunk = torch.div(total - 1, limit, rounding_mode="floor")
    sizes = torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
    for items in torch.split(live, sizes):
        count = count_T[items]
        item_P = torch.repeat_interleave(items, count)
        start_P = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
        yield item_P, torch.arange(len(item_P), device=items.device) - start_P


def _spans(edges_R33: Tensor, row_R: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """First and last column whose pixel centre lies inside a triangle, a row each; empty where last < first."""
    a_R3, b_R3, c_R3 = edges_R33.unbind(2)
    rest_R3 = b_R3 * row_R[:, None] + c_R3
    bound_R3 = -rest_R3 / torch.where(a_R3 == 0, 1.0, a_R3)
    left_R = torch.where(a_R3 > 0, bound_R3, -1.0).amax(1).clamp(0, width).ceil()
    right_R = torch.where(a_R3 < 0, bound_R3, float(width)).amin(1).clamp(-1, width - 1).floor()
    outside_R = ((a_R3 == 0) & (rest_R3 < 0)).any(1)
    return left_R.long(), torch.where(outside_R, -1.0, right_R).long()


def _shade(key_HW: Tensor, planes: _Planes, colors_T33: Tensor, face_T: Tensor, background: Color) -> Render:
    """Colours, depth and face of the pixels that the z-buffer kept."""
    v_P, u_P = torch.nonzero(key_HW != EMPTY, as_tuple=True)
    triangle_P = key_HW[v_P, u_P] & 0xFFFFFFFF
    weights_P3 = planes.weights(triangle_P, u_P.double(), v_P.double())
    inverse_P = weights_P3.sum(1)
    mixed_P3 = torch.einsum("pk,pkc->pc", weights_P3, colors_T33[triangle_P]) / inverse_P[:, None]
    color_P3 = (mixed_P3 + 0.5).clamp(0, 255).to(torch.uint8)
    return _unpack(key_HW.shape, (v_P, u_P), color_P3, 1 / inverse_P, face_T[triangle_P], background)


def _unpack(
    size_HW: Sequence[int],
    where: tuple[Tensor, ...],
    color_P3: Tensor,
    depth_P: Tensor,
    index_P: Tensor,
    background: tuple[int, int, int],
) -> Render:
    """A Render from the values of the P pixels `where` (rows, columns) that show something."""
    height, width = size_HW
    device = depth_P.device
    color_HW3 = torch.tensor(background, dtype=torch.uint8, device=device).expand(height, width, 3).clone()
    depth_HW = torch.zeros(height, width, device=device)
    index_HW = torch.full((height, width), -1, dtype=torch.int32, device=device)
    color_HW3[where], depth_HW[where], index_HW[where] = color_P3, depth_P.float(), index_P.int()
    return Render(color_HW3.cpu().numpy(), depth_HW.cpu().numpy(), index_HW.cpu().numpy())


def draw_boxes(
    image_HW3: np.ndarray,
    boxes_K7: np.ndarray,
    camera: Camera,
    colors: Color | Sequence[Color] | np.ndarray,
    width: int = 2,
) -> np.ndarray:
    """A copy of a picture (uint8) with the wireframes of world-frame boxes drawn over it.

    `colors` is one colour for all boxes or one a box; edges are clipped to the near plane and to the picture.
    """
    boxes_K7 = np.asarray(boxes_K7, dtype=np.float64).reshape(-1, 7)
    colors_K3 = np.broadcast_to(np.asarray(colors, dtype=np.int64), (len(boxes_K7), 3))
    picture = Image.fromarray(np.ascontiguousarray(image_HW3))
    pen = ImageDraw.Draw(picture)
    for box_7, color_3 in zip(boxes_K7, colors_K3, strict=True):
        corners_83 = camera.to_camera(_corners(box_7))
        for start, end in _BOX_EDGES:
            segment = _visible_segment(corners_83[start], corners_83[end], camera)
            if segment is not None:
                pen.line(segment, fill=tuple(int(value) for value in color_3), width=width)
    return np.asarray(picture)


def _corners(box_7: np.ndarray) -> np.ndarray:
    """Corners [8, 3] of one box: four below, counter-clockwise, then the four above them."""
    signs_83 = np.array([[x, y, z] for z in (-1, 1) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    offsets_83 = signs_83 * box_7[3:6] / 2
    cos, sin = np.cos(box_7[6]), np.sin(box_7[6])
    turn_33 = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return offsets_83 @ turn_33.T + box_7[:3]


def _visible_segment(start_3: np.ndarray, end_3: np.ndarray, camera: Camera) -> tuple[int, ...] | None:
    """Pixels (u0, v0, u1, v1) at the ends of the part of a camera-frame segment inside the picture, or None."""
    low, high = 0.0, 1.0
    matrix_33 = np.asarray(camera.intrinsics_33, dtype=np.float64)
    # the view volume as half spaces n . p >= d of the homogeneous image point (u z, v z, z)
    limits = (
        ((0.0, 0.0, 1.0), NEAR_PLANE),
        ((1.0, 0.0, 0.5), 0.0),
        ((-1.0, 0.0, camera.width - 0.5), 0.0),
        ((0.0, 1.0, 0.5), 0.0),
        ((0.0, -1.0, camera.height - 0.5), 0.0),
    )
    start_3, end_3 = matrix_33 @ start_3, matrix_33 @ end_3
    for normal, offset in limits:
        at_start, at_end = np.dot(normal, start_3) - offset, np.dot(normal, end_3) - offset
        if at_start < 0 and at_end < 0:
            return None
        if at_start < 0:
            low = max(low, at_start / (at_start - at_end))
        elif at_end < 0:
            high = min(high, at_start / (at_start - at_end))
    if low >= high:
        return None
    first_3, last_3 = start_3 + low * (end_3 - start_3), start_3 + high * (end_3 - start_3)
    ends_4 = np.concatenate([first_3[:2] / first_3[2], last_3[:2] / last_3[2]])
    return tuple(np.rint(ends_4).astype(int).tolist())  # the pen truncates
