"""Evaluation while supervised fine-tuning goes on: the loss on held-out samples, and greedy answers, scored."""

from dataclasses import replace
from functools import partial

import torch

from ..datasets.scene import Sample
from ..models.inputs import filled_length, plan_packs
from ..models.scene_vlm import SceneVLM
from ..utils.metrics.score import score_predictions
from ..utils.predictions import Prediction
from .config import SftConfig
from .data import ObservationCache, load_held_out
from .predict import answer
from .runtime import Runtime, log, wait_for_beside
from .sft_data import num_tokens, write_targets
from .sft_log import TaskSums
from .sft_loss import sft_loss
from .training_state import rng_state, set_rng_state

METRIC = "eval/loss"  # which makes a model the best where the configuration names none
_TOGETHER = 64  # samples of a rank whose rows are in memory at a time


class HeldOut:
    """Held-out samples that a model in training is measured on. Ranks share them, and all of them get the result.

    The model is left as it was, and so are the random generators: a run with evaluation trains as one without.

    Raises:
        ValueError: no samples in data.eval_split.
    """

    def __init__(self, config: SftConfig, model: SceneVLM, runtime: Runtime):
        self.config = config
        self.model = model
        self.runtime = runtime
        data = replace(config.data, datasets=config.eval_datasets or config.data.datasets)
        self.samples, self.store = load_held_out(data, config.run.seed, config.eval_samples)
        log.info("%d held-out samples of %s", len(self.samples), sorted({sample.dataset for sample in self.samples}))
        if model.multiview is not None:
            model.multiview.check(sorted({sample.scene_id for sample in self.samples}))
        if config.eval_answers and model.language.sharded_from is not None:
            raise ValueError(
                "eval_answers needs a model that is whole on every GPU; set it to 0, and `eval` afterwards."
            )
        # dense captions are asked of detected objects, not of these
        self.asked = [sample for sample in self.samples if sample.task != "dense_caption"][: config.eval_answers]
        self.tasks = sorted({sample.task for sample in self.samples})
        self.observations = self._observe()

    def _observe(self) -> ObservationCache:
        data = self.config.data
        return ObservationCache(
            self.store,
            self.model,
            seed=self.config.run.seed,
            capacity=data.cached_scenes,
            cache_views=data.cache_views,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`eval/loss` and `eval/loss/<task>`, means over taught tokens; of answers `eval/<data set>/<metric>`."""
        wait_for_beside(self.runtime.device)
        if self.model.train_scene_encoder:  # what was encoded before is out of date
            self.observations = self._observe()
        before, was_training = rng_state(), self.model.training
        self.model.eval()
        try:
            found = self.losses() | self.scores()
        finally:
            self.model.train(was_training)
            set_rng_state(before)
        return found

    def losses(self) -> dict[str, float]:
        """Mean losses over taught tokens, of all samples and by task."""
        sums = TaskSums(self.tasks, self.runtime.device)
        together = _TOGETHER * self.runtime.world_size
        for start in range(0, len(self.samples), together):
            part = self._share(self.samples[start : start + together])
            counted = len(part)
            part = part or self.samples[:1]  # a rank without a sample runs along with one that does not count
            taught = write_targets(self.model, part, self.observations.of(part), pointers=self.config.pointers)
            lengths = [len(entry.row.token_ids) for entry in taught]
            packs = plan_packs(lengths, self.config.token_budget, self.config.run.micro_batch_size)
            # as many passes on every rank, should the model's parts be spread over them
            for number in range(self.runtime.most(len(packs))):
                rows = [taught[row] for row in packs[number % len(packs)]]
                length = filled_length(num_tokens(rows), self.runtime.device)
                losses_T = self.model(partial(sft_loss, self.model, rows, length=length))[1]
                if counted and number < len(packs):
                    sums.add(rows, losses_T)
        totals, counts = sums.over_ranks(self.runtime)
        by_task = zip(self.tasks, totals, counts, strict=True)
        found = {f"{METRIC}/{task}": total / count for task, total, count in by_task if count}
        return {METRIC: sum(totals) / max(sum(counts), 1.0), **found}

    def scores(self) -> dict[str, float]:
        """Scores of greedy answers in percent, each data set's by its task's default scorer, METEOR left out."""
        if not self.asked:
            return {}
        made = answer(
            self.model,
            self._share(self.asked),
            self.observations,
            max_new_tokens=self.config.eval_new_tokens,
        )
        everyone = [entry for part in self.runtime.gather(made) for entry in part]
        found: dict[str, float] = {}
        for name in sorted({sample.dataset for sample in self.asked}):
            its = sorted((entry for entry in everyone if entry.meta["dataset"] == name), key=lambda e: e.sample_id)
            found |= _score(name, its)
        return found

    def _share(self, samples: list[Sample]) -> list[Sample]:
        return samples[self.runtime.rank :: self.runtime.world_size]


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
