"""Several rewards made one: weights, the format gate, what is missing, what failed.

Shapes: N completions, P prompts, G completions of a prompt.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from ...datasets.scene import TASKS
from .format import format_reward
from .user import UserReward

RewardFunction = Callable[..., Sequence[float | None]]

_LATEST_ROWS = 512

logger = logging.getLogger(__name__)


class RewardFailure(ValueError):
    """A user's reward failed on too large a share of the completions."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of N completions. NaN in `combined_N` means: leave this completion out (its advantage is 0)."""

    combined_N: np.ndarray  # float64
    table: dict[str, np.ndarray]  # reward -> float64 [N], before weights and gate; NaN where it gave none
    failed: dict[str, np.ndarray]  # reward -> bool [N]
    gated_N: np.ndarray  # bool: not well formed, so that only the format reward counted
    weights: dict[str, np.ndarray]  # reward -> float64 [N]

    def paid(self, name: str) -> np.ndarray:
        """What a reward gave each completion [N] after the gate; NaN where it gave none, or the row is left out."""
        paid_N = self.table[name] if name == "format" else np.where(self.gated_N, 0.0, self.table[name])
        return np.where(np.isnan(self.combined_N) | np.isnan(self.table[name]), np.nan, paid_N)

    def part(self, rows: slice) -> "RewardResult":
        """Some of the rows."""
        return RewardResult(
            self.combined_N[rows],
            {name: values[rows] for name, values in self.table.items()},
            {name: values[rows] for name, values in self.failed.items()},
            self.gated_N[rows],
            {name: values[rows] for name, values in self.weights.items()},
        )

    def put(self, rows: slice, other: "RewardResult", others: slice) -> None:
        """Let some rows be those of another result of the same rewards."""
        self.combined_N[rows] = other.combined_N[others]
        self.gated_N[rows] = other.gated_N[others]
        for name in self.table:
            self.table[name][rows] = other.table[name][others]
            self.failed[name][rows] = other.failed[name][others]
            self.weights[name][rows] = other.weights[name][others]

    def statistics(self, group_size: int) -> dict[str, float]:
        """For the log: mean and deviation of each reward, share of flat groups, shares gated, missing and failed."""
        metrics = {"rewards/gated": float(self.gated_N.mean()) if len(self.gated_N) else 0.0}
        for name, values_N in (*self.table.items(), ("combined", self.combined_N)):
            known = values_N[~np.isnan(values_N)]
            if len(known):
                metrics[f"rewards/{name}/mean"] = float(known.mean())
                metrics[f"rewards/{name}/std"] = float(known.std())
                metrics[f"rewards/{name}/frac_zero_std"] = _flat_share(values_N.reshape(-1, group_size))
        for name, failed_N in self.failed.items():
            if failed_N.any():
                metrics[f"rewards/{name}/failed"] = float(failed_N.mean())
        return metrics


def _flat_share(values_PG: np.ndarray) -> float:
    """Share of the groups with any value that hold no two different ones."""
    rows = [row[~np.isnan(row)] for row in values_PG]
    return float(np.mean([row.max() == row.min() for row in rows if len(row)]))


class RewardSet:
    """Weighted sum of rewards.

    A reward that gives None does not apply to that row: the others take over its weight, so that a row's scale stays
    that of all weights together. Where no reward with weight applies, the combined reward is NaN.

    A row on which a user's reward FAILED is NaN altogether, since it could not be compared with its group. Above
    `max_failure_share` of the latest completions (those of the last calls that make up 512, or all where there were
    fewer, but at least `min_rows`) the run is aborted with RewardFailure. Built-in rewards and callables are trusted:
    their errors propagate.

    With `gate_by_format` a completion that is not well formed earns nothing from the other rewards, which otherwise
    pay for answers that no parser can rely on.

    `per_task` replaces single weights for the rows of a task: {"qa": {"perception": 0.0}}.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        weights: Mapping[str, float],
        *,
        gate_by_format: bool = True,
        per_task: Mapping[str, Mapping[str, float]] | None = None,
        max_failure_share: float = 0.1,
        min_rows: int = 64,
    ):
        if not functions:
            raise ValueError("Give at least one reward.")
        for name in functions:
            if name not in weights:
                raise ValueError(f"The reward {name} has no weight.")
        self.functions = dict(functions)
        self.weights = _checked_weights(weights, self.functions, "the weights")
        self.per_task: dict[str, dict[str, float]] = {}
        for task, changes in (per_task or {}).items():
            _known(task, TASKS, "task")
            changed = _checked_weights(changes, self.functions, f"the weights of {task}")
            self.per_task[task] = self.weights | changed
        if not any(any(weights.values()) for weights in (self.weights, *self.per_task.values())):
            raise ValueError("All reward weights are 0; nothing would be learned.")
        self.gate_by_format = gate_by_format
        self.max_failure_share = max_failure_share
        self.min_rows = min_rows
        # rows and failures of the latest calls
        self._latest: dict[str, deque[tuple[int, int]]] = {name: deque() for name in self.functions}

    def __call__(self, completions: list[str], **columns: Sequence[Any]) -> RewardResult:
        """Rewards of `completions`; every column has one entry per completion (see the package's docstring)."""
        for name, values in columns.items():
            if len(values) != len(completions):
                raise ValueError(f"The column {name} has {len(values)} entries for {len(completions)} completions.")
        if self.per_task and "task" not in columns:
            raise ValueError("Weights per task need the column task.")
        table, failed = {}, {}
        for name, function in self.functions.items():
            table[name], failed[name] = self._values(name, function, completions, columns)
        self._count_failures(failed)
        gated_N = np.zeros(len(completions), dtype=bool)
        if self.gate_by_format:
            known = self.functions.get("format") is format_reward
            gated_N = (table["format"] if known else np.array(format_reward(completions), dtype=np.float64)) == 0
        weights = self._weights(len(completions), columns.get("task"))
        return RewardResult(self._combine(table, failed, gated_N, weights), table, failed, gated_N, weights)

    def _weights(self, count: int, tasks: Sequence[str] | None) -> dict[str, np.ndarray]:
        """Each reward's weight for every completion [N]."""
        rows = [self.per_task.get(task, self.weights) for task in tasks] if tasks else [self.weights] * count
        return {name: np.array([weights[name] for weights in rows], dtype=np.float64) for name in self.functions}

    def _values(
        self, name: str, function: RewardFunction, completions: list[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values [N], NaN where there is none, and whether the row failed [N]."""
        values = list(function(completions, **columns))
        if len(values) != len(completions):
            raise ValueError(f"The reward {name} gave {len(values)} values for {len(completions)} completions.")
        none_N = np.array([value is None for value in values], dtype=bool)
        values_N = np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
        failed_N = ~none_N & ~np.isfinite(values_N)
        if failed_N.any() and not isinstance(function, UserReward):
            row = int(np.flatnonzero(failed_N)[0])
            raise ValueError(f"The reward {name} gave {values[row]} for completion {row}; it must be finite or None.")
        return values_N, failed_N

    def _combine(
        self,
        table: dict[str, np.ndarray],
        failed: dict[str, np.ndarray],
        gated_N: np.ndarray,
        weights: dict[str, np.ndarray],
    ) -> np.ndarray:
        total_N, applied_N, all_N = (np.zeros(len(gated_N)) for _ in range(3))
        for name, values_N in table.items():
            weights_N = weights[name]
            paid_N = values_N if name == "format" else np.where(gated_N, 0.0, values_N)
            has_N = ~np.isnan(values_N)
            total_N += np.where(has_N, weights_N * paid_N, 0.0)
            applied_N += weights_N * has_N
            all_N += weights_N
        combined_N = np.full(len(gated_N), np.nan)
        usable_N = applied_N > 0
        for name, failed_N in failed.items():
            usable_N &= ~(failed_N & (weights[name] > 0))
        combined_N[usable_N] = total_N[usable_N] * all_N[usable_N] / applied_N[usable_N]
        return combined_N

    def _count_failures(self, failed: dict[str, np.ndarray]) -> None:
        for name, failed_N in failed.items():
            latest = self._latest[name]
            latest.append((len(failed_N), int(failed_N.sum())))
            while sum(rows for rows, _ in latest) - latest[0][0] >= _LATEST_ROWS:
                latest.popleft()
            function = self.functions[name]
            if not failed_N.any() or not isinstance(function, UserReward):
                continue
            seen, count = (sum(column) for column in zip(*latest, strict=True))
            logger.warning("Reward %s failed on %d of %d: %s", name, count, seen, function.last_failure)
            if seen >= self.min_rows and count > self.max_failure_share * seen:
                raise RewardFailure(
                    f"The reward {name} failed on {count} of {seen} completions, at last: {function.last_failure}"
                )

    def close(self) -> None:
        """End the worker processes of users' rewards."""
        for function in self.functions.values():
            if isinstance(function, UserReward):
                function.close()


def _known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ValueError(f"Unknown {what} {name!r}" + (f"; did you mean {near[0]}?" if near else "."))


def _checked_weights(weights: Mapping[str, float], functions: Mapping[str, Any], where: str) -> dict[str, float]:
    for name, weight in weights.items():
        _known(name, list(functions), f"reward in {where}:")
        if not 0 <= weight < math.inf:
            raise ValueError(f"The weight of {name} must be a finite number of at least 0, not {weight}.")
    return dict(weights)
