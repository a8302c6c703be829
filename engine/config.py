"""Configurations: frozen dataclasses, filled from YAML recipes and command-line overrides.

Precedence: dataclass defaults < recipe (`base:` recipes first, in order) < `--set key.sub=value`.
An unknown key is an error that names the nearest known one. The resolved configuration is saved beside the weights.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..models.view_kinds import kinds_of
from ..utils.files import read_text
from .grpo_presets import GrpoLossConfig


def _at_least(config: Any, **bounds: int) -> None:
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {bound}.")


def _one_of(config: Any, **choices: tuple[str, ...]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose {', '.join(known[:-1])} or {known[-1]}.")


def _square(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0 or math.isqrt(value) ** 2 != value:
            raise ValueError(f"{name} is {value}; it must be a square number, such as 4, 9 or 16, or 0 for none.")


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
        _at_least(self, seed=0, steps=0, batch_size=1, micro_batch_size=0, log_every=1, save_every=1)
        _at_least(self, keep_checkpoints=0, eval_every=0)
        _one_of(self, best_mode=("max", "min"))

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
    workers: int = 0  # processes that make the detector's batches ahead of the loop; 0: the loop makes them
    multiview: str = ""  # HDF5 file of multi-view features, where the encoder takes them

    def __post_init__(self):
        _at_least(self, num_points=1, max_samples=0, workers=0)
        _one_of(self, missing=("error", "skip"))
        if not self.datasets:
            raise ValueError("datasets is empty; name one or more, for instance scene30k.")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"weights.{name} is {weight}; it must not be below 0.")


@dataclass(frozen=True)
class PointTransformerConfig:
    """Point Transformer V3 (models/point_transformer.py says what each is); the paper's sizes."""

    grid_size: float = 0.02  # metres
    orders: tuple[str, ...] = ("z", "z-trans", "hilbert", "hilbert-trans")
    shuffle_orders: bool = True
    strides: tuple[int, ...] = (2, 2, 2, 2)
    enc_depths: tuple[int, ...] = (2, 2, 2, 6, 2)
    enc_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    enc_heads: tuple[int, ...] = (2, 4, 8, 16, 32)
    dec_depths: tuple[int, ...] = (2, 2, 2, 2)
    dec_channels: tuple[int, ...] = (64, 64, 128, 256)
    dec_heads: tuple[int, ...] = (4, 4, 8, 16)
    patch_size: int = 1024
    mlp_ratio: float = 4.0
    drop_path: float = 0.3
    stem_kernel: int = 5


@dataclass(frozen=True)
class EncoderConfig:
    """Scene encoder (models/scene_encoder)."""

    num_tokens: int = 2048
    radius: float = 0.2
    num_neighbors: int = 64
    width: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 8
    num_heads: int = 4
    num_queries: int = 256
    dropout: float = 0.1
    use_color: bool = True
    use_height: bool = True
    use_normal: bool = False  # unit normals of the points
    multiview_dim: int = 0  # channels of multi-view features (data.multiview); 0 for none
    pretrained: str = ""  # folder written by `detect`; "" starts from random weights
    backbone: str = "pointnet2"  # what the tokens pool: pointnet2 (raw points) or ptv3 (learned features)
    ptv3: PointTransformerConfig = field(default_factory=PointTransformerConfig)  # read where that is the backbone

    def __post_init__(self):
        _one_of(self, backbone=("pointnet2", "ptv3"))
        _at_least(self, multiview_dim=0)


@dataclass(frozen=True)
class ViewsConfig:
    """Dynamic view selection (models/view_selector.py)."""

    source: str = "mixed"  # posed, rendered, mixed, none, or kinds joined by + (docs/views.md)
    num_candidates: int = 16
    num_views: int = 6
    image_size: int = 336  # pixels, square
    encoder: str = "google/siglip2-large-patch16-384"
    w_text: float = 0.3
    w_image: float = 0.5
    w_clip: float = 0.5
    # tokens of each chosen view beside the vision tower's, a square number; 0: none
    image_encoder_tokens: int = 0  # patches of a frozen image encoder
    token_encoder: str = ""  # that encoder; "" takes `encoder`
    depth_tokens: int = 0  # the depth map; model.depth says whose
    num_references: int = 3  # views of highest text score that the image score compares with
    standardize: bool = False  # weigh the three scores as standard deviations over the pool, not as cosines
    redundancy: float = 2.5  # 0: plain top-k; how much a view loses that shows only what the chosen ones show
    weights: str = "fixed"  # learned: w_text and w_image start as above and learn from the language model's loss
    # of learned weights:
    temperature: float = 0.5  # of the relaxed choice, in standard deviations of a pool's utilities
    pull: float = 0.1  # weight in the loss of (w_text - 0.3)^2
    lr_factor: float = 10.0  # on optim.lr

    def __post_init__(self):
        kinds_of(self.source)
        _one_of(self, weights=("fixed", "learned"))
        _at_least(self, num_candidates=1, num_views=1, num_references=1, image_size=1)
        _at_least(self, redundancy=0, pull=0, lr_factor=0)
        _square(self, "image_encoder_tokens", "depth_tokens")
        if self.source == "none" and (self.image_encoder_tokens or self.depth_tokens):
            raise ValueError("source is 'none', but views are to have tokens; set both numbers of tokens to 0.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.weights == "learned" and self.source == "none":
            raise ValueError("weights is 'learned', but source is 'none'; without views there is nothing to learn.")


@dataclass(frozen=True)
class DepthConfig:
    """Depth of the views (models/depth_encoder.py), read where model.views.depth_tokens is above 0."""

    encoder: str = ""  # Depth-Anything-V2 for frames without a sensor's depth; "" renders the scan's for these


@dataclass(frozen=True)
class LanguageConfig:
    """Language model and what it sees of the scene."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dtype: str = "bfloat16"
    attention: str = "packed"  # models/attention.py; or transformers' own: sdpa, eager
    train: str = "lora"  # lora; full; none: it stays as it is
    # full fine-tuning by several processes (docs/multi_node.md): none: each has all; full: cut; auto: full on GPUs
    sharding: str = "auto"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_last_blocks: int = 0  # adapt only the last n blocks; 0 adapts all
    num_proposals: int = 64  # 0: no object has a token or a name; views are chosen by the detections all the same
    num_layout_tokens: int = 32
    name_pool: int = 0  # sft draws the names of a sample's proposals out of so many; 0: they are called in order
    name_in_token: bool = False  # the language model's own embedding of its name is part of a proposal's token
    object_token: bool = True  # an object that a caption is asked for has a token of its own, beside its name or box
    object_color: bool = (
        True  # an object's token tells the colours of its points, which the encoder's feature need not
    )
    gradient_checkpointing: bool = False

    def __post_init__(self):
        _one_of(self, dtype=("bfloat16", "float16", "float32"), train=("lora", "full", "none"))
        _one_of(self, sharding=("auto", "none", "full"))
        if self.sharding == "full" and self.train != "full":
            raise ValueError("sharding is 'full', but train is not; adapters are small: leave sharding at auto.")
        _at_least(self, lora_rank=1, lora_alpha=1, lora_last_blocks=0, num_proposals=0, num_layout_tokens=0)
        if self.name_pool and not 0 < self.num_proposals <= self.name_pool:
            raise ValueError(
                f"name_pool is {self.name_pool}; it must be 0, or num_proposals ({self.num_proposals}) or more."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The assembled model."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    # what learns besides model.language.train and model.views.weights
    train_connector: bool = True
    train_scene_encoder: bool = False
    train_vision_tower: bool | None = None  # null: where the language model is trained in full


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
        _one_of(self, precision=("float32", "bfloat16"))
        _at_least(self, queries_per_object=1)
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
    token_budget: int = 8192  # tokens of samples packed into one forward pass
    blocks: str = "auto"  # plain; compiled; fused: LoRA in fewer products. auto: plain on a CPU or cut, else fastest
    eval_datasets: tuple[str, ...] = ()  # that are evaluated on; () takes those that have held-out samples
    eval_samples: int = 256  # of data.eval_split at most, every data set alike, where run.eval_every is above 0
    eval_answers: int = 0  # of them at most are answered as well, and scored as `eval` does; 0: none
    eval_new_tokens: int = 256  # of such an answer at most
    eval_modes: dict[str, str] = field(default_factory=dict)  # task: think or direct; one left out takes its default

    def __post_init__(self):
        _one_of(self, pointers=("name", "box"), blocks=("auto", "plain", "compiled", "fused"))
        _at_least(self, token_budget=1, eval_samples=1, eval_answers=0, eval_new_tokens=1)
        if "loss" in self.run.best_metric and self.run.best_mode == "max":
            raise ValueError(f"run.best_metric is {self.run.best_metric}, best where low; set run.best_mode=min.")


@dataclass(frozen=True)
class RewardConfig:
    """Rewards and how they combine (engine/rewards)."""

    names: tuple[str, ...] = ("format", "perception", "semantic")  # or module:function
    weights: tuple[float, ...] = (0.3, 0.4, 0.3)
    gate_by_format: bool = True
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)  # weights changed for a task's rows
    semantic_encoder: str = "openai/clip-vit-large-patch14"
    box_shape: str = "iou"  # of the perception reward; giou still tells near from far where nothing overlaps
    length_slack: int | None = 20  # words above which long answers earn less (semantic.py); null: the plain cosine
    # users' rewards
    timeout_s: float = 30.0
    workers: int = 2
    max_failure_share: float = 0.1  # of the recent completions; above it the run ends

    def __post_init__(self):
        _one_of(self, box_shape=("iou", "giou"))
        _at_least(self, workers=1)
        if self.length_slack is not None:
            _at_least(self, length_slack=0)
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
        _at_least(self, max_new_tokens=1, batch_size=1, resample_rounds=0, max_prompt_tokens=0)
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
        _one_of(self, blocks=("auto", "plain", "fused"))
        _at_least(self, updates_per_rollout=1, token_budget=1, lora_rank=1, lora_alpha=1, eval_samples=1)
        _one_rate(self)


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
        _at_least(self, max_new_tokens=1, dense_caption_proposals=1, token_budget=1, block_size=1)


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
    values: dict[str, Any] = _read_recipe(Path(path)) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"Override {override!r} is not of the form key.sub=value.")
        _set_dotted(values, key.strip(), _parse_yaml(text, f"--set {override}"))
    return from_dict(CONFIGS[kind], values)


def from_dict(cls: type, values: dict[str, Any], prefix: str = "", base: Any = None) -> Any:
    """Build a configuration dataclass from nested dictionaries, checking names and types.

    Keys left out keep the value of `base`, by default `cls()`: a command's own defaults, such as GRPO's schedule,
    outlive a recipe that sets their neighbours.
    """
    if not isinstance(values, dict):
        raise ValueError(f"Config key {prefix.rstrip('.') or 'top level'} takes a mapping, not {values!r}.")
    base = cls() if base is None else base
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown_key(prefix, str(key), cls))
        arguments[key] = _convert(hints[key], value, prefix + key, getattr(base, key))
    try:
        return dataclasses.replace(base, **arguments)
    except ValueError as error:
        raise ValueError(f"Config key {prefix}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a configuration, ready for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def dump_config(config: Any) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def save_config(config: Any, path: str | Path) -> None:
    """Write the configuration as YAML."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(dump_config(config), encoding="utf-8")


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Keys of a recipe over those of its bases; `above` are the recipes that led to it."""
    if path.resolve() in above:
        raise ValueError(f"Recipe {path} is its own base; take one `base:` line out.")
    text = read_text(path, f"There is no recipe at {path}; the ones we ship are under script/recipes/.")
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {path} is not a mapping; write `key: value` lines, as those in script/recipes/.")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"Recipe {path}: `base` takes the path of another recipe, or a list of paths, not {bases!r}.")
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(merged, _read_recipe(path.parent / base, (*above, path.resolve())))
    _merge(merged, values)
    return merged


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable characters"
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source} is not valid YAML: {problem}{where}; mend it and try again.") from None


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), bool):
            target[key] = {"enabled": target[key]}
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            _set_or_switch(target, key, value)


_SWITCHED = ("augment",)  # groups that `true` or `false` switch


def _set_or_switch(target: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; `true` or `false` for a group with a switch keep the group's other keys."""
    if isinstance(value, bool) and key in _SWITCHED and isinstance(target.get(key), dict):
        value = {**target[key], "enabled": value}
    target[key] = value


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if parent in _SWITCHED and isinstance(values.get(parent), bool):
            values[parent] = {"enabled": values[parent]}
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"Config key {key}: {parent} is not a group of keys.")
    _set_or_switch(values, last, value)


def _unknown_key(prefix: str, key: str, cls: type) -> str:
    """The sentence for an unknown key: a key of that very name further down, else the nearest one here."""
    known = list(typing.get_type_hints(cls))
    deeper = [path for path in _paths(cls, prefix) if path.split(".")[-1] == key]
    nearest = deeper or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}."
    return f"Unknown config key {prefix + key!r}; {hint}"


def _paths(cls: type, prefix: str) -> list[str]:
    """Dotted names of all keys below a configuration class."""
    paths = []
    for name, kind in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            paths += _paths(typing.cast(type, kind), f"{prefix}{name}.")
    return paths


def _convert(kind: Any, value: Any, key: str, base: Any = None) -> Any:
    if dataclasses.is_dataclass(kind):
        values: Any = value
        if isinstance(value, bool) and "enabled" in typing.get_type_hints(kind):
            values = {"enabled": value}
        return from_dict(typing.cast(type, kind), values, key + ".", base)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"Config key {key} takes a list, not {value!r}.")
        item = typing.get_args(kind)[0]
        return tuple(_convert(item, entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"Config key {key} takes a mapping, not {value!r}.")
        return {str(name): _convert(typing.get_args(kind)[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(part for part in typing.get_args(kind) if part is not type(None)), value, key)
    # what a Literal allows is checked by the class that has the field
    return _convert_scalar(str if origin is typing.Literal else kind, value, key)


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-6 as a string
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"Config key {key} takes a number, not {value!r}.")
        return number
    if kind is str and value is None:
        return ""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"Config key {key} takes {kind.__name__}, not {value!r}.")
    return value
