"""What a run may cost, in dollars and in tokens: reserved before a request is sent, corrected when it is answered."""

import asyncio

from .limits import Usage
from .prices import Price


class BudgetSpent(Exception):
    """The next request may exceed the budget."""


class Budget:
    """Caps on everything that an output file costs, earlier runs included.

    A request is only sent where what is spent, what is reserved for requests in flight and its own estimate stay
    within the caps; near them it waits until those in flight have shown what they cost.

    Args:
        price: of the teacher; None where it is not known.
        max_cost: dollars, 0 for no cap.
        max_tokens: tokens of prompts and replies, 0 for no cap.
        batched: requests go through the provider's batch interface, so that its price is reserved for them.

    Raises:
        ValueError: a negative cap, or a cap in dollars without a price.
    """

    def __init__(
        self, price: Price | None = None, *, max_cost: float = 0.0, max_tokens: int = 0, batched: bool = False
    ):
        if min(max_cost, max_tokens) < 0:
            raise ValueError("A budget cannot be negative; 0 means no cap.")
        self.price, self.max_cost, self.max_tokens = price, max_cost, max_tokens
        self.input_tokens = self.output_tokens = 0
        self._batched = batched
        self._spent = 0.0
        self._reserved_tokens = self._reserved_cost = 0.0
        self._in_flight = 0
        self._changed = asyncio.Event()

    def cost(self, usage: Usage) -> float:
        """Dollars that a request of this run will take; 0 where there is no price."""
        if self.price is None:
            return 0.0
        return self.price.cost(usage.input_tokens, usage.output_tokens, batched=self._batched)

    @property
    def spent(self) -> float:
        """Dollars so far; 0 where there is no price."""
        return self._spent

    def add(self, input_tokens: int, output_tokens: int, *, batched: bool = False) -> None:
        """Count what was used."""
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        if self.price is not None:
            self._spent += self.price.cost(input_tokens, output_tokens, batched=batched)

    def fits(self, estimate: Usage) -> bool:
        """Whether a request may be sent now; nothing is reserved."""
        tokens = self.input_tokens + self.output_tokens + self._reserved_tokens + estimate.total
        cost = self.spent + self._reserved_cost + self.cost(estimate)
        return (not self.max_tokens or tokens <= self.max_tokens) and (not self.max_cost or cost <= self.max_cost)

    async def reserve(self, estimate: Usage) -> None:
        """Reserve what a request may take.

        Raises:
            BudgetSpent: it does not fit, and nothing in flight can make room.
        """
        while not self.fits(estimate):
            if not self._in_flight:
                raise BudgetSpent
            self._changed.clear()
            await self._changed.wait()
        self.commit(estimate)

    def commit(self, estimate: Usage) -> None:
        """Reserve what a request takes whether it fits or not: it is under way."""
        self._in_flight += 1
        self._reserved_tokens += estimate.total
        self._reserved_cost += self.cost(estimate)

    def release(self, estimate: Usage) -> None:
        """Take a reservation back; what was really used is added on its own."""
        self._in_flight -= 1
        self._reserved_tokens -= estimate.total
        self._reserved_cost -= self.cost(estimate)
        if not self._in_flight:
            self._reserved_tokens = self._reserved_cost = 0.0  # without rounding errors
        self._changed.set()

    def describe(self) -> str:
        """The caps, such as "$5.00 and 1,000,000 tokens"."""
        caps = [f"${self.max_cost:,.2f}"] if self.max_cost else []
        caps += [f"{self.max_tokens:,} tokens"] if self.max_tokens else []
        return " and ".join(caps)


def build_budget(
    price: Price | None, model: str, *, max_cost: float = 0.0, max_tokens: int = 0, batched: bool = False
) -> Budget:
    """A budget; ValueError for a cap in dollars on a model whose price is not known."""
    if max_cost and price is None:
        raise ValueError(
            f"There is no price for the model {model!r}, so that --max-cost cannot be kept; give --input-price and "
            "--output-price in dollars for a million tokens, or cap --max-tokens instead."
        )
    return Budget(price, max_cost=max_cost, max_tokens=max_tokens, batched=batched)
