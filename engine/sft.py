"""Supervised fine-tuning: the cold start on chain-of-thought data (paper 1.5) and the task mix.

What is learned is the target after the prompt, `<think>…</think><answer>…</answer>`, or `<answer>…</answer>` alone
where the data has no thought. The loss is the mean over all taught tokens of the global batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..datasets.scene import Sample
from ..models.inputs import plan_packs
from ..models.lm_head import cross_entropy
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from .build import build_model, check_settings, give_multiview
from .checkpoint import model_folder, restore_run
from .config import SftConfig
from .data import ObservationCache, fingerprint, load_split
from .optim import Optimizer
from .run_folder import open_run
from .runtime import Runtime, batch_indices, close_runtime, init_runtime, log, seed_everything
from .saving import Checkpoints
from .sft_data import Batches, Taught
from .tracking import Tracker

_MULTIPLE = 128  # of tokens in a pack on a GPU: its matrix products come in tiles


def sft_loss(
    model: SceneVLM, taught: Sequence[Taught], *, length: int = 0, temperature: float = 0.5
) -> tuple[torch.Tensor, int]:
    """Cross-entropy of the targets of one pack, summed over taught tokens, and their number.

    Args:
        length: tokens to fill the pack up to; 0: as many as it has.
        temperature: of the relaxed choice of views, where its weights learn.
    """
    observations = [entry.observation for entry in taught]
    inputs = model.embed_rows(
        [entry.row for entry in taught],
        observations,
        [entry.views for entry in taught],
        gates=model.view_gates([entry.sample for entry in taught], observations, temperature),
        packed_length=length,
    )
    loss = cross_entropy(
        model.hidden(inputs).flatten(0, 1)[inputs.predicting_T],
        model.language.head_weight_VD,
        inputs.targets_T,
        ignore_index=None,
        normalizer=1.0,
    )
    return loss, len(inputs.targets_T)


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


def speed_up(model: SceneVLM, blocks: str) -> None:
    """Let the language model's blocks run as the configuration says (SftConfig.blocks)."""
    on_gpu = model.device.type == "cuda"
    frozen = not model.language.head_weight_VD.requires_grad
    if blocks == "auto":
        blocks = ("fused" if frozen else "compiled") if on_gpu else "plain"
    if blocks == "compiled" or on_gpu:
        model.language.compile_blocks(decoder=blocks == "compiled")
    if blocks == "fused":
        model.language.fuse_blocks()


def cut_encodings(observations: Sequence[Observation]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the graph between the scene encoder and all that follows: pairs of an encoding and what stands for it.

    Packs share scenes, and each is back-propagated by itself; the encoder is, once, when all of them have been.
    """
    pairs = []
    for observation in {id(observation): observation for observation in observations}.values():
        encoded = observation.encoded
        assert encoded is not None
        tensors = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
        cut = {
            name: value.detach().requires_grad_()
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        pairs += [(tensors[name], value) for name, value in cut.items()]
        observation.encoded = replace(encoded, **cut)
    return pairs


def accumulate_gradients(
    model: SceneVLM, taught: Sequence[Taught], config: SftConfig, optimizer: Optimizer
) -> tuple[torch.Tensor, dict[str, int]]:
    """Back-propagate this rank's part of a batch, pack by pack. A GPU is told what to do and not waited for.

    The pull of learned view weights is added for each token, since gradients are divided by the number of tokens; it
    is not part of the loss that is returned.

    Returns:
        the summed loss, and the numbers of taught tokens and of all tokens that go through the language model.
    """
    views, selector = config.model.views, model.view_selector
    lengths = [len(entry.row.token_ids) for entry in taught]
    encodings = cut_encodings([entry.observation for entry in taught]) if model.train_scene_encoder else []
    loss_sum = torch.zeros((), device=model.device)
    tokens = 0
    for pack in plan_packs(lengths, config.token_budget, config.run.micro_batch_size):
        total = sum(lengths[row] for row in pack)
        filled = _MULTIPLE * -(-total // _MULTIPLE) if model.device.type == "cuda" else total
        loss, count = sft_loss(model, [taught[row] for row in pack], length=filled, temperature=views.temperature)
        pull = views.pull * count * selector.regularizer() if selector is not None and selector.learns else 0.0
        (loss + pull).backward()
        its = [taught[row].sample for row in pack]
        optimizer.note([sample.sample_id for sample in its], [sample.task for sample in its], loss)
        loss_sum += loss.detach()
        tokens += count
    reached = [(encoding, cut.grad) for encoding, cut in encodings if cut.grad is not None]
    if reached:
        torch.autograd.backward([encoding for encoding, _ in reached], [gradient for _, gradient in reached])
    return loss_sum, {"tokens": tokens, "sequence_tokens": sum(lengths)}


def train(config: SftConfig, resume: bool = False) -> Path:
    """Run SFT and return the last checkpoint. With `resume` it goes on from the newest one.

    With run.steps 0 the untrained model is written, to compare with.
    """
    run = config.run
    last = open_run(config, resume)
    runtime = init_runtime(run.device)
    samples, store = load_split(config.data, config.data.train_split, run.seed)
    seed_everything(run.seed)
    model = load_model(config, last, runtime)
    give_multiview(model, config.data, samples)
    speed_up(model, config.blocks)
    selector = model.view_selector
    factor = config.model.views.lr_factor
    optimizer = Optimizer(
        model.trainable_parameters(),
        config.optim,
        run.steps,
        runtime,
        lr_factors={"view_selector.w_text": factor, "view_selector.w_image": factor},
        skipped_dir=Path(run.dir) / "skipped",
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

    def choose(step: int) -> list[Sample]:
        rows = batch_indices(len(samples), step, run.batch_size, run.seed, runtime)
        return [samples[row] for row in rows]

    batches = Batches(model, choose, observations, pointers=config.pointers, num_steps=run.steps)
    checkpoints = Checkpoints(
        runtime, config, samples=Counter(sample.dataset for sample in samples), fresh=last is None
    )
    tracker = Tracker(run.dir, "sft", run.steps, first_step=first_step, sinks=run.trackers, enabled=runtime.is_main)
    with tracker, checkpoints, batches:
        for step in range(first_step, run.steps):
            seed_everything(run.seed, step, runtime.rank)
            taught = batches[step]
            loss_sum, counts = accumulate_gradients(model, taught, config, optimizer)
            sums = dict(zip(counts, runtime.total(*counts.values()), strict=True))
            tokens = max(sums["tokens"], 1.0)
            metrics = optimizer.step(step, divisor=tokens)
            (loss,) = runtime.total(float(loss_sum))
            metrics |= {**sums, "loss": loss / tokens}
            if selector is not None and selector.learns:
                selector.project()
                metrics |= {"view_w_text": selector.w_text.item(), "view_w_image": selector.w_image.item()}
            tracker.advance(loss=metrics["loss"], lr=metrics["lr"])
            if (step + 1) % run.log_every == 0 or step + 1 == run.steps:
                tracker.log(step, metrics)
            if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                last = checkpoints.save(step + 1, model, optimizer, extra)
        if last is None:
            last = checkpoints.save(0, model, optimizer, extra)
    close_runtime(runtime)
    return last
