"""Training samples a second from prepared scenes on one core: 40,000 points, augmentation, 6 views.

A sample is points with colours and heights, augmented, the boxes fitted to them, and the poses of 6 of the scene's
frames; pictures are not decoded. The peer is the plain way of the field, written in `_loader_peer.py`: arrays read by
np.load for every sample. Both read from the file cache, take turns and run in one process with one thread. Ours makes
the outlines that boxes are fitted to once a scene: the second row is an epoch that begins without them. The exit
status says whether ours makes at least 100 samples a second.
"""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ..datasets.collate import Loader, epoch_draws
from ..datasets.scene import Frame, Scene, save_scene
from ..datasets.scene_store import SceneStore
from ..engine.config import DataConfig, DetectConfig
from ..engine.detection_data import CloudSample, CloudSampler
from ..utils.camera import look_at
from ._arguments import measuring_parser, positive
from ._loader_peer import PlainDataset, write_arrays_of
from ._measure import Load, median_seconds, report
from ._rooms import room_scene
from .results import Row

TARGET = 100.0
NUM_POINTS, STORED_POINTS, BATCH_SIZE, NUM_VIEWS, NUM_FRAMES = 40_000, 50_000, 8, 6, 100
PEER = "np.load of the scene's arrays for every sample, VoteNet-style augmentation"


class ViewedSampler:
    """The detector's sample and the poses of frames chosen at random."""

    def __init__(self, *, augment: bool):
        self.sampler = CloudSampler(DetectConfig(data=DataConfig(num_points=NUM_POINTS)), augment=augment)

    def __call__(self, row: int, scene: Scene, rng: np.random.Generator) -> tuple[CloudSample, np.ndarray]:
        sample = self.sampler(row, scene, rng)
        views_V = rng.choice(len(scene.frames), NUM_VIEWS, replace=False)
        return sample, np.stack([scene.frames[index].pose_44 for index in views_V])


def make_scene(number: int) -> Scene:
    """A generated room of exactly STORED_POINTS points, as `prepare` keeps of a real scan, with NUM_FRAMES poses."""
    rng = np.random.default_rng(number)
    scene = room_scene(number, STORED_POINTS, rng)
    eyes_F3 = scene.origin_3 + np.array([0.0, 0.0, 1.5]) + rng.uniform(-1, 1, (NUM_FRAMES, 3)) * [1.0, 1.0, 0.2]
    targets_F3 = eyes_F3 + rng.uniform(-1, 1, (NUM_FRAMES, 3)) * [1.0, 1.0, 0.3]
    frames = [
        Frame(f"{index}.jpg", None, look_at(eye_3, target_3), np.eye(3))
        for index, (eye_3, target_3) in enumerate(zip(eyes_F3, targets_F3, strict=True))
    ]
    return replace(scene, frames=frames)


def check(scenes: SceneStore, folder: Path) -> None:
    """ValueError where ours and the peer's samples, without augmentation, are not of the same boxes and points."""
    for row, scene_id in enumerate(scenes.scene_ids):
        scene = scenes[scene_id]
        sample, poses_V44 = ViewedSampler(augment=False)(row, scene, np.random.default_rng(0))
        theirs = PlainDataset(folder, scenes.scene_ids, NUM_POINTS, NUM_VIEWS, augment=False)[row]
        apart = np.abs(scene.to_world(sample.boxes_K7)[:, :6] - theirs["boxes"]).max()
        middles = [scene.to_world(sample.inputs.points_N3).mean(0), theirs["points"].mean(0)]
        shapes = (sample.inputs.points_N3.shape, sample.inputs.features_NF.shape, poses_V44.shape)
        if apart > 1e-4 or np.abs(middles[0] - middles[1]).max() > 0.05:
            raise ValueError(f"The samples of {scene_id} differ from the peer's; not measured.")
        if shapes != (theirs["points"].shape, theirs["features"].shape, theirs["poses"].shape):
            raise ValueError(f"The samples of {scene_id} have other shapes than the peer's; not measured.")


def measure(num_scenes: int, num_batches: int, repeats: int) -> list[Row]:
    """Samples a second, warm and from the first epoch."""
    with tempfile.TemporaryDirectory() as temporary:
        prepared, arrays = Path(temporary) / "prepared", Path(temporary) / "scannet_data"
        for number in range(num_scenes):
            scene = make_scene(number)
            save_scene(scene, prepared / f"{scene.scene_id}.npz")
            write_arrays_of(scene, arrays)
        scenes = SceneStore(prepared, capacity=1)  # as in a large data set, where a scene is seldom still open
        check(scenes, arrays)
        plan = [epoch_draws(num_scenes, BATCH_SIZE, 0, step) for step in range(num_batches)]
        kept = ViewedSampler(augment=True)
        plain = PlainDataset(arrays, scenes.scene_ids, NUM_POINTS, NUM_VIEWS, augment=True)

        def ours(sampler: ViewedSampler) -> int:
            loader = Loader(scenes, scenes.scene_ids, sampler)
            return sum(len(batch) for batch in loader.batches(plan.__getitem__, 0, num_batches))

        def peer() -> int:
            return sum(len([plain[draw.row] for draw in draws]) for draws in plan)

        actions = (lambda: ours(kept), lambda: ours(ViewedSampler(augment=True)), peer)
        warm, first, theirs = (num_batches * BATCH_SIZE / seconds for seconds in median_seconds(actions, repeats))
    note = f"{NUM_POINTS} of {STORED_POINTS} points, {NUM_VIEWS} views undecoded, batches of {BATCH_SIZE}"
    return [
        Row("loader.samples_per_s", warm, "1/s", PEER, theirs, "higher", note),
        Row(
            "loader.samples_per_s_first_epoch", first, "1/s", PEER, theirs, "higher", f"{note}; outlines not yet made"
        ),
    ]


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether the target is reached."""
    parser = measuring_parser("loader", __doc__, repeats=5, cuda=False)
    parser.add_argument("--scenes", type=positive, default=16, metavar="N", help="rooms (default: %(default)s)")
    parser.add_argument("--batches", type=positive, default=8, metavar="N", help="a timed run (default: %(default)s)")
    arguments = parser.parse_args(list(argv))
    arguments.threads = arguments.threads or 1
    load = Load(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # NumPy's threads are counted when it is imported: in a process of its own
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rows = pool.submit(measure, arguments.scenes, arguments.batches, arguments.repeats).result()
    report("loader", rows, arguments, load, argv=argv, packages=("numpy",))
    return 0 if rows[0].value >= TARGET else 1
