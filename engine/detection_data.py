"""Prepared scenes as batches of sampled points and ground-truth boxes, for the pre-training of the scene encoder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..datasets.collate import Draw, Loader
from ..datasets.multiview import open_multiview
from ..datasets.scannet import read_split
from ..datasets.scene import Scene
from ..datasets.scene_store import SceneStore
from ..datasets.transforms import Augmentation, Transform, object_outlines
from ..models.scene_encoder import DetectionTargets, PointInput
from ..models.scene_encoder.inputs import features_of, sample_indices, scene_normals
from .config import DetectConfig
from .runtime import Runtime, batch_indices, log

_KEPT_SCENES = 256  # prepared scenes held open (they are mapped), a file descriptor each
_TRAIN_STREAM = 21  # name of a random stream


Batch = tuple[torch.Tensor, torch.Tensor, DetectionTargets]  # points [B, N, 3], features [B, N, F], targets


class CloudSample(NamedTuple):
    """One scene's sampled points and its objects' boxes (both in the model frame) and classes."""

    inputs: PointInput
    boxes_K7: np.ndarray
    class_ids_K: np.ndarray


class CloudSampler:
    """Makes one sample of a scene; goes to the loader's workers."""

    def __init__(self, config: DetectConfig, *, augment: bool):
        self.num_points = config.data.num_points
        self.channels = {"use_color": config.encoder.use_color, "use_height": config.encoder.use_height}
        self.use_normal = config.encoder.use_normal
        self.multiview = open_multiview(config.data.multiview, config.encoder.multiview_dim)
        self.augment = augment
        self._outlines: dict[int, list[np.ndarray | None]] = {}  # by row
        self._normals: dict[int, np.ndarray] = {}  # by row; the store drops scenes, and they are slow to make again

    def __call__(self, row: int, scene: Scene, rng: np.random.Generator) -> CloudSample:
        kept_N = sample_indices(len(scene.points_N3), self.num_points, rng)
        points_N3, boxes_K7 = scene.to_model(scene.points_N3.take(kept_N, axis=0)), scene.to_model(scene.boxes_K7)
        normals_N3 = self._scene_normals(row, scene).take(kept_N, axis=0) if self.use_normal else None
        if self.augment:
            change = Augmentation().draw(rng)
            if row not in self._outlines:
                everything_N3 = scene.to_model(scene.points_N3)
                self._outlines[row] = object_outlines(everything_N3, scene.instance_ids_N, scene.object_ids_K)
            boxes_K7 = change.axis_aligned_boxes(boxes_K7, self._outlines[row])
            points_N3 = change.points(points_N3)
            if normals_N3 is not None:
                normals_N3 = turn_directions(change, normals_N3)
        inputs = features_of(
            points_N3,
            scene.colors_N3.take(kept_N, axis=0),
            normals_N3=normals_N3,
            multiview_NW=None if self.multiview is None else self.multiview.of(scene, kept_N),
            **self.channels,
        )
        return CloudSample(inputs, boxes_K7, scene.class_ids_K.astype(np.int64))

    def _scene_normals(self, row: int, scene: Scene) -> np.ndarray:
        if row not in self._normals:
            self._normals[row] = scene_normals(scene)
        return self._normals[row]


def turn_directions(change: Transform, directions_N3: np.ndarray) -> np.ndarray:
    """Directions turned and flipped as a transform does with points, float32, their lengths kept.

    Flips and turns about the origin are orthogonal, so they do to a normal what they do to a point.
    """
    return change.points(directions_N3) / np.float32(change.scale)


def _collate(samples: Sequence[CloudSample]) -> Batch:
    return (
        torch.from_numpy(np.stack([sample.inputs.points_N3 for sample in samples])),
        torch.from_numpy(np.stack([sample.inputs.features_NF for sample in samples])),
        DetectionTargets.of(
            [torch.from_numpy(sample.boxes_K7) for sample in samples],
            [torch.from_numpy(sample.class_ids_K) for sample in samples],
        ),
    )


class SceneSamples:
    """Prepared scenes of one split, sampled for the encoder.

    Raises:
        ValueError: no scene of the split is prepared.
    """

    def __init__(self, config: DetectConfig, split: str):
        root = Path(config.data.root)
        self.config = config
        self.store = SceneStore(root / "prepared", capacity=_KEPT_SCENES)
        wanted = read_split(root, split)
        self._samplers = {augment: CloudSampler(config, augment=augment) for augment in (False, True)}
        self.scene_ids = [scene_id for scene_id in wanted if scene_id in self.store]
        if not self.scene_ids:
            raise ValueError(
                f"No scene of split {split} is prepared under {root}; run `python main.py prepare` first."
            )
        if len(self.scene_ids) < len(wanted):
            missing = len(wanted) - len(self.scene_ids)
            log.warning("%d of %d scenes of split %s are not prepared and left out", missing, len(wanted), split)
        multiview = self._samplers[config.augment].multiview
        if multiview is not None:
            multiview.check(self.scene_ids)

        self.loader = Loader(self.store, self.scene_ids, self._samplers[config.augment], workers=config.data.workers)
        self._coming: tuple[int, Iterator[list[CloudSample]]] | None = None

    def __len__(self) -> int:
        return len(self.scene_ids)

    def __getitem__(self, row: int) -> Scene:
        return self.store[self.scene_ids[row]]

    def batch(self, rows: Sequence[int], streams: Sequence[np.random.Generator], *, augment: bool) -> Batch:
        """Some rows, each sampled from its own stream."""
        sampler = self._samplers[augment]
        return _collate([sampler(row, self[row], rng) for row, rng in zip(rows, streams, strict=True)])

    def training_batch(self, step: int, runtime: Runtime) -> Batch:
        """This rank's part of one step's batch. Asked for step after step, workers make the next ones meanwhile.

        What is sampled is a function of the seed, the step and the place in the global batch alone, so that a resumed
        run and another number of ranks see the same.
        """
        run = self.config.run

        def plan(step: int) -> list[Draw]:
            rows = batch_indices(len(self), step, run.batch_size, run.seed, runtime)
            first = runtime.rank * len(rows)
            return [Draw(row, (run.seed, _TRAIN_STREAM, step, first + place)) for place, row in enumerate(rows)]

        if self._coming is None or self._coming[0] != step:
            self._coming = step, self.loader.batches(plan, step, run.steps)
        samples = next(self._coming[1])
        self._coming = step + 1, self._coming[1]
        return _collate(samples)
