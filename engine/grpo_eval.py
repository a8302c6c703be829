"""Evaluation while GRPO goes on: greedy answers to held-out questions, by the run's rewards and the tasks' scorers."""

from ..models.scene_vlm import SceneVLM
from .config import GrpoConfig
from .groups import MODE, gather_scores, score_rollouts
from .held_out import HeldOut, score_answers
from .predict import to_prediction
from .rewards import RewardSet
from .rollout import roll_out, write_prompts
from .runtime import Runtime

_TOKEN_BUDGET = 65_536  # tokens of prompts and answers decoded together at most
METRIC = "eval/reward"  # which makes a model the best where the configuration names none


class GrpoHeldOut(HeldOut):
    """Held-out questions of a GRPO run."""

    def __init__(self, config: GrpoConfig, model: SceneVLM, rewards: RewardSet, runtime: Runtime):
        super().__init__(config, model, runtime)
        if not self.questions:
            raise ValueError("The held-out samples are all dense captions; name another data set in eval_datasets.")
        self.config = config
        self.rewards = rewards

    def evaluate(self) -> dict[str, float]:
        """`eval/reward`, `eval/rewards/<name>`, `eval/<data set>/<metric>` of answers in the mode that is trained.

        A rank without a question answers one that does not count.
        """
        own = self.share(self.questions)
        asked = own or self.questions[:1]
        with self.undisturbed():
            rollouts = []
            together = self.config.rollout.batch_size
            for start in range(0, len(asked), together):
                part = asked[start : start + together]
                prompts = write_prompts(self.model, part, self.observations.of(part), [MODE] * len(part))
                rollouts += roll_out(
                    self.model,
                    prompts,
                    max_new_tokens=self.config.rollout.max_new_tokens,
                    batch_size=self.config.rollout.batch_size,
                    token_budget=_TOKEN_BUDGET,
                )
            self.model.decoder.release()  # of one answer a prompt there are more prompts than in training
            scored = score_rollouts(self.rewards, rollouts).part(slice(len(own)))
            made = [to_prediction(self.model, rollout, "") for rollout in rollouts[: len(own)]]
        everyone = gather_scores(scored, self.runtime)
        found = {
            f"eval/{name.removesuffix('/mean')}": value
            for name, value in everyone.statistics(group_size=1).items()
            if name.endswith("/mean")
        }
        found[METRIC] = found.pop("eval/rewards/combined", float("nan"))
        return found | score_answers([entry for part in self.runtime.gather(made) for entry in part])
