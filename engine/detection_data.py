"""Prepared scenes as batches of sampled points and ground-truth boxes, for the pre-training of the scene encoder."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..datasets.augmentation import SceneAugmentation
from ..datasets.collate import Draw, Loader
from ..datasets.multiview import open_multiview
from ..datasets.scannet import read_split
from ..datasets.scene import Scene
from ..datasets.scene_store import SceneStore
from ..datasets.transforms import Augmentation, Transform, object_outlines
from ..models.scene_encoder import DetectionTargets, PointInput
from ..models.scene_encoder.inputs import features_of, sample_indices, scene_normals
from ..utils.labels import NUM_CLASSES
from .config import AugmentConfig, DetectConfig
from .runtime import Runtime, batch_indices, log

_KEPT_SCENES = 256  # prepared scenes held open (they are mapped), a file descriptor each
_TRAIN_STREAM = 21  # name of a random stream


Batch = tuple[torch.Tensor, torch.Tensor, DetectionTargets]  # points [B, N, 3], features [B, N, F], targets


class CloudSample(NamedTuple):
    """One scene's sampled points and its objects' boxes (both in the model frame) and classes."""

    inputs: PointInput
    boxes_K7: np.ndarray
    class_ids_K: np.ndarray


class _Placed(NamedTuple):
    """Sampled points and boxes in the model frame, before the points' channels."""

    kept_N: np.ndarray  # indices of the scene's points
    points_N3: np.ndarray
    boxes_K7: np.ndarray
    rows_K: np.ndarray  # rows of the scene's objects
    change: Transform  # from the scene to the sample


def build_augmentation(config: AugmentConfig) -> SceneAugmentation:
    """What a configuration asks for, whether it is enabled or not."""
    return SceneAugmentation(
        motion=Augmentation(
            flip_x=config.flip,
            flip_y=config.flip,
            quarter_turns=config.quarter_turns,
            max_angle=math.radians(config.max_angle),
            scale=(config.scale_low, config.scale_high),
        ),
        cuboid=config.cuboid,
        cuboid_min_share=config.cuboid_min_share,
        cuboid_min_points=config.cuboid_min_points,
        object_dropout=config.object_dropout,
        jitter=config.jitter / 1000,
        color_change=config.color,
        color_noise=config.color_noise,
        color_drop=config.color_drop,
    )


class CloudSampler:
    """Makes one sample of a scene; goes to the loader's workers. With `augment`, `config.augment` says how."""

    def __init__(self, config: DetectConfig, *, augment: bool):
        self.num_points = config.data.num_points
        self.channels = {"use_color": config.encoder.use_color, "use_height": config.encoder.use_height}
        self.use_normal = config.encoder.use_normal
        self.multiview = open_multiview(config.data.multiview, config.encoder.multiview_dim)
        self.augmentation = build_augmentation(config.augment) if augment else None
        self._outlines: dict[int, list[np.ndarray | None]] = {}  # by row
        self._normals: dict[int, np.ndarray] = {}  # by row; the store drops scenes, and they are slow to make again

    def __call__(self, row: int, scene: Scene, rng: np.random.Generator) -> CloudSample:
        placed = self._plain(scene, rng) if self.augmentation is None else self._augmented(row, scene, rng)
        normals_N3 = None
        if self.use_normal:
            normals_N3 = turn_directions(placed.change, self._scene_normals(row, scene).take(placed.kept_N, axis=0))
        inputs = features_of(
            placed.points_N3,
            scene.colors_N3.take(placed.kept_N, axis=0),
            normals_N3=normals_N3,
            multiview_NW=None if self.multiview is None else self.multiview.of(scene, placed.kept_N),
            **self.channels,
        )
        if self.augmentation is not None and self.channels["use_color"]:  # colours are the first channels
            inputs.features_NF[:, :3] = self.augmentation.recolored(inputs.features_NF[:, :3], rng)
        return CloudSample(inputs, placed.boxes_K7, scene.class_ids_K[placed.rows_K].astype(np.int64))

    def _plain(self, scene: Scene, rng: np.random.Generator) -> _Placed:
        kept_N = sample_indices(len(scene.points_N3), self.num_points, rng)
        points_N3 = scene.to_model(scene.points_N3.take(kept_N, axis=0))
        return _Placed(kept_N, points_N3, scene.to_model(scene.boxes_K7), np.arange(len(scene.boxes_K7)), Transform())

    def _augmented(self, row: int, scene: Scene, rng: np.random.Generator) -> _Placed:
        """Points sampled from what augmentation leaves of the scene, so that a part of it is as dense as can be."""
        assert self.augmentation is not None
        if row not in self._outlines:
            everything_N3 = scene.to_model(scene.points_N3)
            self._outlines[row] = object_outlines(everything_N3, scene.instance_ids_N, scene.object_ids_K)
        part = self.augmentation.part(scene, self._outlines[row], rng)
        available = len(scene.points_N3) if part.kept_P is None else len(part.kept_P)
        (part_rng,) = rng.spawn(1)  # so that a cut does not change what is drawn after it
        if part.kept_P is None:
            kept_N = sample_indices(available, self.num_points, rng)
        else:
            sample_indices(len(scene.points_N3), self.num_points, rng)
            kept_N = part.kept_P.take(sample_indices(available, self.num_points, part_rng))
        points_N3 = scene.to_model(scene.points_N3.take(kept_N, axis=0))
        points_N3, boxes_K7, change = self.augmentation.moved(points_N3, part, rng)
        return _Placed(kept_N, points_N3, boxes_K7, part.rows_M, change)

    def _scene_normals(self, row: int, scene: Scene) -> np.ndarray:
        if row not in self._normals:
            self._normals[row] = scene_normals(scene)
        return self._normals[row]


def turn_directions(change: Transform, directions_N3: np.ndarray) -> np.ndarray:
    """Directions turned and flipped as a transform does with points, float32, their lengths kept.

    Flips and turns about the origin are orthogonal, so they do to a normal what they do to a point.
    """
    return change.points(directions_N3) / np.float32(change.scale)


class Arrays(NamedTuple):
    """A batch before it becomes tensors: what crosses from the workers."""

    points_BN3: np.ndarray
    features_BNF: np.ndarray
    boxes: list[np.ndarray]
    classes: list[np.ndarray]


def stack(samples: Sequence[CloudSample]) -> Arrays:
    """Samples as arrays; in a worker this spares the loop the copying."""
    return Arrays(
        np.stack([sample.inputs.points_N3 for sample in samples]),
        np.stack([sample.inputs.features_NF for sample in samples]),
        [sample.boxes_K7 for sample in samples],
        [sample.class_ids_K for sample in samples],
    )


def to_batch(arrays: Arrays) -> Batch:
    """Tensors of a batch, on the host. ValueError: an object is of a class that there is not."""
    for classes_K in arrays.classes:
        outside = classes_K[(classes_K < 0) | (classes_K >= NUM_CLASSES)]
        if len(outside):
            raise ValueError(
                f"A scene has an object of class {outside[0]}; classes run from 0 to {NUM_CLASSES - 1}, and "
                f"{NUM_CLASSES - 1} stands for everything else. Run `python main.py prepare` again."
            )
    boxes, classes = ([torch.from_numpy(part) for part in parts] for parts in (arrays.boxes, arrays.classes))
    points_BN3, features_BNF = torch.from_numpy(arrays.points_BN3), torch.from_numpy(arrays.features_BNF)
    return points_BN3, features_BNF, DetectionTargets.of(boxes, classes)


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
        multiview = self._samplers[False].multiview
        if multiview is not None:
            multiview.check(self.scene_ids)

        self.loader = Loader(
            self.store,
            self.scene_ids,
            self._samplers[config.augment.enabled],
            workers=config.data.workers,
            collate=stack,
        )
        self._coming: tuple[int, Iterator[Arrays]] | None = None

    def __len__(self) -> int:
        return len(self.scene_ids)

    def __getitem__(self, row: int) -> Scene:
        return self.store[self.scene_ids[row]]

    def batch(self, rows: Sequence[int], streams: Sequence[np.random.Generator], *, augment: bool) -> Batch:
        """Some rows, each sampled from its own stream."""
        sampler = self._samplers[augment]
        return to_batch(stack([sampler(row, self[row], rng) for row, rng in zip(rows, streams, strict=True)]))

    def training_scenes(self, step: int, runtime: Runtime) -> list[str]:
        """Ids of the scenes in this rank's part of one step's batch."""
        run = self.config.run
        return [self.scene_ids[row] for row in batch_indices(len(self), step, run.batch_size, run.seed, runtime)]

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
        arrays = next(self._coming[1])
        self._coming = step + 1, self._coming[1]
        return to_batch(arrays)
