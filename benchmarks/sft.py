"""Supervised fine-tuning with LoRA: tokens a second of whole steps, memory by token budget.

A step is what the training loop does: prepared rooms are read and encoded, views chosen from the cache on disk and put
through the vision tower, samples packed (6 views, 192 layout tokens and up to 64 named objects, a thought of 60 to 240
words), back-propagated, and AdamW's update. Scenes are dropped before they come again, so that nothing but the view
cache is warm. Weights are random, of the shape of Qwen2.5-VL-7B on a GPU. Tokens are those of the samples, never
padding. Peers get such rows and the very adapters, padded two or four at a time, in memory already: no loading is in
their time. Under torchrun the first process is measured alone, then all together; that is the scaling.
"""

import argparse
import gc
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..engine.build import speed_up
from ..engine.config import SftConfig, load_config
from ..engine.data import ObservationCache
from ..engine.optim import Optimizer
from ..engine.runtime import Runtime, close_runtime, init_runtime, seed_everything
from ..engine.sft import accumulate_gradients, load_model
from ..engine.sft_data import Batches, Taught
from ..engine.sharding import low_precision_names
from ..engine.throughput import mfu, peak_flops, training_flops
from ..models.dual_encoder import DualEncoder
from ..models.scene_vlm import SceneVLM
from ..models.tiny import SHAPES, build_tiny
from ._arguments import measuring_parser, positive
from ._measure import Load, report, seconds
from ._rooms import write_rooms
from ._sft_peers import PEERS, PeerStep
from .results import Row

TARGET = 15_000.0
BUDGETS = (8192, 16384, 32768)
ROOMS, POINTS, SAMPLES_A_ROOM = 24, 50_000, 8
WORDS = ["the", "chair", "beside", "a", "wide", "table", "under", "one", "window", "near", "our", "door", "and", "oak"]


def make_samples(root: Path) -> list[Sample]:
    """Questions with thoughts of 60 to 240 words about every room."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    names = (root / "scannetv2_train.txt").read_text(encoding="utf-8").split()
    return [
        Sample(f"{name}-{number}", "qa", "bench", name, words(20), words(12), think=words(int(rng.integers(60, 240))))
        for number in range(SAMPLES_A_ROOM)
        for name in names
    ]


def configure(arguments: argparse.Namespace, folder: Path) -> SftConfig:
    """The settings of a run: those of the 7B recipe, with random weights; narrower without a GPU."""
    small = arguments.shape == "tiny"
    return load_config(
        "sft",
        None,
        [
            f"run.dir={folder / 'run'}",
            f"run.batch_size={arguments.samples}",
            f"data.root={folder}",
            "data.cached_scenes=1",
            f"data.num_points={2048 if small else 40_000}",
            f"model.encoder.num_tokens={256 if small else 2048}",
            f"model.views.encoder={folder / 'dual'}",
            "model.views.source=rendered",
            "model.views.num_views=6",
            f"model.views.image_size={56 if small else 336}",
            f"model.language.model={folder / 'language'}",
            f"model.language.dtype={'float32' if small else 'bfloat16'}",
            f"model.language.lora_rank={arguments.rank}",
            "model.language.num_layout_tokens=" + ("8" if small else "192"),
            "optim.lr=1e-4",
        ],
    )


class Steps:
    """Training steps over samples that are new each time, until `close`."""

    def __init__(self, model: SceneVLM, samples: Sequence[Sample], config: SftConfig, runtime: Runtime):
        self.model, self.samples, self.config = model, samples, config
        self.observations = ObservationCache(
            SceneStore(Path(config.data.root) / "prepared", capacity=1), model, seed=0, capacity=1, cache_views=True
        )
        self.runtime = runtime
        low_precision = low_precision_names(model)
        self.optimizer = Optimizer(
            model.trainable_parameters(), config.optim, 1000, runtime, low_precision=low_precision
        )
        self._begin()
        self.done = 0
        self.tokens = 0
        self.loss = 0.0

    def _choose(self, step: int) -> list[Sample]:
        size, ranks = self.config.run.batch_size, self.runtime.world_size
        first = (step * ranks + self.runtime.rank) * size
        return [self.samples[row % len(self.samples)] for row in range(first, first + size)]

    def _begin(self) -> None:
        self.batches = Batches(self.model, self._choose, self.observations, pointers="name", num_steps=1_000_000)
        self.batches.__enter__()

    def close(self) -> None:
        """Stop the thread that makes the next batch."""
        self.batches.__exit__()

    def start_again(self) -> None:
        """Forget what a step that did not fit has left, and the batch that was being made beside it."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.optimizer.noted.clear()
        self.close()
        self._begin()

    def next_batch(self) -> list[Taught]:
        """The rows of the next step."""
        self.done += 1
        return self.batches[self.done - 1]

    def __call__(self) -> None:
        taught = self.next_batch()
        loss_sum, counts = accumulate_gradients(self.model, taught, self.config, self.optimizer)
        loss, tokens = self.optimizer.runtime.total(float(loss_sum), counts["tokens"])
        self.optimizer.step(self.done, divisor=tokens)
        self.loss = loss / tokens
        self.tokens = counts["sequence_tokens"]


@contextmanager
def measured_peak(device: torch.device) -> Iterator[list[float]]:
    """Peak of the GPU's memory while the block runs, in GiB; nothing on a CPU."""
    found: list[float] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device) / 2**30)


def rate(step: Any, repeats: int, device: torch.device, warm: int = 2) -> tuple[float, float]:
    """Median tokens a second of some steps after those that warm up, and the peak memory of all in GiB (nan: CPU)."""
    with measured_peak(device) as peak:
        for _ in range(warm):
            step()
        rates = []
        for _ in range(repeats):
            elapsed = seconds(step, str(device))
            rates.append(step.tokens / elapsed)
    return statistics.median(rates), peak[0] if peak else float("nan")


def measure_ours(steps: Steps, arguments: argparse.Namespace) -> tuple[dict[int, float], list[Row]]:
    """Tokens a second by token budget, and rows of peak memory. A budget that does not fit is said, not recorded."""
    device = steps.model.device
    rates, rows = {}, []
    for budget in arguments.budgets:
        steps.config = replace(steps.config, token_budget=budget)
        for checkpointing in (False, True):
            set_checkpointing(steps.model, checkpointing)
            suffix = "_checkpointing" if checkpointing else ""
            try:
                found, peak = rate(steps, arguments.repeats, device)
            except torch.OutOfMemoryError:
                print(f"budget {budget:,}{suffix}: does not fit", flush=True)
                steps.start_again()
                continue
            print(f"budget {budget:,}{suffix}: {found:,.0f} tokens/s, peak {peak:.1f} GiB", flush=True)
            rates[budget] = max(found, rates.get(budget, 0.0))
            rows.append(Row(f"sft.tokens_per_s_{budget}{suffix}", found, "tokens/s", better="higher"))
            if device.type == "cuda":
                rows.append(Row(f"sft.peak_gib_{budget}{suffix}", peak, "GiB"))
            break
    set_checkpointing(steps.model, False)
    return rates, rows


def set_checkpointing(model: SceneVLM, on: bool) -> None:
    """Gradient checkpointing of the language model's blocks."""
    if on:
        model.language.base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.language.base.gradient_checkpointing_disable()


def measure_peers(steps: Steps, ours: float, arguments: argparse.Namespace) -> list[Row]:
    """Each peer on the rows of the next steps."""
    rows = []
    model = steps.model
    for name in arguments.peers:
        try:
            with PeerStep(name, model, steps.optimizer, steps.next_batch, set_checkpointing) as step:
                found, peak = rate(step, max(1, arguments.repeats - 1), model.device, warm=1)
        except (torch.OutOfMemoryError, ImportError) as error:
            print(f"{PEERS[name].title}: {'does not fit' if 'memory' in str(error) else error}", flush=True)
            continue
        print(f"{PEERS[name].title}: {found:,.0f} tokens/s, peak {peak:.1f} GiB", flush=True)
        row = Row(f"sft.tokens_per_s_vs_{name}", ours, "tokens/s", PEERS[name].title, found, better="higher")
        rows.append(replace(row, note="" if peak != peak else f"the peer's peak {peak:.1f} GiB"))
    return rows


def measure_scaling(steps: Steps, arguments: argparse.Namespace) -> list[Row]:
    """Tokens a second of all processes together and of the first one alone."""
    runtime, device = steps.runtime, steps.model.device
    steps.config = replace(steps.config, token_budget=arguments.budgets[0])
    together_optimizer, alone = steps.optimizer, 0.0
    if runtime.is_main:
        steps.optimizer = Optimizer(steps.model.trainable_parameters(), steps.config.optim, 1000, Runtime(device))
        alone, _ = rate(steps, 2 * arguments.repeats, device, warm=4)
        steps.optimizer = together_optimizer
    runtime.barrier()
    own, _ = rate(steps, 2 * arguments.repeats, device, warm=4)
    (total,) = runtime.total(own)
    ranks, note = runtime.world_size, f"budget {arguments.budgets[0]:,}; one process alone: {alone:,.0f} tokens/s"
    return [
        Row(f"sft.tokens_per_s_ddp{ranks}", total, "tokens/s", better="higher", note=note),
        Row(f"sft.ddp{ranks}_scaling", total / alone if alone else 0.0, "x", better="higher", note=note),
    ]


def main(argv: Sequence[str] = ()) -> int:
    """Print the table; the exit status says whether a GPU reaches the target."""
    parser = measuring_parser("sft", __doc__, repeats=3)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), help="of the language model (default: 7b on a GPU, else tiny)"
    )
    parser.add_argument("--samples", type=positive, default=16, metavar="N", help="of a step (default: %(default)s)")
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="of LoRA (default: %(default)s)")
    parser.add_argument(
        "--budgets", type=positive, nargs="+", default=list(BUDGETS), metavar="N", help="tokens of a pack"
    )
    parser.add_argument(
        "--blocks", choices=("auto", "plain", "compiled", "fused"), default="auto", help="as in recipes"
    )
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep model and rooms there; torchrun needs it")
    arguments = parser.parse_args(list(argv))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.folder is None:
        parser.error("processes share model and rooms: name a --folder for them")
    arguments.shape = arguments.shape or ("tiny" if arguments.device == "cpu" else "7b")
    load = Load(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        runtime = init_runtime(arguments.device)
        if runtime.is_main:
            prepare(folder, arguments)
        runtime.barrier()
        config = configure(arguments, folder)
        seed_everything(0)
        model = load_model(config, None, runtime)
        speed_up(model, arguments.blocks)
        steps = Steps(model, make_samples(folder), config, runtime)
        for _ in range(-(-ROOMS // arguments.samples)):  # fills the view cache
            steps.next_batch()
        if runtime.world_size > 1:
            rows = measure_scaling(steps, arguments)
            steps.close()
            if runtime.is_main:
                report("sft", rows, arguments, load, argv=argv, packages=("transformers", "peft"))
            close_runtime(runtime)
            return 0
        rates, rows = measure_ours(steps, arguments)
        if not rates:
            raise ValueError("No token budget fits on this device; name smaller --budgets.")
        best = max(rates.values())
        rows.append(Row("sft.tokens_per_s", best, "tokens/s", better="higher", note=f"rank {arguments.rank}"))
        if peak_flops(runtime.device):
            share = mfu(training_flops(model) * best, runtime.device)
            rows.append(
                Row("sft.mfu", share, "share", better="higher", note="4 N FLOP a token, blocks of the decoder")
            )
        rows += measure_peers(steps, best, arguments)
        steps.close()
    note = f"Qwen2.5-VL {arguments.shape} shape, random weights, {arguments.samples} samples a step"
    rows = [replace(row, note="; ".join(filter(None, [note, row.note]))) for row in rows]
    report("sft", rows, arguments, load, argv=argv, packages=("transformers", "peft", "liger_kernel"))
    return 0 if arguments.device == "cpu" or best >= TARGET else 1


def prepare(folder: Path, arguments: argparse.Namespace, layers: int = 0, rooms: int = ROOMS) -> None:
    """Rooms, a view encoder and a language model, all with random weights; what is there already is kept."""
    if not (folder / "prepared").is_dir():
        write_rooms(folder, rooms, POINTS)
    if not (folder / "dual").is_dir():
        DualEncoder().save_pretrained(folder / "dual")
    if not (folder / "language").is_dir():
        small, size = arguments.shape == "tiny", SHAPES[arguments.shape]
        build_tiny(
            folder / "language",
            [" ".join(WORDS), "<think>First, look at <obj12>.</think><answer>two 1.50, 0.25</answer>"] * 50,
            size=replace(size, layers=layers or size.layers),
            dtype=torch.float32 if small else torch.bfloat16,
            device=arguments.device,
        )
