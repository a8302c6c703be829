"""Rewards of GRPO: format, perception, semantic similarity, the score of the task, users' own by `module:function`.

A reward is a callable in the field's usual form, `f(completions, **columns) -> list[float | None]`: the texts the
model wrote, and the samples' columns, one entry per completion. None means that the reward does not apply to a row.
The columns that the trainer passes:

    task          list[str]            one of datasets.scene.TASKS
    question      list[str]
    references    list[list[str]]      reference answers
    target_boxes  list[array [K, 7]]   boxes the answer should point at, metres, MODEL frame; [0, 7] where none
    proposals     list[array [K, 7]]   detected boxes that `<obj12>` names, metres, MODEL frame

The paper's reward is .3 format + .4 perception + .3 semantic (the weights are our filling: it does not state them).
"""

from .format import format_reward
from .perception import PerceptionReward, box_set_score
from .registry import PAPER_WEIGHTS, build_configured_rewards, build_rewards
from .reward_set import RewardFailure, RewardResult, RewardSet
from .semantic import SemanticReward, TextEncoder
from .task_score import task_reward
from .user import UserReward

__all__ = [
    "PAPER_WEIGHTS",
    "PerceptionReward",
    "RewardFailure",
    "RewardResult",
    "RewardSet",
    "SemanticReward",
    "TextEncoder",
    "UserReward",
    "box_set_score",
    "build_configured_rewards",
    "build_rewards",
    "format_reward",
    "task_reward",
]
