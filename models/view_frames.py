"""Which posed frames of a scan become candidate views: usable, sharp, spread out in pose space, no near-copies.

Shapes: F frames, H rows, W columns. World frame, metres.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from ..datasets.scene import Frame
from .view_cameras import spread

TURN_METRES = 1.5  # a turn by 60 degrees separates two frames as much as so many metres
SAME_VIEW = 0.15  # metres in pose space; a frame nearer to a chosen one shows what that one shows
_RIGID = 0.05  # that R^T R of a pose may differ from the identity: poses are written with few decimals
_RIVALS = 4  # frames that show what a chosen one shows and may take its place by being sharper
# At 320 x 240, 7-Scenes' frames lie between 0.26 and 0.46; smeared by a Gaussian of 2 pixels 0.7, of 3 0.8
_BLURRED, _WORSE = 0.75, 0.15
_JUDGED_WIDTH, _WINDOW = 320, 9  # pixels
_EDGE, _LEAST_EDGES = 2.0, 0.01  # grey levels between neighbours that count; share of them that says anything


def is_usable(frame: Frame) -> bool:
    """Whether a frame's pose and intrinsics are those of a camera: a finite rigid pose, positive focal lengths.

    ScanNet writes a pose full of infinities where tracking was lost, other tools one of zeros.
    """
    pose_44, matrix_33 = np.asarray(frame.pose_44), np.asarray(frame.intrinsics_33)
    if pose_44.shape != (4, 4) or matrix_33.shape != (3, 3):
        return False
    if not (np.isfinite(pose_44).all() and np.isfinite(matrix_33).all()):
        return False
    turn_33 = pose_44[:3, :3].astype(np.float64)
    rigid = np.abs(turn_33.T @ turn_33 - np.eye(3)).max() < _RIGID
    return bool(rigid and min(matrix_33[0, 0], matrix_33[1, 1]) > 0)


def pose_rows(frames: Sequence[Frame]) -> np.ndarray:
    """Frames as rows [F, 6] of pose space: position and scaled viewing direction."""
    rows = [np.r_[frame.pose_44[:3, 3], TURN_METRES * frame.pose_44[:3, 2]] for frame in frames]
    return np.stack(rows) if rows else np.zeros((0, 6))


def spread_frames(frames: Sequence[Frame], count: int) -> list[int]:
    """Indices of at most `count` usable frames spread evenly in pose space, in frame order.

    Frames that show what an earlier choice shows (within `SAME_VIEW`) are left out, so there may be fewer.
    """
    usable = [row for row, frame in enumerate(frames) if is_usable(frame)]
    if not usable or count < 1:
        return []
    pose_F6 = pose_rows([frames[row] for row in usable])
    chosen = spread(pose_F6, count)  # the first is the middle one, the others come by falling distance
    kept: list[int] = []
    for row in chosen:
        if not kept or np.linalg.norm(pose_F6[kept] - pose_F6[row], axis=1).min() >= SAME_VIEW:
            kept.append(int(row))
    return sorted(usable[row] for row in kept)


def blur(image: Image.Image) -> float:
    """How blurred a picture is, in [0, 1], whatever it shows: low for sharp edges, near 1 for a smear, 0 for no edges.

    The no-reference measure of Crete et al. 2007: blurring a sharp picture once more takes most of the differences
    between neighbouring pixels away, blurring a blurred one takes few. The worse of the two axes counts.
    """
    height = max(1, round(image.height * _JUDGED_WIDTH / image.width))
    gray_HW = np.asarray(image.convert("L").resize((_JUDGED_WIDTH, height)), dtype=np.float32)
    found = [0.0]
    for axis in (0, 1):
        own = np.abs(np.diff(gray_HW, axis=axis))
        again = np.abs(np.diff(ndimage.uniform_filter1d(gray_HW, _WINDOW, axis=axis), axis=axis))
        edge = own > _EDGE
        if edge.mean() > _LEAST_EDGES:
            found.append(float(np.minimum(again, own)[edge].sum() / own[edge].sum()))
    return max(found)


def choose_frames(frames: Sequence[Frame], count: int) -> list[int]:
    """Indices of at most `count` frames to look at, in frame order; reads at most five pictures for each.

    Spread in pose space; each gives way to a sharper frame from about the same place; those that stay blurred, where
    the others are not, are left out.

    Raises:
        ValueError: a picture that cannot be read.
    """
    chosen = spread_frames(frames, count)
    usable = [row for row, frame in enumerate(frames) if is_usable(frame)]
    pose_F6 = pose_rows([frames[row] for row in usable])
    kept: dict[int, float] = {}
    for row in chosen:
        distance_F = np.linalg.norm(pose_F6 - pose_rows([frames[row]]), axis=1)
        near = np.argsort(distance_F, kind="stable")[: _RIVALS + 1]
        others_G6 = pose_rows([frames[other] for other in {*chosen, *kept} - {row}])
        rivals = {
            usable[index]
            for index in near
            if distance_F[index] < SAME_VIEW
            and not (np.linalg.norm(others_G6 - pose_F6[index], axis=1) < SAME_VIEW).any()
        } - {row}
        blurs = {other: _blur_of(frames[other]) for other in (row, *sorted(rivals))}
        best = min(blurs, key=lambda other: (round(blurs[other], 2), other != row))
        kept[best] = blurs[best]
    usual = float(np.median(list(kept.values()))) if kept else 0.0
    return sorted(row for row, value in kept.items() if value <= max(_BLURRED, usual + _WORSE))


def _blur_of(frame: Frame) -> float:
    try:
        with Image.open(frame.color_path) as picture:
            picture.draft("L", (_JUDGED_WIDTH, _JUDGED_WIDTH * 3 // 4))
            return blur(picture)
    except OSError as error:
        raise unreadable(frame, error) from None


def unreadable(frame: Frame, error: OSError) -> ValueError:
    """The error for a frame whose files cannot be read."""
    return ValueError(
        f"Cannot read the frame {frame.color_path} ({error}); prepare the scan again or use rendered views."
    )
