"""Numbers within bounds, as regular expressions over their decimal digits."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from deepseek_api_compat.protocol.regular import EMPTY, Expr, any_of, literal, one_of, repeat, sequence
from deepseek_api_compat.protocol.regular_syntax import written_as

_DIGIT = any_of([(0x30, 0x39)])
_WHOLE = written_as("(?:0|[1-9][0-9]*)")
_FRACTION = written_as(r"(?:\.[0-9]+)?")
_MINUS = literal("-")

ANY_NUMBER = written_as(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
ANY_INTEGER = written_as("-?(?:0|[1-9][0-9]*)")


def at_least(bound: Decimal, *, strict: bool, integer: bool) -> Expr:
    """The numbers from `bound` on, or beyond it if `strict`; without an exponent."""
    if integer:
        bound, strict = _whole_bound(bound, strict, up=True), False
    if bound < 0 or (bound == 0 and not strict):
        small = sequence(_MINUS, _up_to(bound.copy_abs(), strict, integer))
        return one_of([sequence(_WHOLE, _tail(integer)), small])
    return _from(bound, strict, integer)


def at_most(bound: Decimal, *, strict: bool, integer: bool) -> Expr:
    """The numbers up to `bound`, or below it if `strict`; without an exponent."""
    if integer:
        bound, strict = _whole_bound(bound, strict, up=False), False
    if bound > 0 or (bound == 0 and not strict):
        negative = sequence(_MINUS, _WHOLE, _tail(integer))
        return one_of([negative, _up_to(bound, strict, integer)])
    return sequence(_MINUS, _from(bound.copy_abs(), strict, integer))


def plain(number: Decimal) -> str:
    """Its digits, without an exponent and without zeros behind the point."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _whole_bound(bound: Decimal, strict: bool, *, up: bool) -> Decimal:
    """The first whole number that the bound allows."""
    whole = bound.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR)
    return Decimal(int(whole) + (1 if up else -1)) if strict and whole == bound else whole


def _tail(integer: bool) -> Expr:
    return EMPTY if integer else _FRACTION


def _from(bound: Decimal, strict: bool, integer: bool) -> Expr:
    """The numbers without a sign that are not less than the bound."""
    whole, _, fraction = plain(bound).partition(".")
    longer = sequence(any_of([(0x31, 0x39)]), repeat(_DIGIT, len(whole)), _tail(integer))
    options = [longer, *(sequence(expr, _tail(integer)) for expr in _greater(whole))]
    if not fraction:
        rest = EMPTY if integer else _FRACTION
        if strict:
            rest = written_as(r"\.[0-9]*[1-9][0-9]*")
    else:
        equal = written_as("[0-9]*[1-9][0-9]*" if strict else "[0-9]*")
        greater = _greater(fraction, fraction=True)
        rest = sequence(literal("."), one_of([*greater, sequence(literal(fraction), equal)]))
    return one_of([*options, sequence(literal(whole), rest)])


def _up_to(bound: Decimal, strict: bool, integer: bool) -> Expr:
    """The numbers without a sign that are not more than the bound."""
    whole, _, fraction = plain(bound).partition(".")
    options = [sequence(expr, _tail(integer)) for expr in _less(whole)]
    if len(whole) > 1:
        shorter = sequence(any_of([(0x31, 0x39)]), repeat(_DIGIT, 0, len(whole) - 2))
        options.append(sequence(one_of([literal("0"), shorter]), _tail(integer)))
    if fraction:
        less = _less(fraction, fraction=True)
        shorter_ones = [literal(fraction[:n]) for n in range(1, len(fraction))]
        equal = [] if strict else [sequence(literal(fraction), repeat(literal("0")))]
        behind = sequence(literal("."), one_of([*less, *shorter_ones, *equal]))
        options.append(sequence(literal(whole), repeat(behind, 0, 1)))
    elif not strict:
        options.append(literal(whole) if integer else sequence(literal(whole), written_as(r"(?:\.0+)?")))
    return one_of(options)


def _greater(digits: str, *, fraction: bool = False) -> list[Expr]:
    """The digits of greater numbers, by the first one that differs; as many, except behind the point."""
    return [
        sequence(literal(digits[:n]), any_of([(ord(digit) + 1, 0x39)]), _further(digits, n, fraction))
        for n, digit in enumerate(digits)
    ]


def _less(digits: str, *, fraction: bool = False) -> list[Expr]:
    """The digits of smaller numbers, as of `_greater`; of several before the point, the first is not 0."""
    first = 0x30 if fraction or len(digits) == 1 else 0x31
    return [
        sequence(
            literal(digits[:n]),
            any_of([(0x30 if n else first, ord(digit) - 1)]),
            _further(digits, n, fraction),
        )
        for n, digit in enumerate(digits)
    ]


def _further(digits: str, n: int, fraction: bool) -> Expr:
    left = len(digits) - n - 1
    return repeat(_DIGIT) if fraction else repeat(_DIGIT, left, left)
