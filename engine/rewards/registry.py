"""From names in a configuration to a `RewardSet`."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType

import torch

from ...models.image_encoder import load_text_encoder
from ..config import RewardConfig
from .format import format_reward
from .perception import BoxShape, PerceptionReward
from .reward_set import RewardFunction, RewardSet
from .semantic import SemanticReward, TextEncoder
from .task_score import task_reward
from .user import UserReward

PAPER_WEIGHTS: Mapping[str, float] = MappingProxyType({"format": 0.3, "perception": 0.4, "semantic": 0.3})


def build_configured_rewards(config: RewardConfig, device: torch.device | str = "cpu") -> RewardSet:
    """The rewards of a configuration, with the text encoder, where one is needed, on `device`."""
    encoder = load_text_encoder(config.semantic_encoder).to(device) if "semantic" in config.names else None
    return build_rewards(
        config.names,
        config.weights,
        encoder=encoder,
        gate_by_format=config.gate_by_format,
        per_task=config.per_task,
        box_shape=config.box_shape,  # type: ignore[arg-type]  # the configuration has checked it
        length_slack=config.length_slack,
        timeout_s=config.timeout_s,
        num_workers=config.workers,
        max_failure_share=config.max_failure_share,
    )


def build_rewards(
    names: Sequence[str] = tuple(PAPER_WEIGHTS),
    weights: Sequence[float] | None = None,
    *,
    encoder: TextEncoder | None = None,
    gate_by_format: bool = True,
    per_task: Mapping[str, Mapping[str, float]] | None = None,
    box_shape: BoxShape = "iou",
    length_slack: int | None = 20,
    timeout_s: float = 30.0,
    num_workers: int = 2,
    max_failure_share: float = 0.1,
) -> RewardSet:
    """The named rewards: format, perception, semantic (which needs `encoder`), task (the evaluation's score of the
    task) or a user's `module:function`.

    `weights` go with `names`; without them the built-in ones have the paper preset's. `timeout_s` and `num_workers`
    are those of `UserReward`, `box_shape` and `length_slack` those of the perception and semantic rewards. Close the
    set when training ends. ValueError names what is unknown, repeated or missing.
    """
    if weights is None:
        missing = [name for name in names if name not in PAPER_WEIGHTS]
        if missing:
            raise ValueError(f"Give weights for all rewards; {missing[0]} has no default.")
        weights = [PAPER_WEIGHTS[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"There are {len(names)} rewards but {len(weights)} weights.")
    if len(set(names)) != len(names):
        raise ValueError(f"A reward is named twice: {', '.join(names)}.")
    functions: dict[str, RewardFunction] = {}
    for name in names:
        if name == "format":
            functions[name] = format_reward
        elif name == "perception":
            functions[name] = PerceptionReward(box_shape)
        elif name == "semantic":
            if encoder is None:
                raise ValueError("The semantic reward needs a text encoder; name one in reward.semantic_encoder.")
            functions[name] = SemanticReward(encoder, length_slack)
        elif name == "task":
            functions[name] = task_reward
        elif ":" in name:
            functions[name] = UserReward(name, timeout_s, num_workers)
        else:
            near = get_close_matches(name, (*PAPER_WEIGHTS, "task"), n=1)
            hint = (
                f"did you mean {near[0]}?" if near else "choose format, perception, semantic, task or module:function."
            )
            raise ValueError(f"Unknown reward {name!r}; {hint}")
    return RewardSet(
        functions,
        dict(zip(names, weights, strict=True)),
        gate_by_format=gate_by_format,
        per_task=per_task,
        max_failure_share=max_failure_share,
    )
