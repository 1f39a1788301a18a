"""The values of JSON Schema's `format` that are enforced, as regular expressions.

Sources: RFC 3339 (dates, times, and durations in its appendix A), RFC 5321 4.1.2 (mailboxes without quotes),
RFC 1123 2.1 (host names), RFC 4291 2.2 (IPv6 without an IPv4 tail), RFC 9562 (UUIDs). They allow at least
what llguidance writes.
"""

from __future__ import annotations

from functools import lru_cache

from deepseek_api_compat.protocol.regular import Expr
from deepseek_api_compat.protocol.regular_syntax import written_as

_DATE = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|[12][0-9]))"
)
_HOUR = "(?:[01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?(?:[zZ]|[+-]{_HOUR}:[0-5][0-9])"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_ANY_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_ATOM = r"[a-zA-Z0-9!#$%&'*+\-/=?\^_`{|}~]+"


def _duration() -> str:
    def down(*units: str) -> str:
        """These units, from any of them on, none left out between."""
        chains = []
        for start in range(len(units)):
            chain = ""
            for unit in reversed(units[start:]):
                chain = f"[0-9]+{unit}(?:{chain})?" if chain else f"[0-9]+{unit}"
            chains.append(chain)
        return f"(?:{'|'.join(chains)})"

    time = "T" + down("H", "M", "S")
    return f"P(?:{down('Y', 'M', 'D')}(?:{time})?|{time}|[0-9]+W)"


def _ipv6() -> str:
    group = "[0-9a-fA-F]{1,4}"
    forms = [f"(?:{group}:){{7}}{group}"]
    for left in range(8):
        head = f"{group}(?::{group}){{{left - 1}}}" if left else ""
        tail = f"(?:{group}(?::{group}){{0,{6 - left}}})?" if left < 7 else ""
        forms.append(f"{head}::{tail}")
    return "|".join(forms)


_SOURCES = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT]{_TIME}",
    "duration": _duration(),
    "email": rf"{_ATOM}(?:\.{_ATOM})*@(?:{_ANY_LABEL}(?:\.{_ANY_LABEL})*|\[{_IPV4}\])",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}


@lru_cache
def format_expr(name: str) -> Expr:
    """The texts of a format; KeyError for one that is not enforced."""
    return written_as(_SOURCES[name])
