"""GRPO: a group of completions for each prompt, group-relative advantages, clipped ratios, KL to the SFT policy.

One step: draw prompts; sample G completions of each from the current policy; score them with the rewards; normalise
within each group; take one or more clipped policy-gradient steps on the same completions (paper 1.4; engine/grpo_loss
has the mathematics). The policy is a LoRA adapter, the reference a frozen copy of it from before the first step, so
the reference is the SFT model. Vision tower, scene encoder and connector are frozen, so what a prompt sees is encoded
once.

Shapes: P prompts, G completions of each, B rows of a micro-batch, T tokens of the longest completion.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..datasets.scene import Sample
from ..models.image_encoder import load_text_encoder
from ..models.language_model import active_adapter, add_lora, copy_lora, load_lora
from ..models.lm_head import token_logprobs
from ..models.scene_vlm import POLICY, SceneVLM
from .advantages import group_advantages, group_statistics
from .build import give_multiview
from .checkpoint import model_folder, restore_run
from .config import GrpoConfig, RewardConfig
from .data import ObservationCache, fingerprint, load_split
from .grpo_loss import Normalizer, grpo_loss, merge_metrics
from .grpo_presets import GrpoLossConfig
from .mixture import Mixture
from .optim import Optimizer
from .rewards import RewardResult, RewardSet, build_rewards
from .rollout import Rollout, completion_row, roll_out
from .run_folder import open_run
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything, torch_stream
from .saving import Checkpoints
from .tracking import Tracker, append_rows, drop_steps_from
from .training_state import load_state

REFERENCE = "ref"
_LARGE_GAP = 0.1  # nats a token; bfloat16 alone gives about 0.03


def completion_logprobs(
    model: SceneVLM, rollouts: Sequence[Rollout], rows: Sequence[tuple[int, int]], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of sampled tokens under the active adapter, and their entropies: [B, T], 0 where padded.

    Args:
        rows: (prompt, completion) of each row of the micro-batch.
        temperature: the sampling temperature; both sides of the ratio must use the same.
    """
    chosen = [rollouts[prompt] for prompt, _ in rows]
    inputs = model.embed_rows(
        [completion_row(rollouts[prompt].row, rollouts[prompt].token_ids[g]) for prompt, g in rows],
        [rollout.observation for rollout in chosen],
        [rollout.views for rollout in chosen],
    )
    hidden_BLD = model.hidden(inputs)
    targets = [rollouts[prompt].token_ids[g] for prompt, g in rows]
    starts = [len(rollout.row.token_ids) - 1 for rollout in chosen]
    picked = torch.cat(
        [
            hidden_BLD[row, start : start + len(ids)]
            for row, (start, ids) in enumerate(zip(starts, targets, strict=True))
        ]
    )
    result = token_logprobs(
        picked,
        model.language.head_weight_VD,
        torch.tensor([token for ids in targets for token in ids], device=picked.device),
        temperature=temperature,
    )
    assert result.entropy_T is not None
    mask_BT = completion_mask(targets, picked.device)
    empty_BT = torch.zeros(mask_BT.shape, device=picked.device)
    return (
        empty_BT.masked_scatter(mask_BT, result.logps_T.float()),
        empty_BT.masked_scatter(mask_BT, result.entropy_T.detach().float()),
    )


def completion_mask(token_ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> torch.Tensor:
    """True on the tokens of each completion: bool [B, T]."""
    lengths_B = torch.tensor([len(ids) for ids in token_ids], device=device)
    return torch.arange(int(lengths_B.max()), device=device) < lengths_B[:, None]


def sample_groups(
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: ObservationCache,
    config: GrpoConfig,
    step: int,
    rank: int,
) -> list[Rollout]:
    """G completions of each prompt from the current policy.

    A completion's random stream is named by its place in the global batch, so the number of ranks changes nothing.
    """
    rollout = config.rollout
    count = len(samples) * rollout.group_size
    generators = [torch_stream("cpu", config.run.seed, 23, step, rank * count + row) for row in range(count)]
    return roll_out(
        model,
        samples,
        observations.of(samples),
        ["think"] * len(samples),
        max_new_tokens=rollout.max_new_tokens,
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        generators=generators,
        batch_size=rollout.batch_size,
    )


def load_policy(config: GrpoConfig, checkpoint: Path | None, runtime: Runtime) -> tuple[SceneVLM, Path]:
    """The SFT model with a trainable policy adapter and the frozen reference beside it, and the SFT model's folder."""
    # After a resume the reference is what it was at the start, even if the SFT run went on in the meantime.
    initial = Path(load_state(checkpoint)["init"]) if checkpoint else model_folder(config.init)
    model = SceneVLM.from_pretrained(
        initial,
        trainable_adapter=True,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
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
    return model, initial


def build_reward_set(config: RewardConfig, runtime: Runtime) -> RewardSet:
    """The configured rewards, with their text encoder on the run's device."""
    encoder = load_text_encoder(config.semantic_encoder).to(runtime.device) if "semantic" in config.names else None
    return build_rewards(
        config.names, config.weights, encoder=encoder, gate_by_format=config.gate_by_format, per_task=config.per_task
    )


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
    )


def length_statistics(rollouts: Sequence[Rollout], runtime: Runtime) -> dict[str, float]:
    """Length of the completions of all ranks in tokens, and the share that the limit cut off."""
    own = [
        (len(ids), finished)
        for rollout in rollouts
        for ids, finished in zip(rollout.token_ids, rollout.finished, strict=True)
    ]
    everyone = [entry for part in runtime.gather(own) for entry in part]
    lengths, cut = [length for length, _ in everyone], [not finished for _, finished in everyone]
    return {"length/mean": sum(lengths) / len(lengths), "length/max": max(lengths), "length/cut": sum(cut) / len(cut)}


def update_policy(
    model: SceneVLM,
    rollouts: Sequence[Rollout],
    advantages_PG: torch.Tensor,
    optimizer: Optimizer,
    config: GrpoConfig,
    runtime: Runtime,
    step: int,
) -> dict[str, float]:
    """`updates_per_rollout` clipped gradient steps on one set of rollouts; metrics of the last."""
    loss_config = GrpoLossConfig(**asdict(config.loss))
    rows = [(prompt, g) for prompt in range(len(rollouts)) for g in range(config.rollout.group_size)]
    micro = config.run.micro_batch_size or len(rows)
    batches = [rows[start : start + micro] for start in range(0, len(rows), micro)]
    num_tokens = sum(len(ids) for rollout in rollouts for ids in rollout.token_ids)
    sequences, tokens = runtime.total(len(rows), num_tokens)
    normalizer = Normalizer(sequences, tokens, config.rollout.max_new_tokens)
    temperature = config.rollout.temperature

    old: list[torch.Tensor | None] = [None] * len(batches)
    reference: list[torch.Tensor | None] = [None] * len(batches)
    with torch.no_grad():
        if config.updates_per_rollout > 1:
            old = [completion_logprobs(model, rollouts, batch, temperature)[0] for batch in batches]
        if config.loss.beta > 0:
            with active_adapter(model.language, REFERENCE):
                reference = [completion_logprobs(model, rollouts, batch, temperature)[0] for batch in batches]

    metrics: dict[str, float] = {}
    model.train()  # nothing here has dropout; gradient checkpointing works in training mode only
    for update in range(config.updates_per_rollout):
        parts = []
        for batch, old_BT, reference_BT in zip(batches, old, reference, strict=True):
            logps_BT, entropy_BT = completion_logprobs(model, rollouts, batch, temperature)
            ids = [rollouts[prompt].token_ids[g] for prompt, g in batch]
            mask_BT = completion_mask(ids, logps_BT.device)
            advantages_B = torch.stack([advantages_PG[prompt, g] for prompt, g in batch]).to(logps_BT.device)
            result = grpo_loss(
                logps_BT,
                old_BT,
                reference_BT,
                advantages_B,
                mask_BT,
                loss_config,
                normalizer=normalizer,
                entropy_BT=entropy_BT,
            )
            result.loss.backward()
            optimizer.note(
                [rollouts[prompt].sample.sample_id for prompt, _ in batch],
                [rollouts[prompt].sample.task for prompt, _ in batch],
                result.loss,
                texts=[rollouts[prompt].texts[g] for prompt, g in batch],
            )
            if update == 0:
                # The rollout engine and the trainer must agree on what was sampled; their gap is an alarm.
                sampled = torch.tensor([value for prompt, g in batch for value in rollouts[prompt].logps[g]])
                gap = (logps_BT[mask_BT].detach().cpu() - sampled).abs().sum() / tokens
                result.metrics["sampling_gap"] = gap
            parts.append(result.metrics)
        own = {name: value.detach().cpu() for name, value in merge_metrics(parts).items()}
        merged = {name: float(value) for name, value in merge_metrics(runtime.gather(own)).items()}
        metrics = {**metrics, **merged, **optimizer.step(step)}
    model.eval()
    if metrics["sampling_gap"] > _LARGE_GAP:
        log.warning(
            "step %d: the rollouts' log-probabilities differ from the trainer's by %.3f a token on average; "
            "the ratios are not to be trusted",
            step,
            metrics["sampling_gap"],
        )
    return metrics


def log_completions(
    path: Path, step: int, rollouts: Sequence[Rollout], scored: RewardResult, runtime: Runtime
) -> None:
    """Append the step's completions of all ranks, with their rewards, to completions.jsonl."""
    texts = [(rollout.sample.sample_id, text) for rollout in rollouts for text in rollout.texts]
    own = [
        {
            "step": step,
            "sample_id": sample_id,
            "text": text,
            "rewards": {name: _number(values[row]) for name, values in scored.table.items()},
        }
        for row, (sample_id, text) in enumerate(texts)
    ]
    everyone = [entry for part in runtime.gather(own) for entry in part]
    if runtime.is_main:
        append_rows(path, everyone)


def _number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def train(config: GrpoConfig, resume: bool = False) -> Path:
    """Run GRPO and return the last checkpoint. With `resume` it goes on from the newest one."""
    if config.rollout.group_size < 2:
        raise ValueError("rollout.group_size must be at least 2: advantages are relative to a group.")
    if not config.init:
        raise ValueError("GRPO starts from an SFT model: set init to the run folder that `sft` wrote.")
    model_folder(config.init)
    GrpoLossConfig(**asdict(config.loss))  # type: ignore[arg-type]  # both refuse what is wrong before anything loads
    run = config.run
    last = open_run(config, resume)
    runtime = init_runtime(run.device)
    samples, store = load_split(config.data, config.data.train_split, run.seed)
    rewards = build_reward_set(config.reward, runtime)
    seed_everything(run.seed)
    model, initial = load_policy(config, last, runtime)
    give_multiview(model, config.data, samples)
    extra = {"init": str(initial.resolve()), "data": fingerprint([sample.sample_id for sample in samples])}
    optimizer = Optimizer(
        model.trainable_parameters(), config.optim, run.steps, runtime, skipped_dir=Path(run.dir) / "skipped"
    )
    first_step = restore_run(last, optimizer, extra["data"])["step"]
    mixture = Mixture([sample.dataset for sample in samples], config.data.weights, run.seed)
    observations = ObservationCache(
        store,
        model,
        seed=run.seed,
        capacity=config.data.cached_scenes,
        cache_views=config.data.cache_views,
    )
    group_size = config.rollout.group_size
    completions_path = Path(run.dir) / "completions.jsonl"
    if runtime.is_main and completions_path.exists():
        drop_steps_from(completions_path, first_step)
    checkpoints = Checkpoints(
        runtime, config, samples=Counter(sample.dataset for sample in samples), fresh=last is None
    )
    tracker = Tracker(run.dir, "grpo", run.steps, first_step=first_step, sinks=run.trackers, enabled=runtime.is_main)
    with tracker, checkpoints:
        for step in range(first_step, run.steps):
            seed_everything(run.seed, step, runtime.rank)
            rows = mixture.rows(step, run.batch_size, runtime)
            rollouts = sample_groups(model, [samples[row] for row in rows], observations, config, step, runtime.rank)
            scored = score_rollouts(rewards, rollouts)
            everyone = gather_scores(scored, runtime)
            rewards_PG = torch.from_numpy(everyone.combined_N).view(-1, group_size)
            advantages_PG = group_advantages(rewards_PG, config.loss.scale).float()  # type: ignore[arg-type]
            metrics = group_statistics(rewards_PG) | everyone.statistics(group_size)
            metrics |= length_statistics(rollouts, runtime)
            own_PG = advantages_PG[runtime.rank * len(rollouts) :][: len(rollouts)]
            metrics |= update_policy(model, rollouts, own_PG, optimizer, config, runtime, step)
            tracker.advance(reward=metrics["reward"], kl=metrics.get("kl", 0.0), length=metrics["length/mean"])
            if (step + 1) % run.log_every == 0 or step + 1 == run.steps:
                tracker.log(step, metrics)
                log_completions(completions_path, step, rollouts, scored, runtime)
            if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                last = checkpoints.save(step + 1, model, optimizer, extra)
        if last is None:
            last = checkpoints.save(0, model, optimizer, extra)
    rewards.close()
    close_runtime(runtime)
    return last
