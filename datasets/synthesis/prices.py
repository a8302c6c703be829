"""What teachers cost: a table of list prices, and the price of a run.

Prices change; `synthesize --input-price … --output-price …` takes the place of the table.
"""

from dataclasses import dataclass

# Dollars for a million tokens of prompt and of reply, hidden thought included, for prompts of up to 200,000 tokens.
# As published at SOURCES on the dates given there.
_TABLE = {
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
}
SOURCES = {
    "gemini": "ai.google.dev/gemini-api/docs/pricing, March 2026",
    "gpt": "platform.openai.com/docs/pricing, April 2025",
}
# Of both makers: ai.google.dev/gemini-api/docs/batch-api ("50% of the standard cost") and OpenAI's Batch API FAQ
# (help.openai.com, article 9197833: half the price of the synchronous interface), both for prompt and reply.
BATCH_SHARE = 0.5


@dataclass(frozen=True)
class Price:
    """Dollars for a million tokens, and where the numbers come from.

    `batch_share` is the part of them that the provider's batch interface costs.
    """

    input: float
    output: float
    source: str
    batch_share: float = 1.0

    def cost(self, input_tokens: float, output_tokens: float, *, batched: bool = False) -> float:
        """Dollars."""
        share = self.batch_share if batched else 1.0
        return share * (input_tokens * self.input + output_tokens * self.output) / 1e6


FREE = Price(0.0, 0.0, "needs no paid server")


def find_price(model: str, input_price: float | None = None, output_price: float | None = None) -> Price | None:
    """The price of a model: what the user says, else the table's; None where neither knows it.

    The user's own price holds for batches as it is.

    Raises:
        ValueError: only one of the two prices is given, or one is negative.
    """
    if (input_price is None) != (output_price is None):
        raise ValueError("A price has two parts; give both --input-price and --output-price.")
    if input_price is not None and output_price is not None:
        if min(input_price, output_price) < 0:
            raise ValueError("Prices cannot be negative; give dollars for a million tokens.")
        return Price(input_price, output_price, "given")
    name = model.removeprefix("models/")
    if name not in _TABLE:
        return None
    source = next(text for maker, text in SOURCES.items() if name.startswith(maker))
    return Price(*_TABLE[name], source, BATCH_SHARE)
