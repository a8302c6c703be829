"""What a step that was skipped had seen: small text files for inspection, `<run>/skipped/step-000123-rank0.json`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .runtime import log

MOST_FILES = 20  # in one folder; a run whose every batch is bad must not fill the disk


@dataclass(frozen=True)
class MicroBatch:
    """What one backward pass was about.

    Args:
        loss: what was back-propagated, before it is divided by the global batch's tokens or completions.
        texts: the completions, where there are any.
    """

    sample_ids: list[str]
    tasks: list[str]
    loss: float | Tensor
    texts: list[str]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(float(self.loss))

    def as_json(self) -> dict:
        loss = float(self.loss)
        shown = loss if math.isfinite(loss) else str(loss)  # JSON has no nan and inf
        content = {"loss": shown, "sample_ids": self.sample_ids, "tasks": self.tasks}
        return content | ({"texts": self.texts} if self.texts else {})


def save_skipped(
    folder: Path, step: int, rank: int, batches: Sequence[MicroBatch], not_finite: Sequence[str]
) -> Path | None:
    """Write what a rank saw in a skipped step; None where the folder is full, or the disk.

    Args:
        step: number of the step, as in metrics.jsonl.
        not_finite: names of the parameters whose gradients were not finite on this rank, in the model's order.
    """
    path = folder / f"step-{step:06d}-rank{rank}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and len(list(folder.glob("step-*.json"))) >= MOST_FILES:
            return None
        content = {
            "step": step,
            "rank": rank,
            "first_parameter": not_finite[0] if not_finite else None,
            "parameters": len(not_finite),
            "micro_batches": [batch.as_json() for batch in batches],
        }
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("the batch of skipped step %d could not be written to %s: %s", step, path, error.strerror)
        return None
    return path
