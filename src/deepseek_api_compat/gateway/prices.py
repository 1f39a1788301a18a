"""What a request costs, in exact integer arithmetic.

Money is counted in micro-units, millionths of the configured currency. A rate is in micro-units for a million
tokens, so a request's price is one sum divided by a million at the end, rounded half to even: no cent is lost
or made by adding up many small requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from deepseek_api_compat.config import PriceSettings

MICRO = 1_000_000
EVERY_MODEL = "*"


class Price(NamedTuple):
    """Rates of one model: micro-units for a million tokens of each kind."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def of(self, prompt: int, cached: int, completion: int) -> int:
        """Micro-units for so many tokens; `cached` ones are part of `prompt`."""
        total = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        if not total:
            return 0
        whole, rest = divmod(total, MICRO)
        return whole + (rest * 2 + (whole & 1) > MICRO)


FREE = Price()


class Prices:
    """The table of the configuration. A model that is not in it is free, unless it has a price for "*"."""

    def __init__(self, settings: Sequence[PriceSettings]) -> None:
        self._prices = {one.model: _price(one) for one in settings}
        self._default = self._prices.get(EVERY_MODEL, FREE)

    def find(self, model: str) -> Price:
        return self._prices.get(model, self._default)


def _price(settings: PriceSettings) -> Price:
    cached = settings.prompt if settings.cached is None else settings.cached
    return Price(_micro(settings.prompt), _micro(cached), _micro(settings.completion))


def _micro(amount: Decimal) -> int:
    return int(amount * MICRO)  # exact: the configuration takes six decimals at most
