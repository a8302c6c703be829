"""Pre-training of the scene encoder: boxes and classes from prepared scenes.

Writes checkpoints for an exact resume, `model/` (the encoder that is best on the held-out scenes, or the last one
where there are none) and `detection.json` (mAP and AR of that encoder).
"""

import json
import os
import shutil
from pathlib import Path

import torch

from ..models.scene_encoder import SceneEncoder, SetCriterion, build_scene_encoder
from ..utils.metrics.detection import SceneDetections, SceneObjects, evaluate_detections, split_logits
from .checkpoint import checkpoint_path, load_state, open_run, save_checkpoint, set_rng_state
from .config import DetectConfig
from .detection_data import SceneSamples
from .optim import Optimizer
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything, stream
from .tracking import Tracker

_EVAL_STREAM = 22  # name of a random stream


@torch.no_grad()
def evaluate_encoder(encoder: SceneEncoder, scenes: SceneSamples, device: torch.device) -> dict:
    """mAP and AR of an encoder on prepared scenes, as utils.metrics.detection reports them (3DETR's settings).

    The points of a scene are sampled from a stream of their own, so that the result repeats.
    """
    was_training = encoder.training
    encoder.eval()
    predictions, truth = [], []
    size = scenes.config.run.batch_size
    for start in range(0, len(scenes), size):
        rows = range(start, min(start + size, len(scenes)))
        streams = [stream(_EVAL_STREAM, row) for row in rows]
        points_BN3, features_BNF, targets = scenes.batch(rows, streams, augment=False)
        encoding = encoder(points_BN3.to(device), features_BNF.to(device))
        for index, (boxes_Q7, logits_QC1) in enumerate(
            zip(encoding.boxes_BQ7.cpu(), encoding.class_logits_BQC1.float().cpu(), strict=True)
        ):
            probability_QC, objectness_Q = split_logits(logits_QC1.numpy())
            predictions.append(SceneDetections(boxes_Q7, probability_QC, objectness_Q, points_BN3[index].numpy()))
            boxes_K7, classes_K = targets.of_scene(index)
            truth.append(SceneObjects(boxes_K7, classes_K.numpy()))
    encoder.train(was_training)
    return evaluate_detections(predictions, truth)


def train_step(
    encoder: SceneEncoder, criterion: SetCriterion, scenes: SceneSamples, step: int, runtime: Runtime
) -> dict[str, float]:
    """Gradients of one step; returns the losses of the global batch."""
    points_BN3, features_BNF, targets = scenes.training_batch(step, runtime)
    encoding = encoder(points_BN3.to(runtime.device), features_BNF.to(runtime.device))
    loss, parts = criterion(encoding, targets.to(runtime.device))
    loss.backward()
    parts = {"loss": loss.detach(), **parts}
    totals = runtime.total(*(float(value) for value in parts.values()))
    return {name: total / runtime.world_size for name, total in zip(parts, totals, strict=True)}


def train(config: DetectConfig, resume: bool = False) -> Path:
    """Pre-train the scene encoder and return its folder `<run>/model`. With `resume` it goes on from the newest.

    Raises:
        ValueError: no prepared scenes, a run folder in use, or settings that do not fit together.
    """
    run = config.run
    if run.micro_batch_size not in (0, run.batch_size):
        raise ValueError("detect takes a batch at once; leave run.micro_batch_size at 0 and lower run.batch_size.")
    checkpoint = open_run(config, resume)
    runtime = init_runtime(run.device)
    scenes = SceneSamples(config, config.data.train_split)
    held_out = SceneSamples(config, config.data.eval_split) if config.data.eval_split else None
    seed_everything(run.seed)
    encoder = SceneEncoder.from_pretrained(checkpoint / "model") if checkpoint else build_scene_encoder(config.encoder)
    encoder.to(runtime.device).train()
    criterion = SetCriterion(encoder.num_classes).to(runtime.device)
    optimizer = Optimizer(dict(encoder.named_parameters()), config.optim, run.steps, runtime)
    first_step, best = 0, -1.0
    if checkpoint:
        state = load_state(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        first_step, best = state["step"], state["best"]
        log.info("resumed from %s", checkpoint)
    log.info(
        "%d scenes, %.2f M parameters, %s",
        len(scenes),
        sum(parameter.numel() for parameter in encoder.parameters()) / 1e6,
        runtime.device,
    )
    tracker = Tracker(run.dir, "detect", run.steps, first_step=first_step, sinks=run.trackers, enabled=runtime.is_main)
    with tracker, scenes.loader:
        for step in range(first_step, run.steps):
            seed_everything(run.seed, step, runtime.rank)
            losses = train_step(encoder, criterion, scenes, step, runtime)
            metrics = losses | optimizer.step(step, divisor=runtime.world_size)
            tracker.advance(loss=metrics["loss"], lr=metrics["lr"])
            last = step + 1 == run.steps
            if (step + 1) % run.log_every == 0 or last:
                tracker.log(step, metrics)
            if runtime.is_main and (last or (run.eval_every and (step + 1) % run.eval_every == 0)):
                best = _evaluate_and_keep(encoder, held_out, runtime, tracker, step, best)
            if (step + 1) % run.save_every == 0 or last:
                _save(config, step + 1, encoder, optimizer, best, runtime)
        if runtime.is_main and not (Path(run.dir) / "model").exists():  # no steps at all: the untrained encoder
            _evaluate_and_keep(encoder, held_out, runtime, tracker, first_step - 1, best)
    close_runtime(runtime)
    return Path(run.dir) / "model"


def _save(
    config: DetectConfig, step: int, encoder: SceneEncoder, optimizer: Optimizer, best: float, runtime: Runtime
) -> None:
    """Checkpoint after `step` finished steps; rank 0 writes, the others wait."""
    if runtime.is_main and not checkpoint_path(config.run.dir, step).exists():
        state = {"optimizer": optimizer.state_dict(), "best": best}
        save_checkpoint(config.run.dir, step, config, encoder.save_pretrained, state, keep=config.run.keep_checkpoints)
    runtime.barrier()


def _evaluate_and_keep(
    encoder: SceneEncoder,
    held_out: SceneSamples | None,
    runtime: Runtime,
    tracker: Tracker,
    step: int,
    best: float,
) -> float:
    """Evaluate, log, and keep the encoder as `<run>/model` where it is the best so far; returns the best mAP@0.25."""
    run_dir = tracker.path.parent
    if held_out is None:
        _keep(encoder, run_dir / "model", None)
        return best
    scores = evaluate_encoder(encoder, held_out, runtime.device)
    summary = {
        f"{name.lower()}{round(100 * float(threshold))}": scores[threshold][name]
        for threshold in ("0.25", "0.5")
        for name in ("mAP", "AR")
    }
    tracker.log(step, summary)
    log.info("step %d: %s", step + 1, ", ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    if scores["0.25"]["mAP"] <= best:
        return best
    _keep(encoder, run_dir / "model", {"step": step + 1, "scenes": len(held_out), **scores})
    return scores["0.25"]["mAP"]


def _keep(encoder: SceneEncoder, folder: Path, scores: dict | None) -> None:
    """Write the encoder and, beside it, its scores; nothing half-written stays under these names."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    encoder.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if scores is not None:
        partial = folder.with_name("detection.json.partial")
        partial.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder.with_name("detection.json"))
