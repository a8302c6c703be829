"""Inference: the first token's latency, tokens a second of one answer, questions a second of an evaluation.

A question is about a prepared room, in a prompt of views, layout tokens, named objects and words. `first_scene_ms` is
the time to the first token of the first question about a room: it is read, encoded, its views chosen from the cache on
disk and put through the vision tower. `first_token_ms` is that of a further question about it, `tokens_per_s` the rate
after it, as when an answer is streamed. `eval.questions_per_s` answers many questions about several rooms as `eval`
does, rooms read anew. Answers all have the full length: nothing ends them before. The peer is transformers' generate
with the same weights and adapter (peft's layers), and prompts of as many tokens, text alone; it answers as many
questions together as an evaluation. Weights are random, of the shape of Qwen2.5-VL-7B on a GPU.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..datasets.scene import Sample
from ..datasets.scene_store import SceneStore
from ..engine.build import prepare_to_answer
from ..engine.data import ObservationCache
from ..engine.groups import MODE
from ..engine.rollout import roll_out, write_prompts
from ..engine.runtime import init_runtime
from ..engine.sft import load_model
from ..models.language_model import LanguageModel
from ..models.scene_vlm import SceneVLM
from ..models.tiny import SHAPES
from ._arguments import measuring_parser, positive
from ._grpo_peer import exact_prompts, release
from ._measure import Load, report, timed
from .grpo import endless, fit_prompts, model_config
from .results import Row
from .sft import measured_peak, prepare

LENGTHS = {"tiny": (480, 16), "else": (2500, 128)}  # tokens of a prompt and of an answer
PEER = "transformers generate, prompts of text alone"


@dataclass(frozen=True)
class Times:
    """Medians in seconds of one question, and of many together."""

    first_s: float  # to the first token
    whole_s: float  # of one answer
    many_s: float  # of all questions of an evaluation
    first_scene_s: float = float("nan")  # to the first token of the first question about a room


def median_of(action: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds after one call that warms up."""
    timed(action, device)
    return statistics.median(timed(action, device)[0] for _ in range(repeats))


def measure_peer(language: LanguageModel, arguments: argparse.Namespace) -> Times:
    """transformers' generate on texts as long as our prompts."""
    length, new_tokens = arguments.lengths
    texts = exact_prompts(language.tokenizer, arguments.questions, length)
    ids_BL = language.tokenizer(texts, return_tensors="pt")["input_ids"].to(language.base.device)  # type: ignore[union-attr, operator]
    base: Any = language.base

    def generate(ids_BL: torch.Tensor, count: int) -> None:
        found = base.generate(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=language.pad_id,
        )
        assert found.shape[1] == length + count

    first, whole = (
        median_of(lambda count=count: generate(ids_BL[:1], count), arguments.repeats, arguments.device)
        for count in (1, new_tokens)
    )
    many = median_of(lambda: generate(ids_BL, new_tokens), 1, arguments.device)
    return Times(first, whole, many)


class Asked:
    """A model, and questions about rooms with prompts of one length."""

    def __init__(self, folder: Path, model: SceneVLM, arguments: argparse.Namespace):
        self.model, self.arguments = model, arguments
        self.store = SceneStore(folder / "prepared", capacity=1)
        self.names = (folder / "scannetv2_train.txt").read_text(encoding="utf-8").split()
        self.samples, self.num_views = fit_prompts(
            model, self.fresh(len(self.names)), self.names, arguments.lengths[0]
        )

    def fresh(self, capacity: int) -> ObservationCache:
        """Rooms of which none has been looked at; views are on disk."""
        return ObservationCache(self.store, self.model, seed=0, capacity=capacity, cache_views=True)

    def answer(self, samples: Sequence[Sample], observations: ObservationCache, new_tokens: int) -> None:
        """Answers to some questions together, each a prompt of its own."""
        prompts = write_prompts(self.model, samples, observations.of(samples), [MODE] * len(samples))
        with endless():
            found = roll_out(
                self.model,
                prompts,
                max_new_tokens=new_tokens,
                batch_size=self.arguments.questions,
                on_token=None if len(samples) > 1 else self._streamed,
            )
        assert all(len(ids) == new_tokens for rollout in found for ids in rollout.token_ids)

    def _streamed(self, row: int, token: int) -> None:
        """What a listener hears; to tell it, each token is waited for."""

    def measure(self) -> Times:
        """One question after the other, then many together."""
        repeats, device = self.arguments.repeats, self.arguments.device
        new_tokens = self.arguments.lengths[1]
        observations = self.fresh(len(self.names))
        sample = self.samples[0]
        first, whole = (
            median_of(lambda count=count: self.answer([sample], observations, count), repeats, device)
            for count in (1, new_tokens)
        )
        first_scene = median_of(lambda: self.answer([sample], self.fresh(1), 1), repeats, device)
        questions = [
            replace(self.samples[number % len(self.samples)], sample_id=str(number))
            for number in range(self.arguments.questions)
        ]
        many = median_of(lambda: self.answer(questions, self.fresh(len(self.names)), new_tokens), repeats, device)
        return Times(first, whole, many, first_scene)


def rows_of(
    arguments: argparse.Namespace, asked: Asked, ours: Times, peer: Times | None, peak: list[float]
) -> list[Row]:
    """Rows named `infer.…` and `eval.questions_per_s`."""
    length, new_tokens = arguments.lengths
    note = (
        f"Qwen2.5-VL {arguments.shape} shape, random weights; {length} + {new_tokens} tokens, "
        f"{asked.num_views} views, LoRA r {arguments.rank}"
    )

    def row(name: str, unit: str, value: Callable[[Times], float], better: str = "lower", more: str = "") -> Row:
        theirs = value(peer) if peer else None
        return Row(name, value(ours), unit, PEER if peer else "", theirs, better=better, note=note + more)  # type: ignore[arg-type]

    rows = [
        Row("infer.first_scene_ms", 1000 * ours.first_scene_s, "ms", note=note),
        row("infer.first_token_ms", "ms", lambda times: 1000 * times.first_s),
        row(
            "infer.tokens_per_s",
            "tokens/s",
            lambda times: (new_tokens - 1) / (times.whole_s - times.first_s),
            "higher",
        ),
        row(
            "eval.questions_per_s",
            "questions/s",
            lambda times: arguments.questions / times.many_s,
            "higher",
            f"; {arguments.questions} questions about {len(asked.names)} rooms",
        ),
    ]
    return rows + [Row("infer.peak_gib", value, "GiB", note=note) for value in peak]


def main(argv: Sequence[str] = ()) -> int:
    """Print the table."""
    parser = measuring_parser("infer", __doc__, repeats=3)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), help="of the language model (default: 7b on a GPU, else tiny)"
    )
    lengths = ", ".join(f"{shape} {tokens} {new}" for shape, (tokens, new) in LENGTHS.items())
    parser.add_argument(
        "--lengths",
        nargs=2,
        type=positive,
        metavar=("TOKENS", "NEW"),
        help=f"tokens of a prompt and of an answer (default: {lengths})",
    )
    parser.add_argument("--rooms", type=positive, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--questions", type=positive, default=64, metavar="Q", help="of an evaluation, decoded together"
    )
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="of LoRA (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=("transformers",), default=["transformers"])
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep model and rooms there")
    arguments = parser.parse_args(list(argv))
    arguments.shape = arguments.shape or ("tiny" if arguments.device == "cpu" else "7b")
    arguments.lengths = arguments.lengths or LENGTHS.get(arguments.shape, LENGTHS["else"])
    if arguments.lengths[1] < 2:
        parser.error("--lengths must ask for answers of at least 2 tokens: the first is not counted in a rate")
    arguments.samples = arguments.questions
    load = Load(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        prepare(folder, arguments, rooms=arguments.rooms)
        release(torch.device(arguments.device))
        runtime = init_runtime(arguments.device)
        model = load_model(model_config(arguments, folder), None, runtime).to(runtime.device).eval()
        with torch.no_grad():
            peer = measure_peer(model.language, arguments) if arguments.peers else None
            release(runtime.device)
            asked = Asked(folder, prepare_to_answer(model), arguments)
            with measured_peak(runtime.device) as peak:
                ours = asked.measure()
        rows = rows_of(arguments, asked, ours, peer, peak)
    report("infer", rows, arguments, load, argv=argv, packages=("transformers", "peft"))
    return 0
