"""Supervised fine-tuning: the cold start on chain-of-thought data (paper 1.5) and the task mix.

What is learned is the target after the prompt, `<think>…</think><answer>…</answer>`, or `<answer>…</answer>` alone
where the data has no thought. The loss is the mean over all taught tokens of the global batch.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..datasets.scene import Sample
from ..models.model_files import part_of
from ..models.observation import Observation
from ..models.packs import filled_length, plan_packs
from ..models.scene_vlm import SceneVLM
from .build import build_model, check_settings, give_multiview, speed_up
from .checkpoint import model_folder, restore_run
from .config import SftConfig
from .data import ObservationCache, fingerprint, load_split
from .held_out import one_line
from .mixture import Mixture
from .optim import Optimizer
from .run_folder import open_run, run_folder
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything
from .saving import Checkpoints
from .sft_data import Batches, NameStreams, ShownPart, Taught, num_tokens
from .sft_eval import METRIC, SftHeldOut
from .sft_log import SftLog, TaskSums
from .sft_loss import sft_loss
from .sharding import low_precision_names, shard_model, shards


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
    model.set_trainable(
        language=config.model.language.train,
        connector=config.model.train_connector,
        scene_encoder=config.model.train_scene_encoder,
        view_weights=config.model.views.weights == "learned",
        vision_tower=config.model.train_vision_tower,
    )
    if shards(config.model.language, runtime):
        shard_model(model, runtime)
    return model.to(runtime.device).train()


def rate_factors(names: Iterable[str], config: SftConfig) -> dict[str, float]:
    """The factor on the learning rate of each trained parameter: its part's, or that of learned view weights."""
    factors = {**config.optim.lr_factors, "view_selector": config.model.views.lr_factor}
    return {name: factors.get(part_of(name), 1.0) for name in names}


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
    model: SceneVLM,
    taught: Sequence[Taught],
    config: SftConfig,
    optimizer: Optimizer,
    by_task: TaskSums | None = None,
) -> tuple[torch.Tensor, dict[str, int]]:
    """Back-propagate this rank's part of a batch, pack by pack. A GPU is told what to do and not waited for.

    The pull of learned view weights is added for each token, since gradients are divided by the number of tokens; it
    is not part of the loss that is returned.

    Args:
        by_task: takes the losses of the tokens.

    Returns:
        the summed loss, and the numbers of taught tokens and of all tokens that go through the language model.
    """
    views, selector = config.model.views, model.view_selector
    lengths = [len(entry.row.token_ids) for entry in taught]
    encodings = cut_encodings([entry.observation for entry in taught]) if model.train_scene_encoder else []
    loss_sum = torch.zeros((), device=model.device)
    tokens = 0
    packs = plan_packs(lengths, config.token_budget, config.run.micro_batch_size)
    own = len(packs)
    if model.language.sharded_from is not None:  # each pass gathers parameters from all ranks: all make as many
        packs += [[lengths.index(min(lengths))]] * (optimizer.runtime.most(own) - own)
    for number, pack in enumerate(packs):
        rows = [taught[row] for row in pack]
        length = filled_length(num_tokens(rows), model.device)
        loss, losses_T = model(partial(sft_loss, model, rows, length=length, temperature=views.temperature))
        if number >= own:
            (0 * loss).backward()
            continue
        count = len(losses_T)
        pull = views.pull * count * selector.regularizer() if selector is not None and selector.learns else 0.0
        (loss + pull).backward()
        if by_task is not None:
            by_task.add(rows, losses_T)
        its = [entry.sample for entry in rows]
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
    if run.best_metric and not run.eval_every:
        raise ValueError("run.best_metric is set, but nothing is evaluated; set run.eval_every too.")
    with run_folder(run.dir):
        last = open_run(config, resume)
        runtime = init_runtime(run.device)
        last = fine_tune(config, last, runtime)
        gc.collect()  # a model that is cut over the ranks must be gone before their group is
        close_runtime(runtime)
    return last


def fine_tune(config: SftConfig, last: Path | None, runtime: Runtime) -> Path:
    """All steps from a checkpoint on, or from the start; returns the last checkpoint."""
    run = config.run
    samples, store = load_split(config.data, config.data.train_split, run.seed)
    seed_everything(run.seed)
    model = load_model(config, last, runtime)
    give_multiview(model, config.data, samples)
    speed_up(model, config.blocks)
    selector, trained = model.view_selector, model.trainable_parameters()
    optimizer = Optimizer(
        trained,
        config.optim,
        run.steps,
        runtime,
        lr_factors=rate_factors(trained, config),
        skipped_dir=Path(run.dir) / "skipped",
        low_precision=low_precision_names(model),
    )
    extra: dict[str, Any] = {"data": fingerprint([sample.sample_id for sample in samples])}
    state = restore_run(last, optimizer, extra["data"])
    num_trained = sum(parameter.numel() for parameter in trained.values())
    log.info("%d samples of %s, %.2f M trained parameters", len(samples), config.data.datasets, num_trained / 1e6)
    held_out = SftHeldOut(config, model, runtime) if run.eval_every else None
    mixture = Mixture([sample.dataset for sample in samples], config.data.weights, run.seed)
    observations = ObservationCache.of_config(config.data, store, model, run.seed)

    def choose(step: int) -> list[Sample]:
        return [samples[row] for row in mixture.rows(step, run.batch_size, runtime)]

    batches = Batches(
        model,
        choose,
        observations,
        pointers=config.pointers,
        num_steps=run.steps,
        naming=NameStreams(run.seed, run.batch_size, runtime),
        shown=lambda step: ShownPart.at(step, config.fewest_proposals, config.all_proposals_from),
        workers=config.data.workers,
    )
    checkpoints = Checkpoints(
        runtime,
        config,
        samples=Counter(sample.dataset for sample in samples),
        fresh=last is None,
        metric=METRIC,
        mode="min",
    )
    tasks = sorted({sample.task for sample in samples})
    log_of_run = SftLog(run, model, tasks, runtime, first_step=state["step"], since=state.get("since_log"))
    with log_of_run, checkpoints, batches:
        for step in range(state["step"], run.steps):
            seed_everything(run.seed, step, runtime.rank)
            taught, by_task = batches[step], log_of_run.new_sums()
            loss_sum, counts = accumulate_gradients(model, taught, config, optimizer, by_task)
            sums = dict(zip(counts, runtime.total(*counts.values()), strict=True))
            tokens = max(sums["tokens"], 1.0)
            metrics = optimizer.step(step, divisor=tokens)
            (loss,) = runtime.total(float(loss_sum))
            metrics |= {**sums, "loss": loss / tokens}
            if selector is not None and selector.learns:
                selector.project()
                metrics |= {"view_w_text": selector.w_text.item(), "view_w_image": selector.w_image.item()}
            log_of_run.step(step, metrics, by_task)
            if held_out is not None and run.due(step, run.eval_every):
                batches.settle()
                with log_of_run.aside():
                    scores = held_out.evaluate()
                log_of_run.tracker.log(step, scores)
                log.info("after %d steps: %s", step + 1, one_line(scores))
                checkpoints.offer_best(step + 1, scores, model)
            if run.due(step, run.save_every):
                extra["since_log"] = log_of_run.means.state()
                last = checkpoints.save(step + 1, model, optimizer, extra)
        if last is None:
            last = checkpoints.save(0, model, optimizer, extra)
    return last
