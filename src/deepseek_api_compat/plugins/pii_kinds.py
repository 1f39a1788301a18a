"""Personal data in a text: what each kind looks like, and where it stands.

Every pattern takes time in proportion to the text: what repeats is bounded, or starts only where a run of its
characters starts. Numbers are also found in full-width digits and with single spaces or hyphens between their
groups. Sources: GB 11643 (identity cards), ISO/IEC 7812 (Luhn), ITU-T E.164 (telephone numbers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import AddressValueError, IPv6Address
from typing import NamedTuple

Span = tuple[int, int]


class Kind(NamedTuple):
    """label: what it is called in placeholders. find: where it stands in a text that `plain` made."""

    label: str
    find: Callable[[str], Iterable[Span]]


class Found(NamedTuple):
    start: int
    end: int
    label: str


def plain(text: str) -> str:
    """The text with ASCII in place of full-width characters; each character stays where it is."""
    if not text.isascii():
        text = text.translate(_PLAIN)
    # In "\u8bdd138..." the digits of the escape are not a part of the number.
    return _ESCAPE.sub(_BLANK, text) if "\\u" in text else text


def find(text: str, kinds: Sequence[Kind]) -> list[Found]:
    """All of it, in order. What overlaps becomes one, of the kind that starts first or is longest."""
    looked_at = plain(text)
    every = [
        (start, -end, number) for number, kind in enumerate(kinds) for start, end in kind.find(looked_at)
    ]
    found: list[Found] = []
    for start, minus_end, number in sorted(every):
        if found and start < found[-1].end:
            found[-1] = found[-1]._replace(end=max(found[-1].end, -minus_end))
        else:
            found.append(Found(start, -minus_end, kinds[number].label))
    return found


def of_pattern(label: str, pattern: re.Pattern[str]) -> Kind:
    return Kind(label, lambda text: (match.span() for match in pattern.finditer(text) if match.group()))


def chosen(kinds: Sequence[str], patterns: Mapping[str, str]) -> list[Kind]:
    """The kinds of these names, and those that `patterns` add. Raises ValueError."""
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"there is no kind {unknown[0]!r}; the known ones are {', '.join(KINDS)}")
    return [_own(name, pattern) for name, pattern in patterns.items()] + [KINDS[name] for name in kinds]


def _own(name: str, pattern: str) -> Kind:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,31}", name) or name in KINDS:
        raise ValueError(f"a pattern can't be called {name!r}: letters, digits and _, and no kind's name")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {name!r} is wrong: {error}") from None
    return of_pattern(name.upper(), compiled)


def identity_card(digits: str) -> bool:
    """Whether the last of 18 digits is the check digit of the others (ISO 7064, MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(digits[:17]))
    return "10X98765432"[total % 11] == digits[17].upper()


def luhn(digits: str) -> bool:
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(int(digit) for digit in digits[::-2])) % 10 == 0


def _identity_cards(text: str) -> Iterator[Span]:
    for match in _IDENTITY_CARD.finditer(text):
        if identity_card(_bare(match.group())):
            yield match.span()


def _bank_cards(text: str) -> Iterator[Span]:
    at = 0
    while match := _BANK_CARD.search(text, at):
        # Another number may stand before or behind the card: each run of its groups is tried.
        end = next((end for end in _ends(match) if luhn(_bare(text[match.start() : end]))), None)
        if end is not None:
            yield match.start(), end
        at = end or match.start() + 1


def _ends(match: re.Match[str]) -> Iterator[int]:
    """Where a number of 13 to 19 digits may end, the longest first."""
    text, start = match.string, match.start()
    for end in range(match.end(), start + 12, -1):
        at_group = end == match.end() or text[end] in " -"
        if at_group and text[end - 1].isdigit() and 13 <= len(_bare(text[start:end])) <= 19:
            yield end


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        address = match.group()
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        try:
            IPv6Address(address)
        except AddressValueError:
            continue
        yield match.start(), match.start() + len(address)


def _bare(number: str) -> str:
    return number.replace(" ", "").replace("-", "")


_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN |= dict.fromkeys((0xA0, 0x2002, 0x2003, 0x2009, 0x202F, 0x3000), ord(" "))
_PLAIN |= dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212), ord("-"))
_ESCAPE = re.compile(r"\\u[0-9A-Fa-f]{4}")
_BLANK = "\0" * 6

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z][A-Za-z0-9-]{1,62}"
)
_PHONE = re.compile(
    # A Chinese mobile number, or any number with its country's code
    r"(?<![0-9])(?:\(?(?:\+|00)?86\)?[ -]?)?1[3-9][0-9](?:[ -]?[0-9]{4}){2}(?![0-9])"
    r"|(?<![0-9A-Za-z+])\+[1-9](?:[ ().-]{0,2}[0-9]){7,14}(?![0-9])"
)
_IDENTITY_CARD = re.compile(
    r"(?<![0-9])[1-9][0-9]{5}[ -]?(?:18|19|20)[0-9]{2}[ -]?(?:0[1-9]|1[0-2])[ -]?(?:0[1-9]|[12][0-9]|3[01])"
    r"[ -]?[0-9]{3}[0-9Xx](?![0-9])"
)
_BANK_CARD = re.compile(
    r"(?<![0-9])(?<!\b0\.)(?:3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5}"
    r"|[2-9][0-9]{3}(?:[ -]?[0-9]{4}){2,3}(?:[ -]?[0-9]{1,4})?)(?![0-9])"
)
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![0-9.]){_BYTE}(?:\.{_BYTE}){{3}}(?![0-9]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z:.])(?=[0-9A-Fa-f]{0,4}:)(?=:{0,2}[0-9A-Fa-f])[0-9A-Fa-f:]{3,40}(?![0-9A-Za-z:])"
)
_PASSPORT = re.compile(
    r"(?<![0-9A-Za-z])(?:[EG][0-9]{8}|E[A-HJ-NP-Z][0-9]{7}|[DSP]E?[0-9]{7})(?![0-9A-Za-z])"
)
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|LTAI[A-Za-z0-9]{12,26}"
    r"|AKID[A-Za-z0-9]{32}|gh[oprsu]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|hf_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{50,})"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r"|-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY-----[A-Za-z0-9+/=\s\\]+(?:-----END [A-Z0-9 ]{0,30}KEY-----)?"
)

KINDS: dict[str, Kind] = {
    "secret": of_pattern("SECRET", _SECRET),
    "email": of_pattern("EMAIL", _EMAIL),
    "id_card": Kind("ID_CARD", _identity_cards),
    "bank_card": Kind("BANK_CARD", _bank_cards),
    "phone": of_pattern("PHONE", _PHONE),
    "ipv4": of_pattern("IP", _IPV4),
    "ipv6": Kind("IP", _ipv6),
    "passport": of_pattern("PASSPORT", _PASSPORT),
}
DEFAULT = ("secret", "email", "id_card", "bank_card", "phone")
