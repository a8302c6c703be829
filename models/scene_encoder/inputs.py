"""What the scene encoder reads of a scene: sampled points in the model frame and their extra channels.

Shapes: N points kept, A points of the scene, F extra channels, W channels of multi-view features.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from ...datasets.multiview import MultiviewFeatures
from ...datasets.scene import Scene

NOT_FINITE = "The scene has points with NaN or infinite coordinates; clean the scan first."


class PointInput(NamedTuple):
    """One scene for the encoder, float32."""

    points_N3: np.ndarray  # metres, model frame (z = 0 is the floor)
    features_NF: np.ndarray  # see point_features


def feature_dim(
    *, use_color: bool = True, use_height: bool = True, use_normal: bool = False, multiview_dim: int = 0
) -> int:
    """Number of extra channels F."""
    return 3 * use_color + use_height + 3 * use_normal + multiview_dim


def channel_names(
    *, use_color: bool = True, use_height: bool = True, use_normal: bool = False, multiview_dim: int = 0
) -> str:
    """What the extra channels are, in their order: `color height normal multiview`, `none` where there are none."""
    asked = {"color": use_color, "height": use_height, "normal": use_normal, "multiview": multiview_dim > 0}
    return " ".join(name for name, wanted in asked.items() if wanted) or "none"


def sample_indices(num_available: int, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """`num_points` indices: without repetition where there are enough points, else all of them and repetitions."""
    if num_available == 0:
        raise ValueError("The scene has no points; check the scan file.")
    if num_available >= num_points:
        return rng.choice(num_available, num_points, replace=False)
    return np.concatenate([np.arange(num_available), rng.integers(num_available, size=num_points - num_available)])


def point_features(
    scene: Scene,
    num_points: int,
    rng: np.random.Generator,
    *,
    use_color: bool = True,
    use_height: bool = True,
    use_normal: bool = False,
    multiview_dim: int = 0,
    multiview: MultiviewFeatures | None = None,
) -> PointInput:
    """Sample a scene for the encoder; what is sampled depends on the generator alone.

    Args:
        multiview_dim: channels W of multi-view features; 0 for none.
        multiview: where they come from.

    Raises:
        ValueError: NaN coordinates, or no multi-view features where they are asked for.
    """
    if multiview_dim and multiview is None:
        raise ValueError(
            f"The scene encoder takes {multiview_dim} multi-view features a point, but no file of them is given; name "
            "it by data.multiview, or by --multiview."
        )
    kept_N = sample_indices(len(scene.points_N3), num_points, rng)
    return features_of(
        scene.to_model(scene.points_N3[kept_N]),
        scene.colors_N3[kept_N],
        use_color=use_color,
        use_height=use_height,
        normals_N3=scene_normals(scene)[kept_N] if use_normal else None,
        multiview_NW=multiview.of(scene, kept_N) if multiview_dim and multiview is not None else None,
    )


def features_of(
    points_N3: np.ndarray,
    colors_N3: np.ndarray,
    *,
    use_color: bool = True,
    use_height: bool = True,
    normals_N3: np.ndarray | None = None,
    multiview_NW: np.ndarray | None = None,
) -> PointInput:
    """Points in the model frame (augmented or not) with their channels.

    Channels, in this order and as asked for: colour (3, in 0..1, from uint8), height above the floor (1, metres),
    normal (3, unit, towards the scene's middle, turned as the points are), multi-view features (W).

    Raises:
        ValueError: NaN coordinates.
    """
    if not np.isfinite(points_N3).all():
        raise ValueError(NOT_FINITE)
    channels = []
    if use_color:
        channels.append(colors_N3.astype(np.float32) / 255)
    if use_height:
        channels.append(points_N3[:, 2:3].astype(np.float32))
    channels += [extra_NX for extra_NX in (normals_N3, multiview_NW) if extra_NX is not None]
    nothing_N0 = np.zeros((len(points_N3), 0), np.float32)
    features_NF = np.concatenate([nothing_N0, *channels], 1, dtype=np.float32)
    return PointInput(points_N3.astype(np.float32), features_NF)


def scene_normals(scene: Scene) -> np.ndarray:
    """Unit normals [A, 3], float16, of all points of a scene, as `estimate_normals` makes them.

    They are made once and kept with the scene: the full cloud's are truer than a sample's, and they take a quarter of
    a second for 50,000 points.
    """
    if scene.normals_N3 is None:
        scene.normals_N3 = estimate_normals(scene.points_N3).astype(np.float16)
    return scene.normals_N3


def estimate_normals(points_N3: np.ndarray, num_neighbors: int = 16) -> np.ndarray:
    """Unit normals [N, 3] of the planes through each point's neighbours, turned towards the cloud's mean position."""
    if not np.isfinite(points_N3).all():
        raise ValueError(NOT_FINITE)
    if len(points_N3) < 3:
        raise ValueError(f"Normals need at least 3 points, the cloud has {len(points_N3)}; set use_normal=False.")
    _, neighbor_NK = KDTree(points_N3).query(points_N3, k=min(num_neighbors, len(points_N3)))
    around_NK3 = points_N3[neighbor_NK].astype(np.float64)
    around_NK3 -= around_NK3.mean(1, keepdims=True)
    _, axes_N33 = np.linalg.eigh(np.einsum("nki,nkj->nij", around_NK3, around_NK3))
    normal_N3 = axes_N33[:, :, 0]  # the direction of least spread
    towards_N3 = points_N3.mean(0) - points_N3
    turned_N1 = np.where((normal_N3 * towards_N3).sum(1, keepdims=True) < 0, -1.0, 1.0)
    return (normal_N3 * turned_N1).astype(np.float32)
