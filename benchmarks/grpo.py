"""GRPO: seconds of a whole step, tokens a second of decoding, memory, beside TRL's GRPOTrainer.

A step is what the training loop does: prepared rooms are read and encoded and views chosen from the cache on disk, on
a GPU while the step before computes; views are put through the vision tower, a group of completions sampled for each
prompt, and the LoRA adapter updated once by the clipped loss with KL to a frozen reference. Rewards are random
numbers, so that every group has variance. Completions all have the full length: nothing ends them before. Prompts
hold views, layout tokens, named objects and words, up to the length that is asked for. Weights are random, of the
shape of Qwen2.5-VL-7B on a GPU. TRL has the same model, adapter, loss and numbers of tokens, its prompts text alone;
it runs first, and what it held is freed.

`rollout_s` is the step up to the last sampled token. By how much full completions take longer than single tokens, of
the same prompts, is the time of decoding; the rest of the rollout, `first_token_s`, is the wait for prompts, their
views and prefill. TRL's decoding is the part of generate after the prompts' last logits.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..engine.advantages import group_advantages
from ..engine.ahead import Ahead
from ..engine.build import speed_up
from ..engine.config import GrpoConfig, SftConfig, load_config
from ..engine.data import ObservationCache
from ..engine.groups import MODE, Experience
from ..engine.grpo import REFERENCE, update_policy
from ..engine.optim import Optimizer
from ..engine.rewards import RewardResult
from ..engine.rollout import Prompt, Rollout, roll_out, write_prompts
from ..engine.runtime import Runtime, init_runtime, seed_everything, torch_stream
from ..engine.sft import load_model
from ..engine.throughput import Phases
from ..models.language_model import LanguageModel, copy_lora
from ..models.scene_vlm import POLICY, SceneVLM
from ..models.tiny import SHAPES
from ._arguments import measuring_parser, positive
from ._grpo_peer import PeerResult, TrlPeer, Workload, check_lengths, release, words_of_one_token
from ._measure import Load, report, timed
from .results import Row
from .sft import configure, measured_peak, prepare

STEP_S, LONG_STEP_S, DECODE_RATE = 5.0, 8.0, 8000.0  # the targets, on a GPU
LENGTHS = {
    "short": {"tiny": (480, 16), "else": (600, 256)},
    "long": {"tiny": (520, 24), "else": (2500, 300)},
}  # tokens of prompts and completions
ROUNDS = 3  # of rooms, so that a room is dropped before it comes again
LAYOUT_TOKENS, PROPOSALS = 32, 24
TOKEN_BUDGET = 10_240  # two groups of the long prompts


@dataclass(frozen=True)
class Times:
    """Medians of our steps, in seconds, and the peak of the GPU's memory in GiB (nan on a CPU)."""

    step_s: float
    rollout_s: float
    decode_s: float
    update_s: float
    peak_gib: float
    num_views: int

    @property
    def first_token_s(self) -> float:
        """From the step's begin to the first token of all completions."""
        return self.rollout_s - self.decode_s

    def decode_rate(self, work: Workload) -> float:
        """Tokens a second between the first token of all completions and the last."""
        return work.rows * (work.new_tokens - 1) / self.decode_s


@contextmanager
def endless() -> Iterator[None]:
    """No token ends a completion while the block runs."""
    before = LanguageModel.eos_ids
    setattr(LanguageModel, "eos_ids", property(lambda _: []))  # noqa: B010 - it is a property of the class
    try:
        yield
    finally:
        setattr(LanguageModel, "eos_ids", before)  # noqa: B010


class Ours:
    """Steps of our GRPO over rooms that are new each time.

    Args:
        folder: what `sft.prepare` wrote.
        config: the model's settings.
    """

    def __init__(self, folder: Path, config: SftConfig, runtime: Runtime):
        seed_everything(0)
        self.runtime = runtime
        self.model = load_policy(config, runtime)
        self.store = SceneStore(folder / "prepared", capacity=1)
        self.names = (folder / "scannetv2_train.txt").read_text(encoding="utf-8").split()
        self.done = 0

    def begin(self, work: Workload, num_steps: int) -> int:
        """Get ready for so many steps of a shape; returns the number of views in a prompt."""
        self.work = work
        self.config = grpo_config(work)
        self.observations = ObservationCache(self.store, self.model, seed=0, capacity=work.prompts, cache_views=True)
        self.samples, num_views = fit_prompts(self.model, self.observations, self.names, work.prompt_tokens)
        self.optimizer = Optimizer(self.model.trainable_parameters(), self.config.optim, 1000, self.runtime)
        device = self.model.device
        self.coming = Ahead(self.write, device, num_steps=self.done + num_steps, on=device.type == "cuda")
        return num_views

    def write(self, step: int) -> list[Prompt]:
        """The prompts of a step; their rooms were dropped since they last came."""
        first = step * self.work.prompts
        samples = [self.samples[row % len(self.samples)] for row in range(first, first + self.work.prompts)]
        return write_prompts(self.model, samples, self.observations.of(samples), [MODE] * len(samples))

    def next_prompts(self) -> list[Prompt]:
        """The prompts of the next step."""
        self.done += 1
        return self.coming[self.done - 1]

    def sample(self, prompts: list[Prompt], new_tokens: int) -> list[Rollout]:
        """A group of completions of each prompt, all of one length."""
        with endless():
            return roll_out(
                self.model,
                prompts,
                max_new_tokens=new_tokens,
                group_size=self.work.group,
                temperature=1.0,
                generators=[torch_stream("cpu", self.done, row) for row in range(self.work.rows)],
                batch_size=self.work.rows,
            )

    def update(self, rollouts: list[Rollout]) -> None:
        """One update on completions that random numbers reward."""
        generator = torch.Generator().manual_seed(self.done)
        rewards_PG = torch.rand(self.work.prompts, self.work.group, generator=generator, dtype=torch.float64)
        failed = {"random": np.zeros(self.work.rows, dtype=bool)}
        scored = RewardResult(rewards_PG.flatten().numpy(), {}, failed, failed["random"], {})
        advantages_PG = group_advantages(rewards_PG, "group").float()
        experience = Experience(rollouts, scored, advantages_PG, {}, self.work.prompts)
        phases = Phases(self.runtime.device)
        update_policy(self.model, experience, self.optimizer, self.config, self.runtime, self.done, phases)


def load_policy(config: SftConfig, runtime: Runtime) -> SceneVLM:
    """A model with a policy to train and a frozen reference; all else is frozen."""
    model = load_model(config, None, runtime)
    copy_lora(model.language, POLICY, REFERENCE)
    model.set_trainable(language="lora", connector=False, scene_encoder=False)
    model.to(runtime.device)
    speed_up(model, "auto")
    return model.eval()


def grpo_config(work: Workload) -> GrpoConfig:
    """The settings of GRPO: those of TRL's defaults where both have them."""
    return load_config(
        "grpo",
        None,
        [
            f"run.batch_size={work.prompts}",
            f"token_budget={TOKEN_BUDGET}",
            f"rollout.group_size={work.group}",
            f"rollout.max_new_tokens={work.new_tokens}",
            f"rollout.batch_size={work.rows}",
            f"loss.beta={work.beta}",
            "loss.loss_type=dapo",
            "loss.kl_ratio=true",
            "optim.lr=1e-6",
        ],
    )


def model_config(arguments: argparse.Namespace, folder: Path) -> SftConfig:
    """The model's settings: those of `bench sft` with fewer scene tokens, so that a short prompt can hold a view."""
    config = configure(arguments, folder)
    layout = config.model.language.num_layout_tokens
    language = replace(config.model.language, num_layout_tokens=min(LAYOUT_TOKENS, layout), num_proposals=PROPOSALS)
    return replace(config, model=replace(config.model, language=language))


def fit_prompts(
    model: SceneVLM, observations: ObservationCache, names: Sequence[str], length: int
) -> tuple[list[Sample], int]:
    """A question about each room whose prompt has `length` tokens: as many views as fit, words for the rest.

    Returns the samples and the number of views. Fills the view cache on disk.

    Raises:
        ValueError: not even one view fits.
    """
    vocabulary = words_of_one_token(model.language.tokenizer)

    def ask(name: str, words: int) -> Sample:
        text = " ".join(vocabulary[index % len(vocabulary)] for index in range(max(1, words)))
        return Sample(f"{name}-0", "qa", "bench", name, text, "one")

    def tokens(sample: Sample) -> int:
        (observation,) = observations.of([sample])
        observation.choices.clear()  # made for another number of views
        return len(model.write_row(sample, observation, MODE, None)[0].token_ids)

    def shortest(num_views: int) -> dict[str, int]:
        assert model.view_selector is not None
        model.view_selector.num_views = num_views
        return {name: tokens(ask(name, 1)) for name in names}

    one, two = shortest(1), shortest(2)
    view = max(two.values()) - max(one.values())
    fitting = 1 + (length - max(one.values())) // view
    if fitting < 1:
        raise ValueError(f"A prompt with one view has {max(one.values())} tokens; ask for at least as many.")
    num_views = min(fitting, model.settings.num_candidates)
    bare = shortest(num_views)
    samples = [ask(name, 1 + length - bare[name]) for name in names]
    found = {tokens(sample) for sample in samples}
    if found != {length}:
        raise ValueError(f"Prompts have {min(found)} to {max(found)} tokens instead of {length}.")
    return samples, num_views


def measure_ours(ours: Ours, work: Workload, repeats: int) -> Times:
    """Medians of whole steps, after one that warms up, and of decoding alone.

    ValueError where completions are too short for their decoding to be told from noise.
    """
    device = str(ours.model.device)
    num_views = ours.begin(work, 2 + repeats)
    rollout, update, decode = [], [], []
    with ours.coming:
        with measured_peak(ours.model.device) as peak:
            for _ in range(1 + repeats):
                sampled_s, rollouts = timed(lambda: ours.sample(ours.next_prompts(), work.new_tokens), device)
                check_lengths([len(ids) for entry in rollouts for ids in entry.token_ids], work)
                rollout.append(sampled_s)
                update.append(timed(lambda kept=rollouts: ours.update(kept), device)[0])
        prompts = ours.next_prompts()
        ours.sample(prompts, 1)  # views go through the vision tower
        for _ in range(repeats):
            one_s, all_s = (
                timed(lambda count=count: ours.sample(prompts, count), device)[0] for count in (1, work.new_tokens)
            )
            decode.append(all_s - one_s)
    decode_s = statistics.median(decode)
    if decode_s <= 0:
        raise ValueError(f"Decoding {work.new_tokens} tokens takes no time to speak of; ask for longer completions.")
    step_s, rollout_s, update_s = (
        statistics.median(times[1:]) for times in ([*map(sum, zip(rollout, update, strict=True))], rollout, update)
    )
    return Times(step_s, rollout_s, decode_s, update_s, peak[0] if peak else float("nan"), num_views)


def measure_peer(folder: Path, work: Workload, arguments: argparse.Namespace) -> PeerResult | None:
    """TRL's numbers; None where it is not wanted, not installed, or does not fit, which is said."""
    if "trl" not in arguments.peers:
        return None
    try:
        found = TrlPeer(folder / "language", work, arguments.device).measure(max(1, arguments.repeats - 1))
    except ImportError as error:
        print(f"{TrlPeer.title}: {error}", flush=True)
        return None
    except torch.OutOfMemoryError:
        print(f"{TrlPeer.title}: does not fit", flush=True)
        release(torch.device(arguments.device))
        return None
    phases = {
        "prefill": found.generate_s - found.decode_s,
        "decoding": found.decode_s,
        "reference and rewards": found.score_s,
        "update": found.update_s,
    }
    say(TrlPeer.title, found.step_s, phases, found.peak_gib, found.settings)
    return found


def say(who: str, step_s: float, phases: dict[str, float], peak_gib: float, settings: str) -> None:
    """Print a step and its phases."""
    parts = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
    print(f"{who}: {step_s:.2f} s a step ({parts}), peak {peak_gib:.1f} GiB; {settings}", flush=True)


def rows_of(name: str, work: Workload, ours: Times, peer: PeerResult | None) -> list[Row]:
    """Rows named `grpo.…` or `grpo.long_prompt_…` of one shape."""
    note = (
        f"{work.prompts} prompts x {work.group} samples, {work.prompt_tokens} + {work.new_tokens} tokens, "
        f"{ours.num_views} views a prompt, LoRA r {work.rank}, beta {work.beta:g}"
    )
    if peer is not None:
        note += f"; {peer.settings}"
    title = TrlPeer.title if peer else ""

    def row(key: str, value: float, unit: str, theirs: Callable[[PeerResult], float], **more: str) -> Row:
        return Row(f"{name}{key}", value, unit, title, theirs(peer) if peer else None, note=note, **more)  # type: ignore[arg-type]

    rows = [
        row("step_s", ours.step_s, "s", lambda found: found.step_s),
        row("rollout_s", ours.rollout_s, "s", lambda found: found.generate_s),
        row("update_s", ours.update_s, "s", lambda found: found.score_s + found.update_s),
        row(
            "decode_tokens_per_s",
            ours.decode_rate(work),
            "tokens/s",
            lambda found: work.rows * (work.new_tokens - 1) / found.decode_s,
            better="higher",
        ),
        row("first_token_s", ours.first_token_s, "s", lambda found: found.generate_s - found.decode_s),
    ]
    if ours.peak_gib == ours.peak_gib:
        rows.append(row("peak_gib", ours.peak_gib, "GiB", lambda found: found.peak_gib))
    return rows


def reached(rows: Sequence[Row]) -> bool:
    """Whether the targets that stand in the table are met."""
    at_most = {"grpo.step_s": STEP_S, "grpo.long_prompt_step_s": LONG_STEP_S}
    return all(
        row.value <= at_most.get(row.name, row.value)
        and (row.name != "grpo.decode_tokens_per_s" or row.value >= DECODE_RATE)
        for row in rows
    )


def main(argv: Sequence[str] = ()) -> int:
    """Print the table; the exit status says whether a GPU reaches the targets."""
    parser = measuring_parser("grpo", __doc__, repeats=3)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), help="of the language model (default: 7b on a GPU, else tiny)"
    )
    parser.add_argument("--prompts", type=positive, default=8, metavar="P", help="of a step (default: %(default)s)")
    parser.add_argument("--group", type=positive, default=8, metavar="G", help="samples of a prompt")
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="of LoRA (default: %(default)s)")
    parser.add_argument(
        "--runs", nargs="+", choices=("short", "long"), default=["short", "long"], help="which shapes (default: both)"
    )
    for name, default in LENGTHS.items():
        lengths = ", ".join(f"{shape} {tokens} {new}" for shape, (tokens, new) in default.items())
        parser.add_argument(
            f"--{name}",
            nargs=2,
            type=positive,
            metavar=("TOKENS", "NEW"),
            help=f"tokens of a prompt and of a completion (default: {lengths})",
        )
    parser.add_argument("--peers", nargs="*", choices=("trl",), default=["trl"], help="default: trl")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep model and rooms there")
    arguments = parser.parse_args(list(argv))
    if arguments.group < 2:
        parser.error("--group must be at least 2: advantages are relative to a group")
    arguments.shape = arguments.shape or ("tiny" if arguments.device == "cpu" else "7b")
    for name, default in LENGTHS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default.get(arguments.shape, default["else"]))
    arguments.samples = arguments.prompts
    load = Load(arguments)
    rows = measure(arguments)
    note = f"Qwen2.5-VL {arguments.shape} shape, random weights"
    rows = [replace(row, note=f"{note}; {row.note}") for row in rows]
    packages = ("transformers", "peft", *(["trl"] if any(row.peer for row in rows) else []))
    report("grpo", rows, arguments, load, argv=argv, packages=packages)
    return 0 if arguments.device == "cpu" or reached(rows) else 1


def measure(arguments: argparse.Namespace) -> list[Row]:
    """The peer on every shape, then ours."""
    shapes = {"short": ("grpo.", arguments.short), "long": ("grpo.long_prompt_", arguments.long)}
    works = {
        prefix: Workload(arguments.prompts, arguments.group, *tokens, rank=arguments.rank)
        for prefix, tokens in (shapes[name] for name in arguments.runs)
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        prepare(folder, arguments, rooms=ROUNDS * arguments.prompts)
        release(torch.device(arguments.device))
        peers = {prefix: measure_peer(folder, work, arguments) for prefix, work in works.items()}
        ours = Ours(folder, model_config(arguments, folder), init_runtime(arguments.device))
        for prefix, work in works.items():
            times = measure_ours(ours, work, arguments.repeats)
            phases = {
                "up to the first token": times.first_token_s,
                "decoding": times.decode_s,
                "update": times.update_s,
            }
            say("ours", times.step_s, phases, times.peak_gib, f"{times.num_views} views a prompt")
            rows += rows_of(prefix, work, times, peers[prefix])
    return rows
