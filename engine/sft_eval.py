"""Evaluation while supervised fine-tuning goes on: the loss on held-out samples, and greedy answers, scored."""

from functools import partial

from ..models.packs import filled_length, plan_packs
from ..models.scene_vlm import SceneVLM
from .config import SftConfig
from .held_out import HeldOut, score_answers
from .predict import answer, check_modes
from .runtime import Runtime
from .sft_data import num_tokens, write_targets
from .sft_log import TaskSums
from .sft_loss import sft_loss

METRIC = "eval/loss"  # which makes a model the best where the configuration names none
_TOGETHER = 64  # samples of a rank whose rows are in memory, or which are answered, at a time
_TOKEN_BUDGET = 65_536  # tokens of prompts and answers decoded together at most


class SftHeldOut(HeldOut):
    """Held-out samples of a supervised run."""

    def __init__(self, config: SftConfig, model: SceneVLM, runtime: Runtime):
        check_modes(config.eval_modes, "eval_modes")
        super().__init__(config, model, runtime)
        self.config = config
        if config.eval_answers and model.language.sharded_from is not None:
            raise ValueError(
                "eval_answers needs a model that is whole on every GPU; set it to 0, and `eval` afterwards."
            )
        self.asked = self.questions[: config.eval_answers]
        self.tasks = sorted({sample.task for sample in self.samples})

    def evaluate(self) -> dict[str, float]:
        """`eval/loss` and `eval/loss/<task>`, means over taught tokens; of answers `eval/<data set>/<metric>`."""
        if self.model.train_scene_encoder:  # what was encoded before is out of date
            self.observations = self.observe()
        with self.undisturbed():
            return self.losses() | self.scores()

    def losses(self) -> dict[str, float]:
        """Mean losses over taught tokens, of all samples and by task."""
        sums = TaskSums(self.tasks, self.runtime.device)
        together = _TOGETHER * self.runtime.world_size
        for start in range(0, len(self.samples), together):
            part = self.share(self.samples[start : start + together])
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
        """Scores of greedy answers."""
        if not self.asked:
            return {}
        made = answer(
            self.model,
            self.share(self.asked),
            self.observations,
            modes=self.config.eval_modes,
            max_new_tokens=self.config.eval_new_tokens,
            batch_size=_TOGETHER,
            token_budget=_TOKEN_BUDGET,
        )
        self.model.decoder.release()  # its memory is for training again
        return score_answers([entry for part in self.runtime.gather(made) for entry in part])
