"""GRPO: a group of completions for each prompt, group-relative advantages, clipped ratios, KL to the SFT policy.

One step: draw prompts; sample G completions of each from the current policy; score them with the rewards; normalise
within each group (engine/groups.py); take one or more clipped policy-gradient steps on the same completions (paper
1.4; engine/grpo_loss.py has the mathematics, engine/grpo_packs.py the forward passes). The policy is a LoRA adapter,
the reference a frozen copy of it from before the first step, so the reference is the SFT model. Vision tower, scene
encoder and connector are frozen, so what a prompt sees is encoded once.

Shapes: P prompts, G completions of each, B completions of a pack, T tokens of the longest.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..models.language_model import active_adapter, add_lora, copy_lora, load_lora
from ..models.scene_vlm import POLICY, SceneVLM
from .build import give_multiview, speed_up
from .checkpoint import model_folder, restore_run
from .config import GrpoConfig
from .data import ObservationCache, fingerprint, load_split
from .groups import Experience, GroupSampler
from .grpo_eval import METRIC, GrpoHeldOut
from .grpo_log import GrpoLog
from .grpo_loss import Normalizer, grpo_loss, merge_metrics
from .grpo_packs import Pack, filled, make_packs, pack_logprobs
from .optim import Optimizer
from .rewards import RewardSet, build_configured_rewards
from .run_folder import open_run, run_folder
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything
from .saving import Checkpoints
from .throughput import Phases
from .training_state import load_state

REFERENCE = "ref"
_LARGE_MISMATCH = 0.1  # nats a token; bfloat16 alone gives about 0.03


def load_policy(config: GrpoConfig, checkpoint: Path | None, runtime: Runtime) -> tuple[SceneVLM, Path]:
    """The SFT model with a trainable policy adapter and the frozen reference beside it, and the SFT model's folder."""
    # After a resume the reference is what it was at the start, even if the SFT run went on in the meantime.
    initial = Path(load_state(checkpoint)["init"]) if checkpoint else model_folder(config.init)
    model = SceneVLM.from_pretrained(
        initial, trainable_adapter=True, gradient_checkpointing=config.gradient_checkpointing
    )
    if not model.language.has_adapter:
        # A fresh adapter changes nothing yet, so the policy starts as the SFT model here too.
        add_lora(model.language, POLICY, rank=config.lora_rank, alpha=config.lora_alpha)
    copy_lora(model.language, POLICY, REFERENCE)
    if checkpoint:
        # The reference stays what it was before the first step; only the policy moves on.
        load_lora(model.language, POLICY, checkpoint / "model" / "adapter" / POLICY, trainable=True)
    model.to(runtime.device)
    model.set_trainable(language="lora", connector=False, scene_encoder=False)
    speed_up(model, config.blocks)
    return model, initial


@torch.no_grad()
def fixed_logprobs(model: SceneVLM, packs: list[Pack], config: GrpoConfig) -> tuple[list, list]:
    """Log-probabilities that the updates compare with, [B, T] of each pack: of the policy as it was when it sampled,
    where there are several updates, and of the reference, where the loss has a KL term. Else None."""
    temperature = config.rollout.temperature
    old: list[torch.Tensor | None] = [None] * len(packs)
    reference: list[torch.Tensor | None] = [None] * len(packs)
    if config.updates_per_rollout > 1:
        old = [pack_logprobs(model, pack, temperature)[0] for pack in packs]
    if config.loss.beta > 0:
        with active_adapter(model.language, REFERENCE):
            reference = [pack_logprobs(model, pack, temperature)[0] for pack in packs]
    return old, reference


def kept_completions(experience: Experience, mask_truncated: bool) -> list[list[int]]:
    """Which completions of each group an update is about: those with a reward, and with an end if that is asked."""
    group_size = experience.advantages_PG.shape[1]
    missing_PG = np.isnan(experience.scored.combined_N).reshape(-1, group_size)
    return [
        [row for row in range(group_size) if not missing[row] and (rollout.finished[row] or not mask_truncated)]
        for rollout, missing in zip(experience.rollouts, missing_PG, strict=True)
    ]


def warn(runtime: Runtime, message: str, *values: object) -> None:
    """A warning about all ranks, said once."""
    if runtime.is_main:
        log.warning(message, *values)


def update_policy(
    model: SceneVLM,
    experience: Experience,
    optimizer: Optimizer,
    config: GrpoConfig,
    runtime: Runtime,
    step: int,
    phases: Phases,
) -> dict[str, float]:
    """`updates_per_rollout` clipped gradient steps on one set of rollouts; metrics of the last."""
    rollouts = experience.rollouts
    kept = kept_completions(experience, config.loss.mask_truncated)
    lengths = [len(rollout.token_ids[row]) for rollout, its in zip(rollouts, kept, strict=True) for row in its]
    sequences, tokens = runtime.total(len(lengths), sum(lengths))
    if not sequences:
        warn(runtime, "step %d: no completion with a reward came to its end; the policy stays as it is", step)
        return {}
    normalizer = Normalizer(sequences, tokens, config.rollout.max_new_tokens)
    with phases("reference"):
        packs = make_packs(model, rollouts, kept, config.token_budget, config.run.micro_batch_size)
        old, reference = fixed_logprobs(model, packs, config)

    metrics: dict[str, float] = {}
    # Nothing here has dropout; gradient checkpointing works in training mode only. The rest stays in evaluation mode:
    # the next prompts are being written with it.
    model.language.train()
    for _ in range(config.updates_per_rollout):
        parts = []
        with phases("update"):
            for pack, old_BT, reference_BT in zip(packs, old, reference, strict=True):
                logps_BT, entropy_BT = pack_logprobs(model, pack, config.rollout.temperature)
                its = [(rollouts[prompt], row) for prompt, row in pack.rows]
                result = grpo_loss(
                    logps_BT,
                    old_BT,
                    reference_BT,
                    torch.stack([experience.advantages_PG[row] for row in pack.rows]).to(logps_BT.device),
                    pack.mask_BT,
                    config.loss,
                    normalizer=normalizer,
                    entropy_BT=entropy_BT,
                    sampler_logps_BT=filled([rollout.logps[row] for rollout, row in its], logps_BT.device),
                )
                result.loss.backward()
                optimizer.note(
                    [rollout.sample.sample_id for rollout, _ in its],
                    [rollout.sample.task for rollout, _ in its],
                    result.loss,
                    texts=[rollout.texts[row] for rollout, row in its],
                )
                parts.append(result.metrics)
            own = {name: value.detach().cpu() for name, value in merge_metrics(parts).items()}
            merged = {name: float(value) for name, value in merge_metrics(runtime.gather(own)).items()}
            metrics = {**metrics, **merged, **optimizer.step(step)}
    model.language.eval()
    if metrics["mismatch/mean"] > _LARGE_MISMATCH:
        warn(
            runtime,
            "step %d: the rollouts' log-probabilities differ from the trainer's by %.3f a token on average; "
            "the ratios are not to be trusted",
            step,
            metrics["mismatch/mean"],
        )
    return metrics


def train(config: GrpoConfig, resume: bool = False) -> Path:
    """Run GRPO and return the last checkpoint. With `resume` it goes on from the newest one."""
    if config.rollout.group_size < 2:
        raise ValueError("rollout.group_size must be at least 2: advantages are relative to a group.")
    if config.run.best_metric and not config.run.eval_every:
        raise ValueError("run.best_metric is set, but nothing is evaluated; set run.eval_every too.")
    if not config.init:
        raise ValueError("GRPO starts from an SFT model: set init to the run folder that `sft` wrote.")
    model_folder(config.init)
    with run_folder(config.run.dir):
        last = open_run(config, resume)
        runtime = init_runtime(config.run.device)
        samples, store = load_split(config.data, config.data.train_split, config.run.seed)
        rewards = build_configured_rewards(config.reward, runtime.device)
        last = reinforce(config, last, samples, store, rewards, runtime)
        rewards.close()
        close_runtime(runtime)
    return last


def reinforce(
    config: GrpoConfig,
    last: Path | None,
    samples: Sequence[Sample],
    store: SceneStore,
    rewards: RewardSet,
    runtime: Runtime,
) -> Path:
    """All steps from a checkpoint on, or from the start; returns the last checkpoint."""
    run = config.run
    seed_everything(run.seed)
    model, initial = load_policy(config, last, runtime)
    give_multiview(model, config.data, samples)
    extra = {"init": str(initial.resolve()), "data": fingerprint([sample.sample_id for sample in samples])}
    optimizer = Optimizer(
        model.trainable_parameters(), config.optim, run.steps, runtime, skipped_dir=Path(run.dir) / "skipped"
    )
    first_step = restore_run(last, optimizer, extra["data"])["step"]
    observations = ObservationCache.of_config(config.data, store, model, run.seed)
    groups = GroupSampler(config, model, samples, observations, rewards, runtime)
    held_out = GrpoHeldOut(config, model, rewards, runtime) if run.eval_every else None
    checkpoints = Checkpoints(
        runtime,
        config,
        samples=Counter(sample.dataset for sample in samples),
        fresh=last is None,
        metric=METRIC,
    )
    log_of_run = GrpoLog(config, runtime, first_step=first_step)
    model.eval()
    with log_of_run, checkpoints, groups:
        for step in range(first_step, run.steps):
            seed_everything(run.seed, step, runtime.rank)
            experience = groups.collect(step, log_of_run.phases)
            metrics = experience.metrics
            if experience.num_informative:
                metrics |= update_policy(model, experience, optimizer, config, runtime, step, log_of_run.phases)
            else:
                warn(runtime, "step %d: no group has two different rewards; the policy stays as it is", step)
            log_of_run.step(step, metrics, experience)
            if held_out is not None and run.due(step, run.eval_every):
                groups.settle()
                scores = held_out.evaluate()
                log_of_run.tracker.log(step, scores)
                checkpoints.offer_best(step + 1, scores, model)
            if run.due(step, run.save_every):
                last = checkpoints.save(step + 1, model, optimizer, extra)
        if last is None:
            last = checkpoints.save(0, model, optimizer, extra)
    return last
