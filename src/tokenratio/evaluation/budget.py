"""The cost of requests to an endpoint: estimated, counted and limited."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.openai_api import Answer
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.data.chat import Prompt

_CHARACTERS_PER_TOKEN = 4  # roughly, in English
_TOKENS_PER_MESSAGE = 4  # the role and its delimiters


class BudgetError(TokenRatioError):
    """The budget is used up."""


@dataclass(frozen=True)
class Budget:
    """Limits, and the prices that costs are computed with."""

    max_requests: int | None = option(None, "Stop after this many requests, retries included.")
    max_cost: float | None = option(
        None, "Stop before the cost exceeds this, in the currency of the prices."
    )
    price_in: float | None = option(
        None, "Price of a million input tokens; also used for the estimate."
    )
    price_out: float | None = option(None, "Price of a million output tokens.")

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_cost", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise TokenRatioError(f"{name} must be at least 0, not {value}")
        if (self.price_in is None) != (self.price_out is None):
            raise TokenRatioError("give price_in and price_out, or neither")
        if self.max_cost is not None and self.price_in is None:
            raise TokenRatioError(
                "max_cost needs price_in and price_out, the prices of a million tokens"
            )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In the currency of the prices; 0 without prices."""
        return (tokens_in * (self.price_in or 0) + tokens_out * (self.price_out or 0)) / 1e6


@dataclass(frozen=True)
class Demand:
    """The most that a request can take."""

    tokens_in: int
    tokens_out: int


class Ledger:
    """What was sent and spent, within a budget.

    Before a request is sent, the most it can cost is reserved, so that concurrent requests stay
    within the budget. Its answer then counts with the usage that the server reports; a request
    without an answer counts in full if the server may have processed it.

    Args:
        count_tokens: of a text; None assumes four characters per token.
    """

    def __init__(self, budget: Budget, count_tokens: Callable[[str], int] | None = None) -> None:
        self.budget = budget
        self._count = count_tokens or _rough_count
        self.num_requests = self.num_answered = self.tokens_in = self.tokens_out = 0
        self._reserved = 0.0

    @property
    def cost(self) -> float:
        """Spent so far."""
        return self.budget.cost(self.tokens_in, self.tokens_out)

    def demand(self, prompt: "Prompt", max_tokens: int, num_choices: int = 1) -> Demand:
        """The most that a request can take, with its prompt estimated."""
        if isinstance(prompt, str):
            read = self._count(prompt)
        else:
            texts = [str(message.get("content") or "") for message in prompt.messages]
            read = sum(map(self._count, texts)) + _TOKENS_PER_MESSAGE * len(texts)
            read += self._count(json.dumps(list(prompt.tools))) if prompt.tools else 0
        return Demand(read, max_tokens * num_choices)

    def reserve(self, demand: Demand) -> None:
        """Reserve what a request can take; `BudgetError` if it could exceed the budget."""
        limit = self.budget.max_requests
        if limit is not None and self.num_requests >= limit:
            raise BudgetError(f"stopped at max_requests: {limit} requests were sent")
        cost = self.budget.cost(demand.tokens_in, demand.tokens_out)
        most = self.budget.max_cost
        if most is not None and self.cost + self._reserved + cost > most:
            raise BudgetError(
                f"stopped before max_cost {most:g}: about {self.cost:.4g} is spent, and the next "
                f"request may cost {cost:.4g}"
            )
        self.num_requests += 1
        self._reserved += cost

    def settle(self, demand: Demand, answer: Answer | None, *, maybe_paid: bool = False) -> None:
        """Count a reserved request that has ended.

        Args:
            answer: None if there is none.
            maybe_paid: whether the server may have charged for it anyway.
        """
        self._reserved -= self.budget.cost(demand.tokens_in, demand.tokens_out)
        if answer is None:
            if maybe_paid:
                self.tokens_in += demand.tokens_in
                self.tokens_out += demand.tokens_out
            return
        self.num_answered += 1
        texts = (choice.text for choice in answer.choices)
        written = sum(map(self._count, texts)) if answer.tokens_out is None else answer.tokens_out
        self.tokens_in += demand.tokens_in if answer.tokens_in is None else answer.tokens_in
        self.tokens_out += written

    def estimate(self, demands: Iterable[Demand], where: str) -> str:
        """A line on what will be requested, and its highest cost."""
        demands = list(demands)
        read = sum(demand.tokens_in for demand in demands)
        written = sum(demand.tokens_out for demand in demands)
        text = f"{len(demands):,} requests to {where}: about {read:,} tokens in, "
        text += f"at most {written:,} out"
        budget = self.budget
        if budget.price_in is not None:
            cost = budget.cost(read, written)
            text += (
                f"; at most about {cost:.4g} (at {budget.price_in:g} a million tokens in, "
                f"{budget.price_out:g} out)"
            )
            if budget.max_cost is not None:
                text += f", max_cost {budget.max_cost:g}"
        if budget.max_requests is not None:
            text += f"; max_requests {budget.max_requests:,}"
        return text

    def totals(self, seconds: float) -> str:
        """A line on what was requested and spent."""
        text = (
            f"{self.num_answered:,} answers to {self.num_requests:,} requests in {seconds:.1f} s: "
            f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out "
            f"({self.tokens_out / max(seconds, 1e-9):.0f}/s)"
        )
        return text + ("" if self.budget.price_in is None else f"; about {self.cost:.4g} spent")

    def rates(self, seconds: float) -> dict[str, str]:
        """For a progress bar."""
        seconds = max(seconds, 1e-9)
        shown = {
            "in/s": f"{self.tokens_in / seconds:.0f}",
            "out/s": f"{self.tokens_out / seconds:.0f}",
        }
        return shown if self.budget.price_in is None else shown | {"cost": f"{self.cost:.4g}"}


def _rough_count(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)
