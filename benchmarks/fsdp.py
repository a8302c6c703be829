"""Full fine-tuning with parameters cut over GPUs (FSDP2): seconds and peak memory of whole steps; save and resume.

Every step is that of the training loop, as in `bench sft`, with gradient checkpointing and all weights of the language
model and its vision tower learning. Weights are random, of the shape of Qwen2.5-VL-7B on GPUs. What must be kept is 16
bytes a parameter (weight, gradient, two moments, float32) over all processes together; the table says it beside the
peak. Start it by torchrun, one process a GPU:

    torchrun --standalone --nproc-per-node=2 main.py bench fsdp --device cuda --folder runs/full
    torchrun --standalone --nproc-per-node=2 main.py bench fsdp --device cuda --folder runs/four --layers 4 --resume
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..datasets.scene import Sample
from ..engine.build import speed_up
from ..engine.checkpoint import restore_run
from ..engine.config import SftConfig
from ..engine.data import fingerprint
from ..engine.runtime import Runtime, close_runtime, init_runtime, seed_everything
from ..engine.saving import Checkpoints
from ..engine.sft import load_model
from ..models.tiny import SHAPES
from ._arguments import measuring_parser, positive
from ._measure import Load, report, seconds
from .results import Row
from .sft import Steps, configure, make_samples, measured_peak, prepare

_GIB = 2**30


def full(config: SftConfig, budget: int) -> SftConfig:
    """The configuration with all weights learning and cut over the processes."""
    language = replace(config.model.language, train="full", sharding="full", gradient_checkpointing=True)
    return replace(
        config,
        model=replace(config.model, language=language),
        token_budget=budget,
        optim=replace(config.optim, lr=1e-5),
    )


def start(config: SftConfig, samples: list[Sample], runtime: Runtime, blocks: str, checkpoint: Path | None) -> Steps:
    """Steps of a model that is loaded now."""
    seed_everything(0)
    model = load_model(config, checkpoint, runtime)
    speed_up(model, blocks)
    steps = Steps(model, samples, config, runtime)
    data = fingerprint([sample.sample_id for sample in samples])
    steps.done = restore_run(checkpoint, steps.optimizer, data)["step"]
    return steps


def tell(runtime: Runtime, what: str, elapsed: float, peak: Sequence[float]) -> tuple[float, float]:
    """Print a line with every rank's seconds and peak in GiB; returns the largest of each."""
    everyone = runtime.gather((elapsed, peak[0] if peak else float("nan")))
    if runtime.is_main:
        for rank, (took, gib) in enumerate(everyone):
            what = f"{what}; rank {rank}: {took:.2f} s" + (f", peak {gib:.1f} GiB" if gib == gib else "")
        print(what, flush=True)
    return max(took for took, _ in everyone), max(gib for _, gib in everyone)


def measure(steps: Steps, runtime: Runtime, count: int) -> list[Row]:
    """Rows of some steps; the first one, which warms up, counts for the peak alone."""
    device, times, peaks = steps.model.device, [], []
    with measured_peak(device):
        for number in range(count):
            elapsed = seconds(steps, str(device))
            peak = [torch.cuda.max_memory_allocated(device) / _GIB] if device.type == "cuda" else []
            took, gib = tell(runtime, f"step {number + 1}, loss {steps.loss:.4f}", elapsed, peak)
            times.append(took)
            peaks.append(gib)
    parameters = sum(parameter.numel() for parameter in steps.optimizer.parameters)
    floor = 16 * parameters / runtime.world_size / _GIB
    note = f"{runtime.world_size} processes; 16 bytes of {parameters / 1e9:.2f} G parameters: {floor:.1f} GiB a rank"
    rows = [Row("fsdp.step_s", statistics.median(times[1:] or times), "s", note=note)]
    return rows + ([Row("fsdp.peak_gib", max(peaks), "GiB", note=note)] if device.type == "cuda" else [])


def resume(steps: Steps, samples: list[Sample], runtime: Runtime, blocks: str) -> list[Row]:
    """Save, make one more step, load what was saved and make it again: how far the two losses lie apart.

    The loss before the step shows the weights; the one after it, of the same samples, optimizer and weights.
    """
    config = steps.config
    data = fingerprint([sample.sample_id for sample in samples])
    with measured_peak(steps.model.device) as peak, Checkpoints(runtime, config, samples={}) as checkpoints:
        begun = time.perf_counter()
        path = checkpoints.save(steps.done, steps.model, steps.optimizer, {"data": data})
        elapsed = time.perf_counter() - begun
    took, _ = tell(runtime, f"copied for {path.name}", elapsed, peak)
    losses: list[float] = []
    for _ in range(2):
        steps()
        losses.append(steps.loss)
    steps.close()
    del steps
    gc.collect()
    again = start(config, samples, runtime, blocks, path)
    apart = 0.0
    for loss in losses:
        again()
        apart = max(apart, abs(again.loss - loss))
    again.close()
    if runtime.is_main:
        print(f"resumed: two losses {losses[0]:.6f}, {losses[1]:.6f}; at most {apart:.1e} apart", flush=True)
    return [Row("fsdp.copy_s", took, "s"), Row("fsdp.resumed_loss_apart", apart, "nats")]


def main(argv: Sequence[str] = ()) -> int:
    """Print the table; the exit status says whether a resumed run, where one was made, went on as the other."""
    parser = measuring_parser("fsdp", __doc__, repeats=3)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), help="of the language model (default: 7b on a GPU, else tiny)"
    )
    parser.add_argument("--layers", type=positive, default=0, metavar="N", help="blocks, if not the shape's own")
    parser.add_argument(
        "--samples", type=positive, default=4, metavar="N", help="of a step and process (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=positive, default=4096, metavar="N", help="tokens of a pack (default: %(default)s)"
    )
    parser.add_argument("--blocks", choices=("plain", "compiled"), default="plain", help="as in recipes")
    parser.add_argument("--resume", action="store_true", help="save, resume, and compare the losses of two steps")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep model and rooms there; torchrun needs it")
    arguments = parser.parse_args(list(argv))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.folder is None:
        parser.error("processes share model and rooms: name a --folder for them")
    arguments.shape = arguments.shape or ("tiny" if arguments.device == "cpu" else "7b")
    arguments.rank = 1  # of LoRA, which is not used
    load = Load(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        runtime = init_runtime(arguments.device)
        rows = run(arguments, folder, runtime)
        if runtime.is_main:
            name = f"Qwen2.5-VL {arguments.shape} shape{f', {arguments.layers} blocks' if arguments.layers else ''}"
            note = f"{name}, random weights, {arguments.samples} samples a process, budget {arguments.budget:,}"
            rows = [replace(row, note="; ".join(filter(None, [note, row.note]))) for row in rows]
            report("fsdp", rows, arguments, load, argv=argv, packages=("transformers",))
        close_runtime(runtime)
    apart = [row.value for row in rows if row.name == "fsdp.resumed_loss_apart"]
    return 1 if apart and not apart[0] < 1e-3 else 0


def run(arguments: argparse.Namespace, folder: Path, runtime: Runtime) -> list[Row]:
    """All that is measured."""
    if runtime.is_main:
        prepare(folder, arguments, arguments.layers)
    runtime.barrier()
    config, samples = full(configure(arguments, folder), arguments.budget), make_samples(folder)
    loaded: list[Steps] = []
    with measured_peak(runtime.device) as peak:
        elapsed = seconds(
            lambda: loaded.append(start(config, samples, runtime, arguments.blocks, None)), str(runtime.device)
        )
    _, gib = tell(runtime, "loaded", elapsed, peak)
    rows = [Row("fsdp.load_peak_gib", gib, "GiB")] if runtime.device.type == "cuda" else []
    rows += measure(loaded[0], runtime, arguments.repeats)
    if arguments.resume:
        rows += resume(loaded.pop(), samples, runtime, arguments.blocks)
    for steps in loaded:
        steps.close()
    return rows
