"""Training augmentation that changes what is in a scene: random cuboid, object dropout, colours, point jitter.

Where a scene is moved as a whole, transforms.py has it; `SceneAugmentation` applies both in their order. The functions
take arrays in any one frame that is z up.

Shapes: N points, K objects with a box, M of them that stay, P points that stay.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from .labelled_cloud import GREY
from .scene import Scene
from .transforms import Augmentation, Transform

_ASPECT, _TRIES = 0.8, 50  # 3DETR takes the same limit, and 100 tries
_FEWEST_POINTS = 20  # an object that is cut and has fewer left is no target: its extents would be chance
_LARGEST_NOISE = 3.0  # standard deviations


def random_cuboids(
    points_N3: np.ndarray, rng: np.random.Generator, *, min_share: float, min_points: int, aspect: float = _ASPECT
) -> Iterator[np.ndarray]:
    """Random boxes of a scene, each as a mask [N] of the points inside: DepthContrast's crop as 3DETR takes it.

    A box is centred on a random point. Along each axis it is long a share between `min_share` and 1 of the scene's
    extent; the shares of two axes at least are alike (the smaller >= `aspect` times the larger). Boxes of fewer than
    `min_points` points are left out, and after some tries there are no more. The same number of random values is drawn
    whatever comes of them.
    """
    shares_T3 = min_share + rng.random((_TRIES, 3)) * (1 - min_share)
    centers_T = rng.random(_TRIES)
    if len(points_N3) < max(1, min_points):
        return
    columns_3N = np.ascontiguousarray(points_N3.T)
    half_3 = (columns_3N.max(1) - columns_3N.min(1)) / 2
    for share_3, center in zip(shares_T3, centers_T, strict=True):
        low, middle, high = np.sort(share_3)
        if max(low / middle, middle / high) < aspect:
            continue
        center_3 = points_N3[int(center * len(points_N3))]
        inside_N = np.ones(len(points_N3), bool)
        for column_N, middle, half in zip(columns_3N, center_3, (half_3 * share_3).astype(np.float32), strict=True):
            inside_N &= np.abs(column_N - middle) <= half
            if np.count_nonzero(inside_N) < min_points:
                break
        else:
            yield inside_N


class CutObjects(NamedTuple):
    """Objects that stay when a scene is cut."""

    rows_M: np.ndarray  # rows of the objects among the K
    boxes_M7: np.ndarray
    points: list[np.ndarray | None]  # M: what remains [P, 3] of an object that was cut, None for a whole one


def cut_objects(
    points_N3: np.ndarray,
    instance_ids_N: np.ndarray,
    object_ids_K: np.ndarray,
    boxes_K7: np.ndarray,
    kept_N: np.ndarray,
    *,
    min_share: float = 0.5,
) -> CutObjects:
    """Objects and axis-aligned boxes of the part `kept_N` (mask) of a scene.

    An object stays where at least `min_share` of its own points do, and 20 of them unless it is whole. 3DETR asks
    instead whether the box's centre is inside, and keeps the whole box: a target then reaches into space that the
    model cannot see, and a sofa in an L, whose centre is empty, is lost or kept by chance. So the box is fitted to
    what remains: a side moves to the outermost point left where the object's outermost point is gone, and else stays.
    An object with no point in the cloud is no target either: nothing says whether it is inside.
    """
    slots = int(max(instance_ids_N.max(initial=-1), object_ids_K.max(initial=-1))) + 2  # slot 0: points of no object
    slots_N = instance_ids_N.astype(np.intp) + 1
    slots_K = object_ids_K.astype(np.intp) + 1
    gone_K, left_K = np.bincount(2 * slots_N + kept_N, minlength=2 * slots).reshape(slots, 2)[slots_K].T
    whole_K = (gone_K == 0) & (left_K > 0)
    cut_K = ~whole_K & (left_K >= np.maximum(min_share * (gone_K + left_K), _FEWEST_POINTS))
    of_cut = np.zeros(slots, bool)
    of_cut[slots_K[cut_K]] = True
    own_P = np.flatnonzero(of_cut.take(slots_N))
    own_P3, own_slots_P, own_kept_P = points_N3.take(own_P, axis=0), slots_N.take(own_P), kept_N.take(own_P)
    rows_M = np.flatnonzero(whole_K | cut_K)
    boxes_M7 = np.array(boxes_K7[rows_M], np.float32).reshape(-1, 7)
    points: list[np.ndarray | None] = [None] * len(rows_M)
    for place in np.flatnonzero(cut_K[rows_M]):
        mine_P = own_slots_P == slots_K[rows_M[place]]
        left_P3 = own_P3[mine_P & own_kept_P]
        _fit_cut_box(boxes_M7[place], own_P3[mine_P], left_P3)
        points[place] = left_P3
    return CutObjects(rows_M, boxes_M7, points)


def _fit_cut_box(box_7: np.ndarray, all_P3: np.ndarray, left_P3: np.ndarray) -> None:
    """Move the sides of one box in place where the object's outermost point is gone."""
    low_3, high_3 = box_7[:3] - box_7[3:6] / 2, box_7[:3] + box_7[3:6] / 2
    (low_all_3, high_all_3), (low_left_3, high_left_3) = _extent(all_P3), _extent(left_P3)
    low_3 = np.where(low_left_3 > low_all_3, low_left_3, low_3)
    high_3 = np.where(high_left_3 < high_all_3, high_left_3, high_3)
    box_7[:3], box_7[3:6] = (low_3 + high_3) / 2, high_3 - low_3


def _extent(points_P3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    columns_3P = np.ascontiguousarray(points_P3.T)  # NumPy is many times faster along the last axis
    return columns_3P.min(1), columns_3P.max(1)


def drop_objects(
    instance_ids_N: np.ndarray, object_ids_K: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out whole objects, each with probability `share`; one at least stays.

    For clouds that are composed of labelled instances: anywhere else it would cut holes into floors and walls.

    Returns:
        masks of the points [N] and of the objects [K] that stay.

    Raises:
        ValueError: some points belong to no instance.
    """
    lowest = int(instance_ids_N.min(initial=0))
    if lowest < 0:
        raise ValueError(
            "The scene has points of no instance, where dropped objects would leave holes; "
            "set augment.object_dropout to 0."
        )
    value_K = rng.random(len(object_ids_K))
    stays_K = (value_K >= share) | (value_K == value_K.max(initial=0.0))
    dropped = np.zeros(int(max(instance_ids_N.max(initial=0), object_ids_K.max(initial=0))) + 1, bool)
    dropped[object_ids_K[~stays_K]] = True
    return ~dropped[instance_ids_N], stays_K


def change_colors(
    colors_N3: np.ndarray, rng: np.random.Generator, *, change: float, noise: float, drop: float
) -> np.ndarray:
    """Colours (float, 0..1) of one scene as under another light and camera, float32 within 0..1.

    Args:
        change: brightness is moved by up to this much, and contrast, about the scene's mean, by up to this share.
        noise: standard deviation of what is added to every channel of every point.
        drop: probability that the scene loses its colours and is grey throughout, as sources without colours are.
    """
    brightness, contrast = rng.uniform(-change, change, 2)
    if rng.random() < drop:
        return np.full(colors_N3.shape, GREY / 255, np.float32)
    mean = float(colors_N3.mean()) if colors_N3.size else 0.0
    changed_N3 = colors_N3 * np.float32(1 + contrast) + np.float32(brightness - mean * contrast)
    if noise:
        changed_N3 += _gaussian(changed_N3.shape, noise, rng)
    return np.clip(changed_N3, 0, 1, out=changed_N3)


def jitter_points(points_N3: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Points moved by Gaussian noise of this standard deviation (metres), at most 3 times it along an axis."""
    return points_N3 + _gaussian(points_N3.shape, deviation, rng)


def _gaussian(shape: tuple[int, ...], deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise cut off at 3 standard deviations, float32: five times as fast as `standard_normal`."""
    table = _quantiles() * np.float32(deviation)
    return table.take(rng.integers(len(table), size=shape, dtype=np.uint16))


@functools.cache
def _quantiles() -> np.ndarray:
    """Middles of 65536 slices, equally probable, of the standard normal distribution, those beyond 3 set to 3."""
    quantiles = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16))
    return np.clip(quantiles, -_LARGEST_NOISE, _LARGEST_NOISE).astype(np.float32)


class ScenePart(NamedTuple):
    """What a sample is taken from; boxes and outlines in the model frame."""

    kept_P: np.ndarray | None  # indices of the scene's points, None for all
    rows_M: np.ndarray  # rows of the scene's objects
    boxes_M7: np.ndarray
    outlines: list[np.ndarray | None]  # M, as transforms.object_outlines


@dataclass(frozen=True)
class SceneAugmentation:
    """All augmentation of a scene; `part`, `moved` and `recolored` are called in this order with one generator.

    The transform is drawn from that generator, everything else from streams spawned from it, one each and in a fixed
    order: switching one augmentation on or off leaves the others as they were.
    """

    motion: Augmentation = Augmentation()
    cuboid: float = 0.0  # probability
    cuboid_min_share: float = 0.5  # of the scene's extents
    cuboid_min_points: float = 0.3  # of the scene's points
    object_dropout: float = 0.0
    jitter: float = 0.0  # metres
    color_change: float = 0.0
    color_noise: float = 0.0
    color_drop: float = 0.0

    def part(self, scene: Scene, outlines: Sequence[np.ndarray | None], rng: np.random.Generator) -> ScenePart:
        """The points and objects of a scene that stay; `outlines` are those of all its objects in the model frame.

        The model frame stays the whole scene's: a part lies somewhere in it, on its floor.
        """
        drop_rng, cuboid_rng = rng.spawn(2)
        points_P3, ids_P, kept_P = scene.points_N3, scene.instance_ids_N, None
        rows_M, boxes_M7 = np.arange(len(scene.boxes_K7)), scene.boxes_K7
        if self.object_dropout:
            kept_N, stays_K = drop_objects(ids_P, scene.object_ids_K, self.object_dropout, drop_rng)
            kept_P, rows_M, boxes_M7 = np.flatnonzero(kept_N), np.flatnonzero(stays_K), boxes_M7[stays_K]
            points_P3, ids_P = points_P3.take(kept_P, axis=0), ids_P.take(kept_P)
        outlines = [outlines[row] for row in rows_M.tolist()]
        if cuboid_rng.random() < self.cuboid:
            found = self._cut(points_P3, ids_P, scene.object_ids_K[rows_M], boxes_M7, cuboid_rng)
            if found is not None:
                inside_P, left = found
                kept_P = np.flatnonzero(inside_P) if kept_P is None else kept_P[inside_P]
                rows_M, boxes_M7 = rows_M[left.rows_M], left.boxes_M7
                outlines = [
                    outlines[row] if own_P3 is None else scene.to_model(own_P3)[:, :2].astype(np.float64)
                    for row, own_P3 in zip(left.rows_M.tolist(), left.points, strict=True)
                ]
        return ScenePart(kept_P, rows_M, scene.to_model(boxes_M7), outlines)

    def _cut(
        self,
        points_P3: np.ndarray,
        ids_P: np.ndarray,
        object_ids_K: np.ndarray,
        boxes_K7: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, CutObjects] | None:
        """The first random cuboid with an object in it, as a mask [P]; None where none is found: the whole scene."""
        min_points = int(np.ceil(self.cuboid_min_points * len(points_P3)))
        for inside_P in random_cuboids(points_P3, rng, min_share=self.cuboid_min_share, min_points=min_points):
            left = cut_objects(points_P3, ids_P, object_ids_K, boxes_K7, inside_P)
            if len(left.rows_M) or not len(object_ids_K):
                return inside_P, left
        return None

    def moved(
        self, points_N3: np.ndarray, part: ScenePart, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, Transform]:
        """Sampled points (model frame) and the part's boxes after a transform, and which. Jitter moves no box."""
        transform = self.motion.draw(rng)
        (jitter_rng,) = rng.spawn(1)
        boxes_M7 = transform.axis_aligned_boxes(part.boxes_M7, part.outlines)
        points_N3 = transform.points(points_N3)
        if self.jitter:
            points_N3 = jitter_points(points_N3, self.jitter, jitter_rng)
        return points_N3, boxes_M7, transform

    def recolored(self, colors_N3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Colours (float, 0..1) of sampled points, changed."""
        (color_rng,) = rng.spawn(1)
        if not (self.color_change or self.color_noise or self.color_drop):
            return colors_N3
        colors_N3 = np.ascontiguousarray(colors_N3)
        return change_colors(
            colors_N3, color_rng, change=self.color_change, noise=self.color_noise, drop=self.color_drop
        )
