"""mAP and AR of resampled scenes, for intervals, without sorting the detections again for every resample.

A resample says how often each scene was drawn. A detection's rank among all is the same in each, so that precision at
a hit is a ratio of two weighted counts. Shapes: D detections of one class, H hits among them, S scenes, R resamples.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankedClass:
    """One class's detections, best first: the scene of each, whether it is a hit; and objects a scene."""

    scene_D: np.ndarray
    hit_D: np.ndarray
    objects_S: np.ndarray

    def resample(self, weights_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """AP [R], recall [R], and whether the class occurs at all [R], where scene s counts weights[r, s] times."""
        num_scenes = len(self.objects_S)
        objects_R = weights_RS @ self.objects_S
        detections_S = np.bincount(self.scene_D, minlength=num_scenes)
        seen_R = (objects_R > 0) | (weights_RS @ detections_S > 0)
        hits_H = np.flatnonzero(self.hit_D)
        if not len(hits_H):
            return np.zeros(len(weights_RS)), np.zeros(len(weights_RS)), seen_R
        gained_RH = weights_RS[:, self.scene_D[hits_H]]
        precision_RH = _ratio(gained_RH.cumsum(1), weights_RS @ self._ranked(hits_H))
        envelope_RH = np.maximum.accumulate(precision_RH[:, ::-1], axis=1)[:, ::-1]
        ap_R = _ratio((gained_RH * envelope_RH).sum(1), objects_R)
        return ap_R, _ratio(gained_RH.sum(1), objects_R), seen_R

    def _ranked(self, hits_H: np.ndarray) -> np.ndarray:
        """Detections [S, H] of each scene that rank no lower than each hit."""
        counts_SH = np.zeros((len(self.objects_S), len(hits_H) + 1))
        # the first hit at or behind each detection
        np.add.at(counts_SH, (self.scene_D, np.searchsorted(hits_H, np.arange(len(self.scene_D)))), 1)
        return counts_SH.cumsum(1)[:, :-1]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def mean_over_seen(values_CR: np.ndarray, seen_CR: np.ndarray) -> np.ndarray:
    """Mean [R] over the classes that occur in a resample; 0 where none does."""
    return _ratio((values_CR * seen_CR).sum(0), seen_CR.sum(0).astype(np.float64))
