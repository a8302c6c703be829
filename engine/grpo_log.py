"""What a GRPO run tells of itself: rewards, what was sampled, where the time goes."""

import math
from pathlib import Path

import torch

from .config import GrpoConfig
from .groups import Experience
from .runtime import Runtime
from .throughput import Phases
from .tracking import append_rows, drop_steps_from, track

COMPLETIONS = "completions.jsonl"


class GrpoLog:
    """The log of one run. Use as a context manager."""

    def __init__(self, config: GrpoConfig, runtime: Runtime, *, first_step: int):
        run = config.run
        self.run = run
        self.runtime = runtime
        self.phases = Phases(runtime.device)
        self.path = Path(run.dir) / COMPLETIONS
        # tokens of completions, and with them those of prompts, since a row was logged
        self._decoded = self._seen = 0.0
        if runtime.is_main and self.path.exists():
            drop_steps_from(self.path, first_step)
        self.tracker = track(run, "grpo", runtime, first_step=first_step)

    def __enter__(self) -> "GrpoLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.__exit__()

    def step(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        """One step done; `metrics` are of all ranks together."""
        completions = sum(len(ids) for rollout in experience.rollouts for ids in rollout.token_ids)
        prompts = sum(len(rollout.row.token_ids) for rollout in experience.rollouts)
        decoded, seen = self.runtime.total(completions, completions + prompts)
        self._decoded += decoded
        self._seen += seen
        self.tracker.advance(reward=metrics["reward"], kl=metrics.get("kl", 0.0), length=metrics["length/mean"])
        if self.run.due(step, self.run.log_every):
            self.tracker.log(step, metrics, speed=self._speed())
            self._write_completions(step, experience)

    def _speed(self) -> dict[str, float]:
        """Seconds of each phase and tokens a second since a row was logged, and the most memory so far.

        `tokens_per_s` counts each prompt once, as it is computed, over all phases; `decode_tokens_per_s` the tokens of
        completions over what sampling them took.
        """
        found = self.phases.read()
        whole, rollout = sum(found.values()), found.get("seconds/rollout", 0.0)
        found["tokens_per_s"] = self._seen / max(whole, 1e-9)
        found["decode_tokens_per_s"] = self._decoded / max(rollout, 1e-9)
        if self.runtime.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated(self.runtime.device) / 2**30
        self._decoded = self._seen = 0.0
        return found

    def _write_completions(self, step: int, experience: Experience) -> None:
        """Append the step's completions of all ranks, with their rewards and advantages, to completions.jsonl."""
        first = self.runtime.rank * len(experience.rollouts)
        texts = [
            (first + number, rollout, text)
            for number, rollout in enumerate(experience.rollouts)
            for text in rollout.texts
        ]
        advantages_N = experience.advantages_PG.flatten().tolist()
        own = [
            {
                "step": step,
                "group": group,
                "sample_id": rollout.sample.sample_id,
                "question": rollout.sample.question,
                "text": text,
                "rewards": {name: _number(values[row]) for name, values in experience.scored.table.items()},
                "reward": _number(experience.scored.combined_N[row]),
                "advantage": _number(advantages_N[row]),
            }
            for row, (group, rollout, text) in enumerate(texts)
        ]
        everyone = [entry for part in self.runtime.gather(own) for entry in part]
        if self.runtime.is_main:
            append_rows(self.path, everyone)


def _number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
