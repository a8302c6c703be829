"""Supervised fine-tuning: the cold start on chain-of-thought data (paper 1.5) and the task mix.

What is learned is the target after the prompt, `<think>…</think><answer>…</answer>`, or `<answer>…</answer>` alone
where the data has no thought. The loss is the mean over all taught tokens of the global batch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..datasets.prompts import build_target, training_mode
from ..datasets.scene import Sample
from ..models.inputs import IGNORE
from ..models.lm_head import cross_entropy
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from .build import build_model, check_settings, give_multiview
from .checkpoint import model_folder, open_run, restore_run, save_run
from .config import SftConfig
from .data import ObservationCache, fingerprint, load_split
from .optim import Optimizer
from .runtime import Runtime, batch_indices, close_runtime, init_runtime, log, seed_everything
from .tracking import Tracker


def sft_loss(
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: Sequence[Observation],
    *,
    pointers: str,
    temperature: float = 0.5,
) -> tuple[torch.Tensor, int]:
    """Cross-entropy of the targets, summed over taught tokens, and their number.

    Args:
        observations: the samples' scenes, encoded.
        pointers: "name" teaches `<obj12>` for a box that a proposal covers; "box" always teaches numbers.
        temperature: of the relaxed choice of views, where its weights learn.
    """
    model.expect(samples)
    rows, views = [], []
    for sample, observation in zip(samples, observations, strict=True):
        mode = training_mode(sample)
        target = build_target(sample, mode)
        if pointers == "name":
            target = model.with_names(target, observation)
        row, chosen = model.write_row(sample, observation, mode, target)
        rows.append(row)
        views.append(chosen)
    gates = model.view_gates(samples, observations, temperature)
    inputs = model.embed_rows(rows, observations, views, gates=gates)
    hidden_BLD = model.hidden(inputs)
    taught_BL = inputs.labels_BL[:, 1:] != IGNORE
    loss = cross_entropy(
        hidden_BLD[:, :-1][taught_BL],
        model.language.head_weight_VD,
        inputs.labels_BL[:, 1:][taught_BL],
        normalizer=1.0,
    )
    return loss, int(taught_BL.sum())


def load_model(config: SftConfig, checkpoint: Path | None, runtime: Runtime) -> SceneVLM:
    """The model to train: from the checkpoint, from `init`, or built from its parts."""
    source = checkpoint / "model" if checkpoint else model_folder(config.init) if config.init else None
    if source:
        model = SceneVLM.from_pretrained(
            source,
            attention=config.model.language.attention,
            trainable_adapter=True,
            gradient_checkpointing=config.model.language.gradient_checkpointing,
        )
        check_settings(model, config.model, config.data)
    else:
        model = build_model(config.model, config.data)
    model.to(runtime.device)
    model.set_trainable(
        language=config.model.language.train,
        connector=True,
        scene_encoder=config.model.train_scene_encoder,
        view_weights=config.model.views.weights == "learned",
    )
    return model.train()


def accumulate_gradients(
    model: SceneVLM, samples: Sequence[Sample], observations: ObservationCache, config: SftConfig, step: int
) -> tuple[float, int]:
    """Back-propagate one batch in micro-batches; returns the summed loss and the number of taught tokens.

    The pull of learned view weights is added for each token, since gradients are divided by the number of tokens; it
    is not part of the loss that is returned.
    """
    views, selector = config.model.views, model.view_selector
    micro = config.run.micro_batch_size or len(samples)
    loss_sum, tokens = 0.0, 0
    for start in range(0, len(samples), micro):
        batch = samples[start : start + micro]
        seen = observations.resampled(batch, seed=step) if model.train_scene_encoder else observations.of(batch)
        loss, count = sft_loss(model, batch, seen, pointers=config.pointers, temperature=views.temperature)
        pull = views.pull * count * selector.regularizer() if selector is not None and selector.learns else 0.0
        (loss + pull).backward()
        loss_sum += float(loss.detach())
        tokens += count
    return loss_sum, tokens


def train(config: SftConfig, resume: bool = False) -> Path:
    """Run SFT and return the last checkpoint. With `resume` it goes on from the newest one.

    With run.steps 0 the untrained model is written, to compare with.
    """
    if config.pointers not in ("name", "box"):
        raise ValueError(f"pointers is {config.pointers!r}; choose name or box.")
    run = config.run
    last = open_run(config, resume)
    runtime = init_runtime(run.device)
    samples, store = load_split(config.data, config.data.train_split, run.seed)
    seed_everything(run.seed)
    model = load_model(config, last, runtime)
    give_multiview(model, config.data, samples)
    selector = model.view_selector
    factor = config.model.views.lr_factor
    optimizer = Optimizer(
        model.trainable_parameters(),
        config.optim,
        run.steps,
        runtime,
        lr_factors={"view_selector.w_text": factor, "view_selector.w_image": factor},
    )
    extra = {"data": fingerprint([sample.sample_id for sample in samples])}
    first_step = restore_run(last, optimizer, extra["data"])["step"]
    num_trained = sum(parameter.numel() for parameter in model.trainable_parameters().values())
    log.info("%d samples of %s, %.2f M trained parameters", len(samples), config.data.datasets, num_trained / 1e6)
    observations = ObservationCache(
        store,
        model,
        seed=run.seed,
        capacity=config.data.cached_scenes,
        cache_views=config.data.cache_views,
    )
    with Tracker(
        run.dir, "sft", run.steps, first_step=first_step, sinks=run.trackers, enabled=runtime.is_main
    ) as tracker:
        for step in range(first_step, run.steps):
            seed_everything(run.seed, step, runtime.rank)
            rows = batch_indices(len(samples), step, run.batch_size, run.seed, runtime)
            sums = accumulate_gradients(model, [samples[row] for row in rows], observations, config, step)
            loss_sum, tokens = runtime.total(*sums)
            metrics = optimizer.step(step, divisor=max(tokens, 1.0))
            metrics |= {"loss": loss_sum / max(tokens, 1.0), "tokens": tokens}
            if selector is not None and selector.learns:
                selector.project()
                metrics |= {"view_w_text": selector.w_text.item(), "view_w_image": selector.w_image.item()}
            tracker.advance(loss=metrics["loss"], lr=metrics["lr"])
            if (step + 1) % run.log_every == 0 or step + 1 == run.steps:
                tracker.log(step, metrics)
            if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                last = save_run(runtime, config, step + 1, model, optimizer, extra)
    if last is None:
        last = save_run(runtime, config, 0, model, optimizer, extra)
    close_runtime(runtime)
    return last
