"""What a GRPO step learns from: groups of completions of some prompts, scored and compared within each group.

Shapes: P prompts of this rank, G completions of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..datasets.scene import Sample
from ..models.scene_vlm import SceneVLM
from .advantages import decoupled_advantages, group_advantages, group_statistics, informative_groups
from .ahead import Ahead
from .config import GrpoConfig
from .data import ObservationCache
from .mixture import Mixture
from .rewards import RewardResult, RewardSet
from .rollout import Prompt, Rollout, roll_out, write_prompts
from .runtime import Runtime, log, torch_stream
from .throughput import Phases

MODE = "think"  # the response mode that is reinforced
_ATTEMPTS = 32  # samples that are tried for one place


@dataclass
class Experience:
    """Groups of one step."""

    rollouts: list[Rollout]  # P, of this rank
    scored: RewardResult  # of their completions, group by group
    advantages_PG: torch.Tensor
    metrics: dict[str, float]  # of all ranks together
    num_informative: int  # groups of all ranks whose rewards differ: without one there is nothing to learn


class Written(NamedTuple):
    """Prompts for some places in this rank's batch."""

    places: list[int]
    prompts: list[Prompt]
    too_long: int  # prompts that others took the place of


class GroupSampler:
    """Draws prompts, samples completions of the policy as it is, and scores them.

    A prompt whose completions all earn the same has nothing to teach. With `rollout.resample_rounds` others take the
    place of such prompts, as often as that says (dynamic sampling, DAPO, arXiv 2503.14476, with a limit).

    Where a GPU samples, the prompts of the next step are written meanwhile, in a thread that runs inside `with`.

    Args:
        samples: that prompts are drawn from.
        rewards: of completions.
        ahead: whether the thread is used; None: on a GPU.
    """

    def __init__(
        self,
        config: GrpoConfig,
        model: SceneVLM,
        samples: Sequence[Sample],
        observations: ObservationCache,
        rewards: RewardSet,
        runtime: Runtime,
        *,
        ahead: bool | None = None,
    ):
        self.config = config
        self.model = model
        self.samples = samples
        self.observations = observations
        self.rewards = rewards
        self.runtime = runtime
        names, weights, seed = [sample.dataset for sample in samples], config.data.weights, config.run.seed
        self.mixture = Mixture(names, weights, seed)
        self.substitutes = Mixture(names, weights, seed + 1)  # for prompts with nothing to teach
        self.shorter = Mixture(names, weights, seed + 2)  # for prompts that are too long
        on = runtime.device.type == "cuda" if ahead is None else ahead
        self.coming = Ahead(self._first_prompts, runtime.device, num_steps=config.run.steps, on=on)

    def __enter__(self) -> "GroupSampler":
        self.coming.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.coming.__exit__()

    def settle(self) -> None:
        """Wait until no prompts are being written, so that the model may be used for something else."""
        self.coming.settle()

    def collect(self, step: int, phases: Phases) -> Experience:
        """The groups of a step. All ranks take part; while completions are sampled none waits for another."""
        run, rounds = self.config.run, self.config.rollout.resample_rounds
        with phases("prompts"):
            written = self.coming[step]
        too_long = written.too_long
        rollouts, scored = self._sample(written, step, 0, phases)
        replaced = 0
        for again in range(1, rounds + 1):
            (flat_P,) = torch.nonzero(~self._informative(scored), as_tuple=True)
            flat = flat_P.tolist()
            if not self.runtime.most(len(flat)):
                break
            if not flat:
                continue
            rows = self.substitutes.rows(step * rounds + again - 1, run.batch_size, self.runtime)
            with phases("prompts"):
                self.settle()
                written = self._write({place: rows[place] for place in flat}, step, again)
            too_long += written.too_long
            others, their_scores = self._sample(written, step, again, phases)
            for number, better in enumerate(self._informative(their_scores).tolist()):
                if better:
                    rollouts[flat[number]] = others[number]
                    scored.put(self._of_group(flat[number]), their_scores, self._of_group(number))
                    replaced += 1
        return self._compared(rollouts, scored, replaced, too_long)

    def _first_prompts(self, step: int) -> Written:
        """The prompts that a step begins with."""
        drawn = self.mixture.rows(step, self.config.run.batch_size, self.runtime)
        return self._write(dict(enumerate(drawn)), step, 0)

    def _write(self, rows: Mapping[int, int], step: int, again: int) -> Written:
        """Prompts of the samples for some places in this rank's batch."""
        samples = [self.samples[row] for row in rows.values()]
        written = write_prompts(self.model, samples, self.observations.of(samples), [MODE] * len(samples))
        turn = step * (self.config.rollout.resample_rounds + 1) + again
        tried = [self._short(prompt, place, turn) for prompt, place in zip(written, rows, strict=True)]
        return Written(list(rows), [prompt for prompt, _ in tried], sum(count for _, count in tried))

    def _sample(self, written: Written, step: int, again: int, phases: Phases) -> tuple[list[Rollout], RewardResult]:
        """Completions of some prompts and what they earn."""
        rollout, runtime = self.config.rollout, self.runtime
        # A completion's random stream is named by its place in the global batch, so that ranks change nothing.
        first = runtime.rank * (self.config.run.batch_size // runtime.world_size)
        size = rollout.group_size
        numbers = [(first + place) * size + g for place in written.places for g in range(size)]
        with phases("rollout"):
            rollouts = roll_out(
                self.model,
                written.prompts,
                max_new_tokens=rollout.max_new_tokens,
                group_size=size,
                temperature=rollout.temperature,
                generators=[torch_stream("cpu", self.config.run.seed, 23, step, again, number) for number in numbers],
                batch_size=rollout.batch_size,
            )
        with phases("rewards"):
            return rollouts, score_rollouts(self.rewards, rollouts)

    def _short(self, prompt: Prompt, place: int, turn: int) -> tuple[Prompt, int]:
        """A prompt, or that of another sample where it is too long, and how many were; `turn` counts the draws."""
        limit, run = self.config.rollout.max_prompt_tokens, self.config.run
        for attempt in range(_ATTEMPTS):
            length = len(prompt.row.token_ids)
            if not limit or length <= limit:
                return prompt, attempt
            name = prompt.sample.sample_id
            log.warning("the prompt of %s has %d tokens; another takes its place", name, length)
            sample = self.samples[self.shorter.rows(turn * _ATTEMPTS + attempt, run.batch_size, self.runtime)[place]]
            (prompt,) = write_prompts(self.model, [sample], self.observations.of([sample]), [MODE])
        raise ValueError(
            f"{_ATTEMPTS + 1} prompts one after the other have more than rollout.max_prompt_tokens = {limit} tokens; "
            "raise it, or give the model fewer views or layout tokens."
        )

    def _compared(self, rollouts: list[Rollout], scored: RewardResult, replaced: int, too_long: int) -> Experience:
        """Advantages of this rank's groups, and what all ranks' are like."""
        group_size = self.config.rollout.group_size
        everyone = gather_scores(scored, self.runtime)
        advantages_PG = self._advantages(everyone).float()
        resampled, longer = self.runtime.total(replaced, too_long)
        informative_P = self._informative(everyone)
        metrics = group_statistics(self._by_group(everyone.combined_N)) | everyone.statistics(group_size)
        metrics["frac_reward_zero_std"] = 1.0 - informative_P.float().mean().item()
        metrics |= length_statistics(rollouts, self.runtime) | {"resampled": resampled, "too_long": longer}
        own = slice(self.runtime.rank * len(rollouts), (self.runtime.rank + 1) * len(rollouts))
        informative = int(informative_P.sum())
        return Experience(rollouts, scored, advantages_PG[own], metrics, informative)

    def _advantages(self, scored: RewardResult) -> torch.Tensor:
        """Of every completion [P, G]."""
        if self.config.reward.aggregation == "sum_then_normalize":
            return group_advantages(self._by_group(scored.combined_N), self.config.loss.scale)
        rewards_RPG = torch.stack([self._by_group(scored.paid(name)) for name in scored.table])
        return decoupled_advantages(
            rewards_RPG, torch.stack([self._by_group(scored.weights[n]) for n in scored.table])
        )

    def _informative(self, scored: RewardResult) -> torch.Tensor:
        """Whether a group [P] teaches something: its rewards differ; one by one where they are normalised so."""
        if self.config.reward.aggregation == "sum_then_normalize":
            return informative_groups(self._by_group(scored.combined_N))
        weighted = [np.where(scored.weights[name] > 0, scored.paid(name), np.nan) for name in scored.table]
        return torch.stack([informative_groups(self._by_group(values_N)) for values_N in weighted]).any(0)

    def _by_group(self, values_N: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_N).view(-1, self.config.rollout.group_size)

    def _of_group(self, prompt: int) -> slice:
        size = self.config.rollout.group_size
        return slice(prompt * size, (prompt + 1) * size)


def score_rollouts(rewards: RewardSet, rollouts: Sequence[Rollout]) -> RewardResult:
    """Rewards of all completions, group by group. Boxes go in the model frame, which answers are written in."""
    columns: dict[str, list] = {"task": [], "question": [], "references": [], "target_boxes": [], "proposals": []}
    for rollout in rollouts:
        sample, observation = rollout.sample, rollout.observation
        assert observation.encoded is not None
        entry = {
            "task": sample.task,
            "question": sample.question,
            "references": sample.references or [sample.answer],
            "target_boxes": observation.scene.to_model(sample.target_boxes_K7),
            "proposals": observation.encoded.named,
        }
        for name, value in entry.items():
            columns[name] += [value] * len(rollout.texts)
    return rewards([text for rollout in rollouts for text in rollout.texts], **columns)


def gather_scores(scored: RewardResult, runtime: Runtime) -> RewardResult:
    """The rewards of all ranks as one result, in the order of ranks."""
    parts = runtime.gather(scored)
    return RewardResult(
        np.concatenate([part.combined_N for part in parts]),
        {name: np.concatenate([part.table[name] for part in parts]) for name in scored.table},
        {name: np.concatenate([part.failed[name] for part in parts]) for name in scored.failed},
        np.concatenate([part.gated_N for part in parts]),
        {name: np.concatenate([part.weights[name] for part in parts]) for name in scored.weights},
    )


def length_statistics(rollouts: Sequence[Rollout], runtime: Runtime) -> dict[str, float]:
    """Lengths of the completions of all ranks in tokens, and the share that the limit cut off."""
    own = [
        (len(ids), finished)
        for rollout in rollouts
        for ids, finished in zip(rollout.token_ids, rollout.finished, strict=True)
    ]
    everyone = [entry for part in runtime.gather(own) for entry in part]
    lengths, ended = [length for length, _ in everyone], [length for length, finished in everyone if finished]
    found = {
        "length/mean": sum(lengths) / len(lengths),
        "length/min": min(lengths),
        "length/max": max(lengths),
        "length/cut": 1 - len(ended) / len(lengths),
    }
    return found | ({"length/ended_mean": sum(ended) / len(ended)} if ended else {})
