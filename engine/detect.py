"""Pre-training of the scene encoder: boxes and classes from prepared scenes.

Writes checkpoints for an exact resume, `best/` (the encoder with the highest mAP@0.5 on the held-out scenes, or the
last one where there are none) and `detection.json` (mAP and AR of that encoder, by class).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..models.scene_encoder import SceneEncoder, SetCriterion, build_scene_encoder
from ..utils.metrics.detection import SceneDetections, SceneObjects, evaluate_detections, nonempty_boxes, split_logits
from .checkpoint import restore_run
from .config import DetectConfig
from .data import fingerprint
from .detection_data import SceneSamples
from .optim import Optimizer, update_average
from .run_folder import open_run, run_folder
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything, stream
from .saving import Checkpoints
from .tracking import Tracker, track

SCORES = "detection.json"
METRICS = ("ar25", "ar50", "map25", "map50")  # that the best encoder may be chosen by
_EVAL_STREAM = 22  # name of a random stream


def train(config: DetectConfig, resume: bool = False) -> Path:
    """Pre-train the scene encoder and return its folder `<run>/best`. With `resume` it goes on from the newest.

    Raises:
        ValueError: no prepared scenes, a run folder in use, or settings that do not fit together.
    """
    run = config.run
    if run.micro_batch_size not in (0, run.batch_size):
        raise ValueError("detect takes a batch at once; leave run.micro_batch_size at 0 and lower run.batch_size.")
    if run.best_metric not in ("", *METRICS):  # or that is found out after hours
        raise ValueError(f"run.best_metric is {run.best_metric!r}; choose {', '.join(METRICS)}.")
    with run_folder(run.dir):
        last = open_run(config, resume)
        runtime = init_runtime(run.device)
        best = pre_train(config, last, runtime)
        close_runtime(runtime)
    return best


def pre_train(config: DetectConfig, last: Path | None, runtime: Runtime) -> Path:
    """All steps from a checkpoint on, or from the start; returns the folder of the best encoder."""
    run = config.run
    scenes = SceneSamples(config, config.data.train_split)
    held_out = SceneSamples(config, config.data.eval_split) if config.data.eval_split else None
    if last is None and runtime.is_main:  # of a run that was killed before its first checkpoint
        (Path(run.dir) / SCORES).unlink(missing_ok=True)
    seed_everything(run.seed)
    encoder = SceneEncoder.from_pretrained(last / "model") if last else build_scene_encoder(config.encoder)
    encoder.to(runtime.device).train()
    if config.precision == "bfloat16":
        encoder.compute_in(torch.bfloat16)
    average = copy.deepcopy(encoder).eval().requires_grad_(False) if config.ema_decay else encoder
    criterion = SetCriterion(encoder.num_classes, repeats=config.queries_per_object).to(runtime.device)
    optimizer = Optimizer(
        dict(encoder.named_parameters()), config.optim, run.steps, runtime, skipped_dir=Path(run.dir) / "skipped"
    )
    state = restore_run(last, optimizer, fingerprint(scenes.scene_ids))
    if last and config.ema_decay:
        average.load_state_dict(state["average"])
    checkpoints = Checkpoints(runtime, config, samples={"scenes": len(scenes)}, fresh=last is None, metric="map50")
    best = Best(checkpoints, seconds=state.get("seconds", 0.0))
    num_trained = sum(parameter.numel() for parameter in encoder.parameters())
    log.info("%d scenes, %.2f M parameters, %s", len(scenes), num_trained / 1e6, runtime.device)
    tracker = track(run, "detect", runtime, first_step=state["step"])
    precision = "high" if config.precision == "bfloat16" else "highest"
    with tracker, checkpoints, scenes.loader, matmul_precision(precision):
        for step in range(state["step"], run.steps):
            seed_everything(run.seed, step, runtime.rank)
            losses = train_step(encoder, criterion, scenes, step, runtime)
            scene_ids = scenes.training_scenes(step, runtime)
            optimizer.note(scene_ids, ["detection"] * len(scene_ids), losses["loss"])
            metrics = optimizer.step(step, divisor=runtime.world_size)
            if config.ema_decay:
                update_average(average, encoder, config.ema_decay, step)
            metrics |= mean_over_ranks(losses, runtime)
            tracker.advance(loss=metrics["loss"], lr=metrics["lr"])
            done = step + 1 == run.steps
            if (step + 1) % run.log_every == 0 or done:
                tracker.log(step, metrics)
            if done or (run.eval_every and (step + 1) % run.eval_every == 0):
                best.evaluate(average, held_out, runtime, tracker, step)
            if (step + 1) % run.save_every == 0 or done:
                extra = {"data": fingerprint(scenes.scene_ids), "seconds": best.seconds + tracker.seconds}
                extra |= {"average": average.state_dict()} if config.ema_decay else {}
                checkpoints.save(step + 1, encoder, optimizer, extra)
        checkpoints.wait()
        # no steps at all: the untrained encoder. The first rank has waited for its own writing; the others cannot tell
        if runtime.gather(not checkpoints.best_folder.exists())[0]:
            best.evaluate(average, held_out, runtime, tracker, state["step"] - 1)
    return checkpoints.best_folder


def train_step(
    encoder: SceneEncoder, criterion: SetCriterion, scenes: SceneSamples, step: int, runtime: Runtime
) -> dict[str, torch.Tensor]:
    """Gradients of one step; returns the losses of this rank's part of the batch."""
    points_BN3, features_BNF, targets = scenes.training_batch(step, runtime)
    encoding = encoder(points_BN3.to(runtime.device), features_BNF.to(runtime.device))
    loss, parts = criterion(encoding, targets.to(runtime.device))
    loss.backward()
    return {"loss": loss.detach(), **parts}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """`high` puts what stays in float32 through the matrix units of a GPU (TF32); the setting before comes back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def mean_over_ranks(losses: dict[str, torch.Tensor], runtime: Runtime) -> dict[str, float]:
    """Losses of the global batch, on the host in one transfer."""
    totals = runtime.total(*torch.stack(list(losses.values())).tolist())
    return {name: total / runtime.world_size for name, total in zip(losses, totals, strict=True)}


@torch.no_grad()
def evaluate_encoder(encoder: SceneEncoder, scenes: SceneSamples, runtime: Runtime) -> dict:
    """mAP and AR of an encoder on prepared scenes, as utils.metrics.detection reports them (3DETR's settings).

    Ranks share the scenes, and all of them return the result. The points of a scene are sampled from a stream of their
    own, so that it repeats. Empty boxes are found on the encoder's device: finding them on the host took longer than
    all else of an evaluation.
    """
    was_training = encoder.training
    encoder.eval()
    found: list[tuple[int, SceneDetections, SceneObjects]] = []
    own_rows = range(runtime.rank, len(scenes), runtime.world_size)
    size = scenes.config.run.batch_size
    for start in range(0, len(own_rows), size):
        rows = own_rows[start : start + size]
        streams = [stream(_EVAL_STREAM, row) for row in rows]
        points_BN3, features_BNF, targets = scenes.batch(rows, streams, augment=False)
        points_BN3 = points_BN3.to(runtime.device)
        encoding = encoder(points_BN3, features_BNF.to(runtime.device))
        nonempty = [nonempty_boxes(*pair) for pair in zip(points_BN3, encoding.boxes_BQ7, strict=True)]
        nonempty_BQ = torch.stack(nonempty).cpu().numpy()
        boxes_BQ7, logits_BQC1 = encoding.boxes_BQ7.cpu().numpy(), encoding.class_logits_BQC1.float().cpu().numpy()
        for index, (row, kept_Q) in enumerate(zip(rows, nonempty_BQ, strict=True)):
            probability_KC, objectness_K = split_logits(logits_BQC1[index, kept_Q])
            detections = SceneDetections(boxes_BQ7[index, kept_Q], probability_KC, objectness_K)
            boxes_G7, classes_G = targets.of_scene(index)
            found.append((row, detections, SceneObjects(boxes_G7.numpy(), classes_G.numpy())))
    encoder.train(was_training)
    everything = sorted((entry for part in runtime.gather(found) for entry in part), key=lambda entry: entry[0])
    detections, objects = [entry[1] for entry in everything], [entry[2] for entry in everything]
    return evaluate_detections(detections, objects, min_points=0)  # the empty ones are gone


class Best:
    """Scores encoders of a run and keeps the best: `<run>/best`, and beside it `detection.json` with its scores.

    Args:
        seconds: of training before this process, evaluations included.
    """

    def __init__(self, checkpoints: Checkpoints, *, seconds: float):
        self.checkpoints = checkpoints
        self.seconds = seconds

    def evaluate(
        self,
        encoder: SceneEncoder,
        held_out: SceneSamples | None,
        runtime: Runtime,
        tracker: Tracker,
        step: int,
    ) -> None:
        """Score an encoder on the held-out scenes, log, and keep it where it is better; without scenes, keep it."""
        if held_out is None:
            self.checkpoints.offer_best(step + 1, None, encoder)
            return
        scores = evaluate_encoder(encoder, held_out, runtime)
        summary = {
            f"{name.lower()}{round(100 * float(threshold))}": scores[threshold][name]
            for threshold in ("0.25", "0.5")
            for name in ("mAP", "AR")
        }
        tracker.log(step, summary)
        log.info("step %d: %s", step + 1, ", ".join(f"{name} {value:.3f}" for name, value in summary.items()))
        seconds = round(self.seconds + tracker.seconds, 1)
        scores = {"step": step + 1, "seconds": seconds, "scenes": len(held_out), **scores}
        self.checkpoints.offer_best(step + 1, summary, encoder, beside={SCORES: scores})
