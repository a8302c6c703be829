"""Stray points of a reconstruction: those that lie much farther from their neighbours than others do.

Shapes: N points.
"""

import numpy as np
from scipy.spatial import KDTree

NUM_NEIGHBORS = 12
DEVIATIONS = 3.0
_SIGMA = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


def inliers(points_N3: np.ndarray, *, neighbors: int = NUM_NEIGHBORS, deviations: float = DEVIATIONS) -> np.ndarray:
    """Which points stay [N], bool: statistical outlier removal.

    A point goes where the logarithm of its mean distance to its nearest neighbours is more than so many deviations
    above the median. Logarithm, median and median deviation instead of the usual mean and standard deviation: density
    falls with the distance from the camera by factors, and stray points far away would spread the latter so wide that
    nothing goes.
    """
    count = len(points_N3)
    if count <= neighbors:
        return np.ones(count, dtype=bool)
    distances_NK, _ = KDTree(points_N3).query(points_N3, k=neighbors + 1, workers=-1)
    log_N = np.log(np.maximum(distances_NK[:, 1:].mean(axis=1), 1e-12))
    middle = np.median(log_N)
    spread = max(_SIGMA * float(np.median(np.abs(log_N - middle))), 0.05)
    return log_N <= middle + deviations * spread
