"""Held-out samples that a model in training is measured on, and the scores of answers to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..datasets.scene import Sample
from ..models.scene_vlm import SceneVLM
from ..utils.metrics.score import score_predictions
from ..utils.predictions import Prediction
from .config import GrpoConfig, SftConfig
from .data import ObservationCache, load_held_out
from .runtime import Runtime, log, wait_for_beside
from .training_state import rng_state, set_rng_state


class HeldOut:
    """Held-out samples. Ranks share them, and all of them get the results.

    Args:
        config: of the run; it says which samples, and how many at most.

    Raises:
        ValueError: no samples in data.eval_split.
    """

    def __init__(self, config: SftConfig | GrpoConfig, model: SceneVLM, runtime: Runtime):
        self.data = replace(config.data, datasets=config.eval_datasets or config.data.datasets)
        self.model = model
        self.runtime = runtime
        self.seed = config.run.seed
        self.samples, self.store = load_held_out(self.data, self.seed, config.eval_samples)
        log.info("%d held-out samples of %s", len(self.samples), sorted({sample.dataset for sample in self.samples}))
        if model.multiview is not None:
            model.multiview.check(sorted({sample.scene_id for sample in self.samples}))
        # dense captions are asked of detected objects, not of these
        self.questions = [sample for sample in self.samples if sample.task != "dense_caption"]
        self.observations = self.observe()

    def observe(self) -> ObservationCache:
        """Scenes as the model sees them now."""
        return ObservationCache.of_config(self.data, self.store, self.model, self.seed)

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's of some samples."""
        return list(samples[self.runtime.rank :: self.runtime.world_size])

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The block evaluates: the model is left as it was, and so are the random generators, so that a run with
        evaluation trains as one without."""
        wait_for_beside(self.runtime.device)
        before, was_training = rng_state(), self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)
            set_rng_state(before)


def one_line(scores: Mapping[str, float]) -> str:
    """Scores as a line of a log: `loss 1.52, scanrefer/Acc@0.25 31.5`."""
    return ", ".join(f"{name.removeprefix('eval/')} {value:.3g}" for name, value in scores.items())


def score_answers(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`eval/<data set>/<metric>` in percent, each data set's by its task's default scorer, METEOR left out.

    Args:
        predictions: of all ranks.
    """
    found: dict[str, float] = {}
    for name in sorted({entry.meta["dataset"] for entry in predictions}):
        its = sorted((entry for entry in predictions if entry.meta["dataset"] == name), key=lambda e: e.sample_id)
        found |= _score(name, its)
    return found


def _score(name: str, predictions: list[Prediction]) -> dict[str, float]:
    task = predictions[0].task
    if any(entry.task != task for entry in predictions):  # Scene-30K's are of several
        return {
            key: value
            for part in sorted({entry.task for entry in predictions})
            for key, value in _score(f"{name}/{part}", [entry for entry in predictions if entry.task == part]).items()
        }
    if not any(entry.target_boxes if task == "grounding" else entry.references for entry in predictions):
        log.warning("held-out %s has nothing to compare answers with; they are not scored", name)
        return {}
    scores = score_predictions(task, predictions, None, meteor=False)
    factor = 1.0 if scores["unit"] == "percent" else 100.0
    # parts of a data set, as Acc@0.25/unique, are for `eval`: a few dozen samples have too few of each
    shown = {key: value for key, value in scores["metrics"].items() if value is not None and "/" not in key}
    return {f"eval/{name}/{key}": factor * value for key, value in shown.items()}
