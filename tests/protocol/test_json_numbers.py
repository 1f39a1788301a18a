"""Numbers within bounds, by their digits."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.protocol.json_numbers import ANY_INTEGER, ANY_NUMBER, at_least, at_most, plain

BOUNDS = [
    "0",
    "-0.5",
    "0.5",
    "0.05",
    "12.3",
    "100",
    "-100",
    "-12.3",
    "1",
    "-1",
    "9",
    "10",
    "999",
    "1e30",
    "-1E-7",
]
NUMBERS = st.one_of(
    st.sampled_from(["-0", "0.0", "-0.00", "12.30", "12.31", "12.25", "1.0", "0.049", "0.051"]),
    st.decimals(-1100, 1100, places=2).map(lambda number: plain(number)),
    st.integers().map(str),
)


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bound", BOUNDS)
@given(number=NUMBERS)
def test_bounds(bound: str, strict: bool, integer: bool, number: str) -> None:
    value, limit = Decimal(number), Decimal(bound)
    equal = value == limit and not strict
    written = not integer or "." not in number
    least, most = (made(limit, strict=strict, integer=integer) for made in (at_least, at_most))
    assert least.matches(number) == (written and (value > limit or equal))
    assert most.matches(number) == (written and (value < limit or equal))


@pytest.mark.parametrize("text", ["01", "+1", "1.", ".5", "1e", "--1", ""])
def test_no_number(text: str) -> None:
    assert not ANY_NUMBER.matches(text)
    assert not at_most(Decimal(5), strict=False, integer=False).matches(text)


def test_any() -> None:
    assert all(map(ANY_NUMBER.matches, ["0", "-0", "-1.50", "2e-7", "1E+400"]))
    assert all(map(ANY_INTEGER.matches, ["0", "-12"]))
    assert not any(map(ANY_INTEGER.matches, ["1.0", "1e3"]))


@pytest.mark.parametrize(
    ("number", "digits"), [("1E+3", "1000"), ("1.50", "1.5"), ("-2E-3", "-0.002"), ("10", "10")]
)
def test_plain(number: str, digits: str) -> None:
    assert plain(Decimal(number)) == digits
