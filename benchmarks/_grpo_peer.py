"""Peer of the GRPO benchmark: TRL's GRPOTrainer on the same language model, as its users run it.

Prompts are text alone, which is to TRL's favour: its users' pictures would go through the vision tower once a
completion, while ours have pictures and a scene. Completions have one length: generate's own `min_new_tokens` holds
end tokens back. Generation is transformers', without vLLM; TRL's continuous batching refuses multimodal models.
"""

import gc
import importlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PrinterCallback, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from .sft import WORDS

# What 80 GB hold without gradient checkpointing: tokens of a forward pass of the 7B shape with LoRA.
TOKENS_OF_A_PASS = 4096
LORA_TARGETS = r".*\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"


@dataclass(frozen=True)
class Workload:
    """One shape of a GRPO step."""

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    beta: float = 0.04
    rank: int = 16

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group

    def rows_of_a_pass(self) -> int:
        """The largest power of two of rows that TOKENS_OF_A_PASS holds; at least one."""
        rows = max(1, TOKENS_OF_A_PASS // (self.prompt_tokens + self.new_tokens))
        return min(self.rows, 2 ** (rows.bit_length() - 1))


@dataclass(frozen=True)
class PeerResult:
    """Medians of the timed steps, in seconds, and the peak of the GPU's memory in GiB (nan on a CPU)."""

    step_s: float
    generate_s: float
    decode_s: float  # of generate: from the first token's logits on
    score_s: float  # reference log-probabilities, rewards, advantages
    update_s: float  # policy's forward and backward passes, and the optimizer's step
    peak_gib: float
    settings: str


def words_of_one_token(tokenizer: Any) -> list[str]:
    """Words that are one token each behind a space; ValueError where the tokenizer has too few."""
    words = [word for word in WORDS if len(tokenizer(" " + word)["input_ids"]) == 1]
    if len(words) < 2:
        raise ValueError("The tokenizer splits common words; train it on the benchmark's own texts.")
    return words


def exact_prompts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Different texts of exactly `length` tokens each."""
    words = words_of_one_token(tokenizer)
    rng = np.random.default_rng(0)
    prompts = ["".join(" " + word for word in rng.choice(words, length)) for _ in range(count)]
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {length}
    return prompts


class TrlPeer:
    """TRL's trainer over a folder that `models/tiny.py` wrote.

    Args:
        folder: the Qwen2.5-VL to train; loaded in bfloat16 on a GPU, else in float32.
        work: the shape of a step.
        device: cpu, or cuda where one GPU is visible.

    Raises:
        ValueError: there are more, all of which the trainer would take.
    """

    title = "TRL GRPOTrainer, transformers generate"

    def __init__(self, folder: Path, work: Workload, device: str):
        self.folder, self.work, self.device = folder, work, torch.device(device)
        if self.device.type == "cuda" and torch.cuda.device_count() > 1:
            raise ValueError(
                "TRL's trainer takes every GPU that it sees; set CUDA_VISIBLE_DEVICES=0, or measure without --peers."
            )

    def measure(self, repeats: int, warm: int = 1) -> PeerResult:
        """Steps with as many rows a pass as fit: all without gradient checkpointing first, which is faster.

        Raises:
            ImportError: TRL is not installed.
            torch.OutOfMemoryError: not even one row a pass fits.
        """
        rows = self.work.rows_of_a_pass()
        tries = [(2**power, False) for power in reversed(range(rows.bit_length()))]
        tries += [(2**power, True) for power in reversed(range(rows.bit_length()))]
        for number, (count, checkpointing) in enumerate(tries):
            try:
                return self._steps(repeats, warm, count, checkpointing)
            except torch.OutOfMemoryError:
                if number + 1 == len(tries):
                    raise
                print(f"TRL with {count} rows a pass does not fit, checkpointing {checkpointing}", flush=True)
            release(self.device)
        raise AssertionError("unreachable")

    def _steps(self, repeats: int, warm: int, rows: int, checkpointing: bool) -> PeerResult:
        output = tempfile.mkdtemp(prefix="trl")
        try:
            clock = Clock(self.device, warm)
            trainer = self._trainer(output, repeats + warm, rows, checkpointing, clock)
            trainer.train()
            check_lengths(clock.lengths, self.work)
        finally:
            trainer = None
            release(self.device)
            shutil.rmtree(output, ignore_errors=True)
        memory = f"{rows} rows a pass, gradient checkpointing {'on' if checkpointing else 'off'}"
        return replace(clock.result(), settings=f"TRL: {memory}, sdpa, prompts of text alone")

    def _trainer(self, output: str, steps: int, rows: int, checkpointing: bool, clock: "Clock") -> Any:
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

        dataset = importlib.import_module("datasets").Dataset  # Hugging Face's, not the folder beside this one

        work, on_gpu = self.work, self.device.type == "cuda"
        tokenizer = AutoTokenizer.from_pretrained(str(self.folder), padding_side="left")
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            str(self.folder), dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="sdpa"
        )
        pictures = [model.config.image_token_id, model.config.video_token_id]
        config = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=work.rows // rows,
            num_generations=work.group,
            max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens, "suppress_tokens": pictures},
            temperature=1.0,
            beta=work.beta,
            max_steps=steps,
            learning_rate=1e-6,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        prompts = exact_prompts(tokenizer, work.prompts * steps, work.prompt_tokens)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=random_rewards(),
            args=config,
            train_dataset=dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[clock.callback()],
            peft_config=LoraConfig(
                r=work.rank, lora_alpha=2 * work.rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        return trainer


def random_rewards() -> Callable[..., list[float]]:
    """A reward function that pays at random, so that every group has variance."""
    rng = np.random.default_rng(0)

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return rng.random(len(completions)).tolist()

    return reward


def check_lengths(lengths: Sequence[int], work: Workload) -> None:
    """ValueError where a completion is shorter or longer than the workload says: then its time is another's."""
    if set(lengths) != {work.new_tokens}:
        raise ValueError(
            f"Completions have {min(lengths, default=0)} to {max(lengths, default=0)} tokens, not {work.new_tokens}."
        )


def release(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Clock:
    """Times a trainer's steps, its calls of generate, and all that comes before its policy's passes.

    Args:
        warm: steps that come first and are not counted; the memory's peak is that of the counted ones.
    """

    def __init__(self, device: torch.device, warm: int):
        self.device, self.warm = device, warm
        self.lengths: list[int] = []
        self._generate: list[float] = []
        self._decode: list[float] = []
        self._prepare: list[float] = []  # generate and what follows it before the first pass
        self._steps: list[float] = []
        self._since = 0.0
        self._peak = float("nan")

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    @contextmanager
    def _timed(self, times: list[float]) -> Iterator[None]:
        start = self.now()
        yield
        times.append(self.now() - start)

    def watch(self, trainer: Any) -> None:
        """Time the two methods of the trainer that stand for its phases; what they do stays as it is."""
        generate, prepare = trainer._generate_single_turn, trainer._generate_and_score_completions

        head = trainer.model.get_base_model().lm_head
        first: list[float] = []  # when the prompts were through

        def note_first(*_: Any) -> None:
            if not first:
                first.append(self.now())

        def timed_generate(*arguments: Any, **named: Any) -> Any:
            first.clear()
            with self._timed(self._generate), head.register_forward_hook(note_first):
                found = generate(*arguments, **named)
            self._decode.append(self.now() - first[0])
            self.lengths += [len(ids) for ids in found[0]]
            return found

        def timed_prepare(*arguments: Any, **named: Any) -> Any:
            with self._timed(self._prepare):
                return prepare(*arguments, **named)

        trainer._generate_single_turn, trainer._generate_and_score_completions = timed_generate, timed_prepare

    def callback(self) -> TrainerCallback:
        """Tells this clock of the trainer's steps."""
        clock = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._since = clock.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock._end_step()

        return Steps()

    def _end_step(self) -> None:
        now = self.now()
        self._steps.append(now - self._since)
        self._since = now
        if self.device.type != "cuda":
            return
        if len(self._steps) <= self.warm:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._peak = torch.cuda.max_memory_allocated(self.device) / 2**30

    def result(self) -> PeerResult:
        """Medians of the counted steps; the phases are medians of their own, so their sum is only nearly the step."""
        every = (self._steps, self._prepare, self._generate, self._decode)
        steps, prepare, generate, decode = (times[self.warm :] for times in every)
        assert len(steps) == len(prepare) == len(generate) == len(decode) > 0
        score = [whole - part for whole, part in zip(prepare, generate, strict=True)]
        update = [step - before for step, before in zip(steps, prepare, strict=True)]
        step_s, generate_s, decode_s, score_s, update_s = map(
            statistics.median, (steps, generate, decode, score, update)
        )
        return PeerResult(step_s, generate_s, decode_s, score_s, update_s, self._peak, settings="")
