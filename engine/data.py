"""Samples and observed scenes for the loops."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from ..datasets.scannet import read_split
from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..datasets.tasks import load_samples
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from .config import DataConfig
from .runtime import stream


class ObservationCache:
    """Observed scenes by id, the least recently used dropped first.

    While the scene encoder is frozen, a scene is encoded once for as long as it stays here.
    """

    def __init__(self, store: SceneStore, model: SceneVLM, *, seed: int, capacity: int = 128):
        self.store = store
        self.model = model
        self.seed = seed
        self.capacity = capacity
        self._kept: OrderedDict[str, Observation] = OrderedDict()

    def __getitem__(self, scene_id: str) -> Observation:
        if scene_id in self._kept:
            self._kept.move_to_end(scene_id)
            return self._kept[scene_id]
        observation = self.model.observe(self.store[scene_id], self.seed)
        self._kept[scene_id] = observation
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return observation

    def of(self, samples: Sequence[Sample]) -> list[Observation]:
        """Observations of the samples' scenes, encoded; samples of one scene share one."""
        observations = [self[sample.scene_id] for sample in samples]
        self.model.encode(observations)
        return observations

    def resampled(self, samples: Sequence[Sample], seed: int) -> list[Observation]:
        """The same with fresh points and a fresh encoding, for training the scene encoder itself."""
        fresh = {
            scene_id: self.model.observe_again(self[scene_id], seed)
            for scene_id in dict.fromkeys(sample.scene_id for sample in samples)
        }
        observations = [fresh[sample.scene_id] for sample in samples]
        self.model.encode(observations)
        return observations


def load_split(config: DataConfig, split: str, seed: int) -> tuple[list[Sample], SceneStore]:
    """Samples of the configured data sets in one split, and the prepared scenes.

    Raises:
        ValueError: nothing there, with the command that fixes it.
    """
    root = Path(config.root)
    store = SceneStore(root / "prepared")
    read_split(root, split)  # a name that no list of scenes stands for is refused
    samples: list[Sample] = []
    for number, name in enumerate(config.datasets):
        found = load_samples(root, split, [name], scenes=store)
        if config.max_samples and len(found) > config.max_samples:
            rows = stream(seed, 11, number).permutation(len(found))[: config.max_samples]
            found = [found[row] for row in sorted(rows)]
        samples += found
    if not samples:
        raise ValueError(
            f"No samples of {', '.join(config.datasets)} in split {split} under {root}; "
            f"run `python main.py doctor --root {root}` to see what is missing."
        )
    return samples, store


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hash of which samples there are and in which order: a resumed run must go on with the same."""
    return hashlib.sha256("\n".join(sample.sample_id for sample in samples).encode()).hexdigest()[:16]
