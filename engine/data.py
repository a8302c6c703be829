"""Samples and observed scenes for the loops."""

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..datasets.scannet import read_split
from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..datasets.tasks import Problem, in_one_sentence, inputs_of, load_samples
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..models.view_cache import ViewCache
from .config import DataConfig
from .runtime import log, stream

# kinds of problems that come of data one does not have, not of broken files
MISSING = ("missing_scene", "missing_object", "no_box")
_AT_ONCE = 4  # scenes whose points are sampled at the same time


class ObservationCache:
    """Observed scenes by id, the least recently used dropped first.

    While the scene encoder is frozen, a scene is encoded once for as long as it stays here. With `cache_views` the
    model keeps candidate views and their embeddings on disk, in `views/` beside the prepared scenes.
    """

    def __init__(
        self, store: SceneStore, model: SceneVLM, *, seed: int, capacity: int = 128, cache_views: bool = False
    ):
        model.view_cache = ViewCache(store.prepared_dir / "views") if cache_views else None
        self.store = store
        self.model = model
        self.seed = seed
        self.capacity = capacity
        self._kept: OrderedDict[str, Observation] = OrderedDict()

    @classmethod
    def of_config(cls, config: DataConfig, store: SceneStore, model: SceneVLM, seed: int) -> "ObservationCache":
        """As a configuration says."""
        return cls(store, model, seed=seed, capacity=config.cached_scenes, cache_views=config.cache_views)

    def __getitem__(self, scene_id: str) -> Observation:
        return self._observed([scene_id])[0]

    def _observed(self, scene_ids: Sequence[str]) -> list[Observation]:
        """Observations of scenes, not encoded; several new ones are sampled at once, as the next is read."""
        new = list(dict.fromkeys(scene_id for scene_id in scene_ids if scene_id not in self._kept))
        read = (self.store[scene_id] for scene_id in new)
        observe = partial(self.model.observe, seed=self.seed)
        if len(new) > 1:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                made = list(pool.map(observe, read))
        else:
            made = list(map(observe, read))
        found = {scene_id: self._kept.pop(scene_id) for scene_id in dict.fromkeys(scene_ids) if scene_id in self._kept}
        found |= zip(new, made, strict=True)
        self._kept |= found
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return [found[scene_id] for scene_id in scene_ids]

    def of(self, samples: Sequence[Sample]) -> list[Observation]:
        """Observations of the samples' scenes, encoded; samples of one scene share one."""
        observations = self._observed([sample.scene_id for sample in samples])
        self.model.encode(observations)
        return observations

    def resampled(self, samples: Sequence[Sample], seed: int) -> list[Observation]:
        """The same with fresh points and a fresh encoding, for training the scene encoder itself."""
        scene_ids = list(dict.fromkeys(sample.scene_id for sample in samples))
        fresh = {
            scene_id: self.model.observe_again(seen, seed)
            for scene_id, seen in zip(scene_ids, self._observed(scene_ids), strict=True)
        }
        observations = [fresh[sample.scene_id] for sample in samples]
        self.model.encode(observations)
        return observations


@dataclass(frozen=True)
class Loaded:
    """One data set's samples in one split, and how many records were left out, by kind of problem."""

    dataset: str
    split: str
    samples: list[Sample]
    left_out: dict[str, int]

    @property
    def task(self) -> str:
        """The task of the samples; ValueError where they are of several."""
        tasks = sorted({sample.task for sample in self.samples})
        if len(tasks) != 1:
            raise ValueError(f"Data set {self.dataset} mixes tasks; evaluate on the data sets of its tasks instead.")
        return tasks[0]


def load_split(config: DataConfig, split: str, seed: int) -> tuple[list[Sample], SceneStore]:
    """Samples of the configured data sets in one split, and the prepared scenes.

    Raises:
        ValueError: nothing there, with the command that fixes it.
    """
    store = open_store(config)
    read_split(config.root, split)  # a name that no list of scenes stands for is refused
    for name in config.weights:
        inputs_of(name, split)  # and so is an unknown data set
    parts = [load_dataset(config, name, split, store, seed, row) for row, name in enumerate(config.datasets)]
    samples = [sample for part in parts for sample in part.samples]
    if not samples:
        raise _nothing(config, config.datasets, split, sum(sum(part.left_out.values()) for part in parts))
    return samples, store


def load_evaluated(config: DataConfig, store: SceneStore, seed: int) -> list[Loaded]:
    """The configured data sets, each in the split that evaluation takes of it.

    A split of `eval_splits` needs no list of scenes: its annotation files say which scenes it has. (SQA3D's test
    questions, for one, are about scenes of ScanNet's validation split.)

    Raises:
        ValueError: a data set without samples, or one of `eval_splits` that there is not.
    """
    for name, split in config.eval_splits.items():
        inputs_of(name, split)  # an unknown name is refused
    found = []
    for name in config.datasets:
        split = config.eval_splits.get(name, config.eval_split)
        if name not in config.eval_splits:
            read_split(config.root, split)
        loaded = load_dataset(config, name, split, store, seed)
        if not loaded.samples:
            raise _nothing(config, [name], split, sum(loaded.left_out.values()))
        found.append(loaded)
    return found


def load_held_out(config: DataConfig, seed: int, count: int) -> tuple[list[Sample], SceneStore]:
    """At most `count` samples of the splits that evaluation takes, chosen by seed, of each data set alike.

    Data sets that have no annotation file there (Scene-30K is about training scenes) or no samples are left out;
    ValueError where all are.
    """
    store = open_store(config)
    shuffled: list[list[Sample]] = []
    for number, name in enumerate(config.datasets):
        split = config.eval_splits.get(name, config.eval_split)
        if name not in config.eval_splits:
            read_split(config.root, split)
        absent = inputs_of(name, split).absent(config.root)
        if absent:
            log.warning("%s is not among the held-out samples: %s has no %s", name, config.root, absent[0])
            continue
        its = load_dataset(config, name, split, store, seed, number).samples
        shuffled.append([its[row] for row in stream(seed, 13, number).permutation(len(its))])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    samples = [sample for sample in turns if sample is not None][:count]
    if not samples:
        raise _nothing(config, config.datasets, config.eval_split, 0)
    return samples, store


def open_store(config: DataConfig) -> SceneStore:
    """The prepared scenes of the configured root."""
    return SceneStore(Path(config.root) / "prepared")


def load_dataset(config: DataConfig, name: str, split: str, store: SceneStore, seed: int, number: int = 0) -> Loaded:
    """One data set in one split, cut to `max_samples`; `missing: skip` leaves out what has no scene or no box.

    Args:
        number: names the random stream that cuts.

    Raises:
        ValueError: a record that cannot be used for another reason, or any such record without `skip`.
    """
    problems: list[Problem] = []
    gathered = problems if config.missing == "skip" else None
    samples = load_samples(config.root, split, [name], scenes=store, problems=gathered)
    refused = [problem for problem in problems if problem.kind not in MISSING]
    if refused:
        raise ValueError(in_one_sentence(refused))
    left_out = dict(sorted(Counter(str(problem.kind) for problem in problems).items()))
    if left_out:
        counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in left_out.items())
        log.warning("%s, %s: %d records kept, %s left out", name, split, len(samples), counts)
    if config.max_samples and len(samples) > config.max_samples:
        rows = stream(seed, 11, number).permutation(len(samples))[: config.max_samples]
        samples = [samples[row] for row in sorted(rows)]
    return Loaded(name, split, samples, left_out)


def _nothing(config: DataConfig, datasets: Sequence[str], split: str, left_out: int) -> ValueError:
    why = f" ({left_out:,} records were left out, since their scenes or objects are not there)" if left_out else ""
    return ValueError(
        f"No samples of {', '.join(datasets)} in split {split} under {config.root}{why}; "
        f"run `python main.py doctor --root {config.root}` to see what is missing."
    )


def fingerprint(names: Sequence[str]) -> str:
    """Hash of which samples there are and in which order: a resumed run must go on with the same."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
