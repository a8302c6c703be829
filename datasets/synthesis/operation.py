"""How a run of the engine is operated: pace, budget, progress bar, and an estimate without asking."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...utils.text import parse_response
from .budget import Budget
from .filters import FilterOptions, check_response
from .journal import Journal, request_key
from .limits import Estimator, Usage
from .outcomes import FAILED, Tally
from .prices import Price
from .prompts import check_prompt
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
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_cost: float = 0.0
    max_tokens: int = 0
    input_price: float | None = None
    output_price: float | None = None
    timeout: float = 300.0
    dry_run: bool = False


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
    """A price as it is reported: dollars for a million tokens, and its source."""
    return None if price is None else {"input": price.input, "output": price.output, "source": price.source}


def estimate_run(
    questions: Sequence[Question],
    ask_about: Callable[[Question], Request],
    journal_path: Path,
    *,
    identity: str,
    price: Price | None,
    options: FilterOptions,
    operation: Operation,
) -> dict[str, Any]:
    """What a run would ask, without asking: requests at most, tokens, dollars, and minutes at the rate limits.

    Replies that earlier runs received are not counted again, and teach how long replies are. A check is counted for
    every question that has no reply yet, as if its first reply were to pass the filters.
    """
    estimator = Estimator()
    requests, characters = {False: 0, True: 0}, {False: 0, True: 0}
    with Journal(journal_path, read_only=True) as journal:
        for question in questions:
            first = ask_about(question)
            reply = journal.get(request_key(identity, first))
            think = ""
            if reply is None:
                requests[False] += 1
                characters[False] += len(first.prompt)
            else:
                estimator.learn(first, reply)
                if reply.reason or check_response(reply.text, question, options):
                    continue
                think = parse_response(reply.text).think
                check = Request(question, check_prompt(question, think), think)
                again = journal.get(request_key(identity, check))
                if again is not None:
                    estimator.learn(check, again)
                    continue
            if not options.applies("inconsistent"):
                continue
            requests[True] += 1
            characters[True] += len(check_prompt(question, think))
        received = len(journal)
    usages = [estimator.estimate_many(requests[kind], characters[kind], checking=kind) for kind in (False, True)]
    # the thoughts that checks repeat are as long as the replies they come from
    thoughts = usages[0].output_tokens
    expected = Usage(
        usages[0].input_tokens + usages[1].input_tokens + thoughts, usages[0].output_tokens + usages[1].output_tokens
    )
    total = sum(requests.values())
    minutes = [total / operation.requests_per_minute] if operation.requests_per_minute else []
    minutes += [expected.total / operation.tokens_per_minute] if operation.tokens_per_minute else []
    return {
        "questions": len(questions),
        "received": received,
        "requests": total,
        "input_tokens": round(expected.input_tokens),
        "output_tokens": round(expected.output_tokens),
        "cost": round(price.cost(expected.input_tokens, expected.output_tokens), 2) if price else None,
        "price": price_fields(price),
        "minutes_at_limits": round(max(minutes), 1) if minutes else None,
    }
