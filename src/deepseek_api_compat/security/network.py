"""Who sends a request, by address: allow lists, and proxies that are believed about their clients."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeVar

from deepseek_api_compat.security.scope import Network

UNKNOWN = ""  # the address of a client that nobody vouches for; on no allow list
MAX_HOPS = 32  # proxies that one request may have come through
_MAX_REMEMBERED = 4096  # addresses, or chains of proxies; so many different ones cost a few hundred kilobytes
_MAX_REMEMBERED_LENGTH = 256  # bytes of a chain

_PORT = re.compile(r"(?::[0-9]{1,5})?")
_K = TypeVar("_K")
_V = TypeVar("_V")


def address(text: str) -> IPv4Address | IPv6Address:
    """The address, without a zone (`%eth0`); IPv4 written as IPv6 becomes IPv4. Raises ValueError."""
    if ":" in text:
        text = text.partition("%")[0]
    found = ip_address(text)
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


class AllowList(tuple[Network, ...]):
    """Networks whose addresses are let in; an empty one lets nobody in.

    Remembers what it has decided, 4096 addresses at most.

    Failure policy: fails closed; what is no address (UNKNOWN, the peer of a Unix socket) is on no list.
    """

    def __new__(cls, networks: Iterable[Network] = ()) -> AllowList:
        made = super().__new__(cls, networks)
        made._known = {}
        return made

    _known: dict[str, bool]

    def permits(self, text: str) -> bool:
        """Whether the address is in one of the networks."""
        known = self._known.get(text)
        if known is None:
            known = self._contains_address(text)
            _remember(self._known, text, known)
        return known

    def _contains_address(self, text: str) -> bool:
        try:
            found = address(text)
        except ValueError:
            return False
        return any(found in network for network in self)


class TrustedProxies:
    """The proxies whose X-Forwarded-For is believed. The Forwarded header (RFC 7239) never is.

    Each proxy appends the address that it was called from. So the list is read from its end: as long as
    addresses are those of trusted proxies, the one before them was written by a trusted proxy too, and the
    first that is not a proxy's is the client's. What a client itself wrote is further left and never read.

    Failure policy: fails closed. Where a trusted proxy's word should be and is none (`unknown`, nonsense,
    more than 32 hops), the client is UNKNOWN, which is on no allow list.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._trusted = AllowList(networks)
        self._known: dict[tuple[str, bytes], str] = {}

    def client(self, peer: str, forwarded: bytes) -> str:
        """The address of the client.

        `peer`: of the connection. `forwarded`: all X-Forwarded-For headers, in their order, joined by commas;
        empty if there is none.
        """
        if not forwarded or not self._trusted.permits(peer):
            return peer
        known = self._known.get((peer, forwarded))
        if known is None:
            known = self._walk(forwarded)
            if len(forwarded) <= _MAX_REMEMBERED_LENGTH:
                _remember(self._known, (peer, forwarded), known)
        return known

    def _walk(self, forwarded: bytes) -> str:
        entries = forwarded.decode("latin-1").rsplit(",", MAX_HOPS)
        cut = len(entries) > MAX_HOPS  # then the first one is the rest of the list, unread
        for entry in reversed(entries[1:] if cut else entries):
            found = _forwarded_address(entry)
            if found == UNKNOWN or not self._trusted.permits(found):
                return found
        # All are proxies of ours: the first of them is who asked, such as a health check.
        return UNKNOWN if cut else found


def _forwarded_address(entry: str) -> str:
    """The address in an entry of X-Forwarded-For, which may have a port; UNKNOWN if there is none."""
    text = entry.strip(" \t")
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or ":" not in text or not _PORT.fullmatch(port):
            return UNKNOWN
    elif text.count(":") == 1:
        text, colon, port = text.partition(":")
        if not _PORT.fullmatch(colon + port):
            return UNKNOWN
    try:
        return str(address(text))
    except ValueError:
        return UNKNOWN


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    if len(known) >= _MAX_REMEMBERED:
        del known[next(iter(known))]  # the oldest
    known[key] = value
