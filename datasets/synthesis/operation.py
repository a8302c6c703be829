"""How a run of the engine is operated: pace, budget, progress bar, and an estimate without asking."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..scene_store import SceneInfo
from .asking import check_of
from .batches import BATCH_SIZE, MOST_BATCH_SIZE, POLL_SECONDS, SHORTEST_POLL
from .budget import Budget
from .filters import FilterOptions
from .journal import Journal, request_key
from .limits import Estimator, Usage
from .outcomes import FAILED, Tally
from .prices import Price
from .sources import Question
from .teacher import Request

WORKERS = 64
SHOWN_EVERY = 0.25  # seconds between two looks at the counts


@dataclass(frozen=True)
class Operation:
    """Pace, budget and prices of a run; 0 means no limit, None a price of the table.

    Args:
        requests_per_minute, tokens_per_minute: what the teacher's account allows.
        max_cost, max_tokens: caps on all that the output file costs, in dollars and in tokens.
        input_price, output_price: dollars for a million tokens.
        timeout: seconds that one reply may take.
        dry_run: estimate and ask nothing.
        batch: ask through the provider's batch interface.
        batch_size: requests in a batch at most.
        poll_interval: seconds between two looks at a batch.
        cancel_batches: end the batches under way, keep what is answered, and ask nothing.

    Raises:
        ValueError: a batch size or an interval that cannot be.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_cost: float = 0.0
    max_tokens: int = 0
    input_price: float | None = None
    output_price: float | None = None
    timeout: float = 300.0
    dry_run: bool = False
    batch: bool = False
    batch_size: int = BATCH_SIZE
    poll_interval: float = POLL_SECONDS
    cancel_batches: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= MOST_BATCH_SIZE:
            raise ValueError(f"A batch takes 1 to {MOST_BATCH_SIZE} requests, not {self.batch_size}.")
        if self.poll_interval < SHORTEST_POLL:
            raise ValueError(f"Batches are looked at every {SHORTEST_POLL:g} seconds at most; raise --poll-interval.")

    @property
    def uses_batches(self) -> bool:
        """Whether the provider's batch interface is needed."""
        return self.batch or self.cancel_batches


class Progress:
    """A bar with the time left, the share kept, the cost so far and the commonest reasons to reject."""

    def __init__(self, total: int, budget: Budget):
        self._bar = tqdm(total=total, desc="synthesize", unit="question", dynamic_ncols=True)
        self._budget, self._next = budget, 0.0

    def update(self, tally: Tally) -> None:
        """One more question is done."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SHOWN_EVERY
            self._bar.set_postfix_str(summary(tally, self._budget), refresh=False)
        self._bar.update()

    def close(self, tally: Tally) -> None:
        """Show the last counts."""
        self._bar.set_postfix_str(summary(tally, self._budget))
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def summary(tally: Tally, budget: Budget) -> str:
    """Such as "kept 61%, $1.23, few_steps 12, format 3"."""
    parts = [f"kept {tally.kept / tally.judged:.0%}"] if tally.judged else []
    tokens = budget.input_tokens + budget.output_tokens
    if tokens:
        parts.append(f"${budget.spent:,.2f}" if budget.price else f"{tokens:,} tokens")
    parts += [f"{reason} {count}" for reason, count in tally.reasons.most_common(3)]
    return ", ".join(parts)


def make_report(
    tally: Tally, budget: Budget, *, questions: int, left_out: dict[str, int], settings: dict[str, Any]
) -> dict[str, Any]:
    """Counts of a run: what was asked, kept, rejected and why, and what it took (earlier runs included)."""
    rejected = dict(sorted((+tally.reasons).items()))
    failed = rejected.pop(FAILED, 0)
    return {
        "settings": settings,
        "questions": questions,
        "left_out": dict(sorted(left_out.items())),
        "kept": tally.kept,
        "kept_by_source": dict(sorted((+tally.kept_by_source).items())),
        "rejected": rejected,
        "failed": failed,
        "unasked": questions - tally.judged,
        "requests": tally.requests,
        "input_tokens": tally.input_tokens,
        "output_tokens": tally.output_tokens,
        "cost": round(budget.spent, 6) if budget.price else None,
        "price": price_fields(budget.price),
    }


def price_fields(price: Price | None) -> dict[str, Any] | None:
    """A price as it is reported: dollars for a million tokens, the share of them that batches cost, and its source."""
    if price is None:
        return None
    return {"input": price.input, "output": price.output, "batch_share": price.batch_share, "source": price.source}


def estimate_run(
    questions: Sequence[Question],
    ask_about: Callable[[Question], Request],
    journal_path: Path,
    *,
    index: Mapping[str, SceneInfo],
    identity: str,
    price: Price | None,
    options: FilterOptions,
    operation: Operation,
) -> dict[str, Any]:
    """What a run would ask, without asking: requests at most, tokens, dollars, and minutes at the rate limits.

    Replies that earlier runs received are not counted again, and teach how long replies are. A check is counted for
    every question that has no reply yet, as if its first reply were to pass the filters. Requests in batches that are
    under way are counted as if they were still to be asked.
    """
    estimator = Estimator()
    requests, characters = {False: 0, True: 0}, {False: 0, True: 0}
    with Journal(journal_path, read_only=True) as journal:
        for question in questions:
            first = ask_about(question)
            reply = journal.get(request_key(identity, first))
            if reply is None:
                requests[False] += 1
                characters[False] += len(first.prompt)
            else:
                estimator.learn(first, reply)
            check = check_of(question, reply, index[question.scene_id], options)
            again = journal.get(request_key(identity, check)) if check is not None and reply is not None else None
            if check is not None and again is not None:
                estimator.learn(check, again)
            elif check is not None:
                requests[True] += 1
                characters[True] += len(check.prompt)
        received = len(journal)
    usages = [estimator.estimate_many(requests[kind], characters[kind], checking=kind) for kind in (False, True)]
    # the thoughts that checks repeat are as long as the replies they come from
    thoughts = usages[0].output_tokens
    expected = Usage(
        usages[0].input_tokens + usages[1].input_tokens + thoughts, usages[0].output_tokens + usages[1].output_tokens
    )
    total = sum(requests.values())
    minutes = [total / operation.requests_per_minute] if operation.requests_per_minute and not operation.batch else []
    if operation.tokens_per_minute and not operation.batch:
        minutes.append(expected.total / operation.tokens_per_minute)
    cost = price.cost(expected.input_tokens, expected.output_tokens, batched=operation.batch) if price else None
    return {
        "questions": len(questions),
        "received": received,
        "requests": total,
        "input_tokens": round(expected.input_tokens),
        "output_tokens": round(expected.output_tokens),
        "cost": round(cost, 2) if cost is not None else None,
        "price": price_fields(price),
        "minutes_at_limits": round(max(minutes), 1) if minutes else None,
    }
