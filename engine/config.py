"""Configurations of the commands: frozen dataclasses, filled from YAML recipes and command-line overrides.

Precedence: dataclass defaults < recipe (`base:` recipes first, in order) < `--set key.sub=value`.
An unknown key is an error that names the nearest known one. The resolved configuration is saved beside the weights.

The model's keys are in model_config.py, those of GRPO's loss in grpo_presets.py; all are imported from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config_fields import at_least, from_dict, one_of, to_dict
from .grpo_presets import GrpoLossConfig
from .model_config import (
    DepthConfig,
    EncoderConfig,
    LanguageConfig,
    ModelConfig,
    PointTransformerConfig,
    ViewsConfig,
)
from .recipes import recipe_values

__all__ = [
    "CONFIGS",
    "PARTS",
    "AugmentConfig",
    "DataConfig",
    "DepthConfig",
    "DetectConfig",
    "EncoderConfig",
    "EvalConfig",
    "GrpoConfig",
    "GrpoLossConfig",
    "LanguageConfig",
    "ModelConfig",
    "OptimConfig",
    "PointTransformerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SftConfig",
    "ViewsConfig",
    "dump_config",
    "from_dict",
    "load_config",
    "save_config",
    "to_dict",
]


@dataclass(frozen=True)
class RunConfig:
    """One run: where it writes, how long it goes, how it is repeated."""

    dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8  # samples per optimiser step, over all ranks
    micro_batch_size: int = 0  # rows per forward pass on one rank at most; 0: any number
    log_every: int = 10
    save_every: int = 200
    keep_checkpoints: int = 2
    eval_every: int = 0  # steps between evaluations, the last at the end; 0: detect only at the end, sft never
    best_metric: str = ""  # what makes a model the best one, kept in <run>/best; "" takes the command's own
    best_mode: str = "max"  # max, min: which values of it are better
    device: str = "auto"  # auto, cpu, cuda
    trackers: tuple[str, ...] = ()  # besides metrics.jsonl: tensorboard

    def __post_init__(self):
        at_least(self, seed=0, steps=0, batch_size=1, micro_batch_size=0, log_every=1, save_every=1)
        at_least(self, keep_checkpoints=0, eval_every=0)
        one_of(self, best_mode=("max", "min"))

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is to be done after this one."""
        return (step + 1) % every == 0 or step + 1 == self.steps


@dataclass(frozen=True)
class DataConfig:
    """Prepared scenes and annotations under one root (data/README.md)."""

    root: str = "data/rooms"
    datasets: tuple[str, ...] = ("scene30k",)
    train_split: str = "train"
    eval_split: str = "val"
    eval_splits: dict[str, str] = field(default_factory=dict)  # data set: split, where evaluation takes another one
    missing: str = "error"  # skip: leave out, and count, records whose scene or object is not there
    num_points: int = 40_000
    cached_scenes: int = 128  # scenes kept with their points, encoding and views; more is faster and takes memory
    cache_views: bool = True  # keep views and their embeddings on disk, in <root>/prepared/views
    max_samples: int = 0  # per data set, chosen by seed; 0 takes all
    weights: dict[str, float] = field(
        default_factory=dict
    )  # data set: turns of each sample in an epoch of sft or grpo
    workers: int = 0  # processes that make batches of detect, or rows and views of sft; 0: the process that trains
    multiview: str = ""  # HDF5 file of multi-view features, where the encoder takes them

    def __post_init__(self):
        at_least(self, num_points=1, cached_scenes=0, max_samples=0, workers=0)
        one_of(self, missing=("error", "skip"))
        if not self.datasets:
            raise ValueError("datasets is empty; name one or more, for instance scene30k.")
        twice = [name for name in dict.fromkeys(self.datasets) if self.datasets.count(name) > 1]
        if twice:
            raise ValueError(f"datasets names {twice[0]} twice; name it once, and give it more turns by weights.")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"weights.{name} is {weight}; it must not be below 0.")


# Parts of the model whose learning rates optim.lr_factors may change.
PARTS = ("language", "vision_tower", "connector", "scene_encoder")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine (or constant) schedule."""

    lr: float = 1e-4
    min_lr: float = 1e-6
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 20
    schedule: str = "cosine"  # cosine, constant
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 5  # consecutive non-finite steps before the run aborts
    lr_factors: dict[str, float] = field(default_factory=dict)  # sft: part of the model (PARTS): factor on lr, min_lr

    def __post_init__(self):
        for name in ("lr", "min_lr", "weight_decay", "warmup_steps", "max_grad_norm", "max_skipped_steps"):
            if not getattr(self, name) >= 0:  # nor is NaN
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must not be below 0.")
        for name, factor in self.lr_factors.items():
            if name not in PARTS:
                raise ValueError(f"lr_factors names {name!r}; the parts are {', '.join(PARTS)}.")
            if factor < 0:
                raise ValueError(f"lr_factors.{name} is {factor}; it must not be below 0.")


def _one_rate(config: Any) -> None:
    if config.optim.lr_factors:
        raise ValueError("optim.lr_factors is for sft; here one thing learns, at optim.lr. Leave it out.")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the detector's training scenes (datasets/transforms.py and datasets/augmentation.py).

    In a recipe or an override `augment: true` and `augment: false` set `enabled`.
    """

    enabled: bool = True
    flip: bool = True  # along x and along y, half of the time each
    quarter_turns: bool = True
    max_angle: float = 5.0  # degrees about z, either way; 180: any turn
    scale_low: float = 0.9
    scale_high: float = 1.1
    cuboid: float = 0.0  # probability that a scene is cut to a random box
    cuboid_min_share: float = 0.5  # its sides, of the scene's extents
    cuboid_min_points: float = 0.3  # in it, of the scene's points; where no box has them the scene stays whole
    color: float = 0.0  # most that brightness and contrast change, of the full range: 0.2
    color_noise: float = 0.0  # standard deviation, every channel of every point: 0.02
    color_drop: float = 0.0  # probability that a scene is grey throughout
    jitter: float = 0.0  # millimetres, standard deviation of each coordinate, cut off at three
    object_dropout: float = 0.0  # probability that an object is left out; clouds of labelled instances only

    def __post_init__(self):
        for name in ("cuboid", "cuboid_min_share", "cuboid_min_points", "color", "color_drop", "object_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be within 0 and 1.")
        if not 0 <= self.max_angle <= 180:
            raise ValueError(f"max_angle is {self.max_angle}; it is in degrees, from 0 to 180.")
        if not 0 < self.scale_low <= self.scale_high:
            raise ValueError(f"scale_low is {self.scale_low}; it must be above 0 and not above scale_high.")
        for name in ("jitter", "color_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below 0.")


@dataclass(frozen=True)
class DetectConfig:
    """`python main.py detect`: pre-training of the scene encoder."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=7e-4))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: str = "float32"  # of the bulk of the arithmetic: float32, bfloat16 (the rest then in TF32)
    ema_decay: float = 0.0  # of the averaged weights that are evaluated and kept; 0: the weights themselves
    queries_per_object: int = 1  # that learn an object in the layers before the last

    def __post_init__(self):
        one_of(self, precision=("float32", "bfloat16"))
        at_least(self, queries_per_object=1)
        _one_rate(self)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1.")


@dataclass(frozen=True)
class SftConfig:
    """`python main.py sft`: supervised fine-tuning (cold start on Scene-30K, then the task mix)."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: str = ""  # model folder to start from; "" builds the model from `model`
    pointers: str = "name"  # name: boxes covered by a proposal are taught as <obj12>; box: always as numbers
    fewest_proposals: int = 0  # that a sample is shown, a number drawn between it and all; 0: always all
    all_proposals_from: int = 0  # step from which it may be all of them; before, it grows with the steps
    token_budget: int = 8192  # tokens of samples packed into one forward pass
    blocks: str = "auto"  # plain; compiled; fused: LoRA in fewer products. auto: plain on a CPU or cut, else fastest
    eval_datasets: tuple[str, ...] = ()  # that are evaluated on; () takes those that have held-out samples
    eval_samples: int = 256  # of data.eval_split at most, every data set alike, where run.eval_every is above 0
    eval_answers: int = 0  # of them at most are answered as well, and scored as `eval` does; 0: none
    eval_new_tokens: int = 256  # of such an answer at most
    eval_modes: dict[str, str] = field(default_factory=dict)  # task: think or direct; one left out takes its default

    def __post_init__(self):
        one_of(self, pointers=("name", "box"), blocks=("auto", "plain", "compiled", "fused"))
        at_least(self, token_budget=1, eval_samples=1, eval_answers=0, eval_new_tokens=1)
        at_least(self, fewest_proposals=0, all_proposals_from=0)
        if self.fewest_proposals and self.model.views.weights == "learned":
            raise ValueError("Weights of views are learned of whole scenes; set fewest_proposals=0.")
        if "loss" in self.run.best_metric and self.run.best_mode == "max":
            raise ValueError(f"run.best_metric is {self.run.best_metric}, best where low; set run.best_mode=min.")


@dataclass(frozen=True)
class RewardConfig:
    """Rewards and how they combine (engine/rewards)."""

    names: tuple[str, ...] = ("format", "perception", "semantic")  # or module:function
    weights: tuple[float, ...] = (0.3, 0.4, 0.3)
    gate_by_format: bool = True
    aggregation: str = "sum_then_normalize"  # normalize_then_sum (GDPO): each reward by its own deviation in its group
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)  # weights changed for a task's rows
    semantic_encoder: str = "openai/clip-vit-large-patch14"
    box_shape: str = "iou"  # of the perception reward; giou still tells near from far where nothing overlaps
    length_slack: int | None = 20  # words above which long answers earn less (semantic.py); null: the plain cosine
    # users' rewards
    timeout_s: float = 30.0
    workers: int = 2
    max_failure_share: float = 0.1  # of the recent completions; above it the run ends

    def __post_init__(self):
        one_of(self, box_shape=("iou", "giou"), aggregation=("sum_then_normalize", "normalize_then_sum"))
        at_least(self, workers=1)
        if self.length_slack is not None:
            at_least(self, length_slack=0)
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0.")
        if not 0 <= self.max_failure_share <= 1:
            raise ValueError(f"max_failure_share is {self.max_failure_share}; it must be from 0 to 1.")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    group_size: int = 8
    max_new_tokens: int = 300
    temperature: float = 1.0
    batch_size: int = 64  # completions decoded together, in whole groups, at least one
    resample_rounds: int = 0  # times that others take the place of prompts whose completions all earn the same
    max_prompt_tokens: int = 0  # another takes the place of a longer prompt; 0: any length

    def __post_init__(self):
        at_least(self, max_new_tokens=1, batch_size=1, resample_rounds=0, max_prompt_tokens=0)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")


@dataclass(frozen=True)
class GrpoConfig:
    """`python main.py grpo`: reinforcement learning from an SFT model. `run.batch_size` counts prompts."""

    init: str = ""  # model folder written by `sft`: the start and the frozen KL reference
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, schedule="constant", weight_decay=0.0))
    loss: GrpoLossConfig = field(default_factory=GrpoLossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    updates_per_rollout: int = 1
    token_budget: int = 8192  # tokens of one forward pass: prompts once, and their completions
    blocks: str = "auto"  # plain; fused: LoRA in fewer products. auto: plain on a CPU, else fused
    gradient_checkpointing: bool = False
    lora_rank: int = 16  # of the policy adapter, where the SFT model has none
    lora_alpha: int = 32
    eval_datasets: tuple[str, ...] = ()  # that are evaluated on; () takes those that have held-out samples
    eval_samples: int = 64  # of data.eval_split at most, every data set alike, where run.eval_every is above 0

    def __post_init__(self):
        one_of(self, blocks=("auto", "plain", "fused"))
        at_least(self, updates_per_rollout=1, token_budget=1, lora_rank=1, lora_alpha=1, eval_samples=1)
        _one_rate(self)
        if self.reward.aggregation == "normalize_then_sum" and self.loss.scale != "group":
            raise ValueError(
                "reward.aggregation normalize_then_sum divides each reward by its group's deviation; leave loss.scale "
                f"at group, not {self.loss.scale}."
            )


@dataclass(frozen=True)
class EvalConfig:
    """`python main.py eval`: one model on the benchmarks."""

    model: str = ""  # run, checkpoint or model folder
    answers: str = "model"  # model; most-frequent: the training set's most frequent answers, the model only detects
    label: str = ""  # name of the column in reports; "" takes the folder's name
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            datasets=(
                "scan2cap",
                "object_caption",
                "scanrefer",
                "scanqa",
                "sqa3d",
                "dialogue",
                "planning",
                "scene_description",
            )
        )
    )
    max_new_tokens: int = 256
    token_budget: int = 65_536  # tokens of prompts and answers whose keys and values are kept together at most
    block_size: int = 128  # questions that are batched among themselves, answered by one process, and kept together
    language_model: str = ""  # where the base language model lies, if not where it did in training
    # by task, or by data set where one of its task wants others: one or more, the first is the one that reports show;
    # a task left out takes its default
    scorers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)  # task: think or direct; a task left out takes its default
    meteor: str = "auto"  # auto: where Java is there; yes; no (it takes seconds to start)
    dense_caption_proposals: int = 64  # proposals captioned in one scene, by objectness

    def __post_init__(self):
        at_least(self, max_new_tokens=1, dense_caption_proposals=1, token_budget=1, block_size=1)


CONFIGS: dict[str, type] = {"detect": DetectConfig, "sft": SftConfig, "grpo": GrpoConfig, "eval": EvalConfig}


def load_config(kind: str, path: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """Resolve the configuration of one command.

    Args:
        kind: one of CONFIGS.
        path: YAML recipe; None takes the defaults.
        overrides: `key.sub=value` strings, the value in YAML syntax.

    Raises:
        ValueError: unknown key (the nearest is named), wrong type or range, unreadable recipe.
    """
    return from_dict(CONFIGS[kind], recipe_values(path, overrides))


def dump_config(config: Any) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def save_config(config: Any, path: str | Path) -> None:
    """Write the configuration as YAML."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(dump_config(config), encoding="utf-8")
