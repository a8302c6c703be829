"""Configurations: frozen dataclasses, filled from YAML recipes and command-line overrides.

Precedence: dataclass defaults < recipe (`base:` recipes first, in order) < `--set key.sub=value`.
An unknown key is an error that names the nearest known one. The resolved configuration is saved beside the weights.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunConfig:
    """One run: where it writes, how long it goes, how it is repeated."""

    dir: str = "runs/run"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8  # samples per optimiser step and rank
    micro_batch_size: int = 0  # samples per forward pass; 0 takes the whole batch at once
    log_every: int = 10
    save_every: int = 200
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only at the end
    device: str = "auto"  # auto, cpu, cuda
    trackers: tuple[str, ...] = ()  # besides metrics.jsonl: tensorboard


@dataclass(frozen=True)
class DataConfig:
    """Prepared scenes and annotations under one root (data/README.md)."""

    root: str = "data/rooms"
    datasets: tuple[str, ...] = ("scene30k",)
    train_split: str = "train"
    eval_split: str = "val"
    num_points: int = 40_000
    max_samples: int = 0  # per data set, chosen by seed; 0 takes all


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
    pretrained: str = ""  # folder written by `detect`; "" starts from random weights


@dataclass(frozen=True)
class ViewsConfig:
    """Dynamic view selection (models/view_selector.py)."""

    source: str = "mixed"  # posed, rendered, mixed, none
    num_candidates: int = 16
    num_views: int = 6
    image_size: int = 336  # pixels, square
    encoder: str = "google/siglip2-large-patch16-384"
    w_text: float = 0.3
    w_image: float = 0.5
    w_clip: float = 0.5


@dataclass(frozen=True)
class LanguageConfig:
    """Language model and what it sees of the scene."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    train: str = "lora"  # lora, or full for small models with random weights
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_last_blocks: int = 0  # adapt only the last n blocks; 0 adapts all
    num_proposals: int = 64
    num_layout_tokens: int = 32
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The assembled model."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    train_scene_encoder: bool = False


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


@dataclass(frozen=True)
class DetectConfig:
    """`python main.py detect`: pre-training of the scene encoder."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=7e-4))
    augment: bool = True


@dataclass(frozen=True)
class SftConfig:
    """`python main.py sft`: supervised fine-tuning (cold start on Scene-30K, then the task mix)."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: str = ""  # model folder to start from; "" builds the model from `model`
    pointers: str = "name"  # name: boxes covered by a proposal are taught as <obj12>; box: always as numbers


@dataclass(frozen=True)
class RewardConfig:
    """Rewards and how they combine (engine/rewards)."""

    names: tuple[str, ...] = ("format", "perception", "semantic")  # or module:function
    weights: tuple[float, ...] = (0.3, 0.4, 0.3)
    gate_by_format: bool = True
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)  # weights changed for a task's rows
    semantic_encoder: str = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class LossConfig:
    """GRPO loss; the fields are those of engine.grpo_loss.GrpoLossConfig, which explains them."""

    loss_type: str = "grpo"  # grpo, dr_grpo, dapo, bnpo, cispo, gspo
    ratio_level: str = "token"  # token, sequence, response (the paper's)
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    beta: float = 0.02
    kl: str = "k3"
    kl_ratio: bool = False
    scale: str = "group"  # group, batch, none


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    group_size: int = 8
    max_new_tokens: int = 300
    temperature: float = 1.0
    batch_size: int = 64  # completions decoded together


@dataclass(frozen=True)
class GrpoConfig:
    """`python main.py grpo`: reinforcement learning from an SFT model. `run.batch_size` counts prompts."""

    init: str = ""  # model folder written by `sft`: the start and the frozen KL reference
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, schedule="constant", weight_decay=0.0))
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    updates_per_rollout: int = 1
    lora_rank: int = 16  # of the policy adapter, where the SFT model has none
    lora_alpha: int = 32


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
    scorers: dict[str, str] = field(default_factory=dict)  # task: scorer; a task left out takes its default
    meteor: str = "auto"  # auto: where Java is there; yes; no (it takes seconds to start)
    dense_caption_proposals: int = 64  # proposals captioned in one scene, by objectness


CONFIGS: dict[str, type] = {"detect": DetectConfig, "sft": SftConfig, "grpo": GrpoConfig, "eval": EvalConfig}


def load_config(kind: str, path: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """Resolve the configuration of one command.

    Args:
        kind: one of CONFIGS.
        path: YAML recipe; None takes the defaults.
        overrides: `key.sub=value` strings, the value in YAML syntax.

    Raises:
        ValueError: unknown key (the nearest is named), wrong type, unreadable recipe.
    """
    values: dict[str, Any] = _read_recipe(Path(path)) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"Override {override!r} is not of the form key.sub=value.")
        _set_dotted(values, key.strip(), _parse_yaml(text, f"--set {override}"))
    return from_dict(CONFIGS[kind], values)


def from_dict(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a configuration dataclass from nested dictionaries, checking names and types."""
    if not isinstance(values, dict):
        raise ValueError(f"Config key {prefix.rstrip('.') or 'top level'} takes a mapping, not {values!r}.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown_key(prefix + str(key), str(key), list(hints)))
        arguments[key] = _convert(hints[key], value, prefix + key)
    return cls(**arguments)


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


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"There is no recipe at {path}; the ones we ship are under script/recipes/.") from None
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {path} is not a mapping of keys to values.")
    bases = values.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read_recipe(path.parent / base))
    _merge(merged, values)
    return merged


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {str(error).splitlines()[0]}.") from None


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"Config key {key}: {parent} is not a group of keys.")
    values[last] = value


def _unknown_key(full: str, key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}."
    return f"Unknown config key {full!r}; {hint}"


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, key + ".")
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
    return _convert_scalar(kind, value, key)


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-6 as a string
        except ValueError:
            raise ValueError(f"Config key {key} takes a number, not {value!r}.") from None
    if kind is str and value is None:
        return ""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"Config key {key} takes {kind.__name__}, not {value!r}.")
    return value
