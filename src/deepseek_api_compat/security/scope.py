"""What a key may use and where it may come from: names of models, and networks.

Here is only their form and which of two is narrower; the gateway compares them with requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

Network = IPv4Network | IPv6Network
MAX_MODEL_NAME = 200  # characters
_MAPPED = IPv6Network("::ffff:0:0/96")


def model_name(name: str) -> str:
    """The name, if a model can have it. Raises ValueError with a sentence."""
    # Commas and spaces separate names on command lines and in headers.
    if not 0 < len(name) <= MAX_MODEL_NAME or not name.isprintable() or set(name) & set(", "):
        raise ValueError(
            f"{name!r} is no name of a model: 1 to {MAX_MODEL_NAME} printable characters, no comma or space."
        )
    return name


def network(text: str) -> Network:
    """The network in CIDR form, or of one address; IPv4 written as IPv6 becomes IPv4.

    Raises ValueError with a sentence.
    """
    if "%" in text:
        raise ValueError(f"{text!r} names an interface: give the network alone, such as fe80::/64.")
    try:
        found = ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is no network{_instead(text)}.") from None
    if isinstance(found, IPv6Network) and found.subnet_of(_MAPPED):
        mapped = int(found.network_address) & 0xFFFFFFFF
        return IPv4Network((mapped, found.prefixlen - 96))
    return found


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Each of them; raises ValueError with a sentence."""
    return tuple(network(text) for text in texts)


def is_within(inner: Network, outer: Sequence[Network]) -> bool:
    """Whether one of `outer` has every address of `inner`."""
    if isinstance(inner, IPv4Network):
        return any(isinstance(one, IPv4Network) and inner.subnet_of(one) for one in outer)
    return any(isinstance(one, IPv6Network) and inner.subnet_of(one) for one in outer)


def _instead(text: str) -> str:
    try:
        return f": bits are set behind the prefix; did you mean {ip_network(text, strict=False)}?"
    except ValueError:
        return ": networks look like 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7"
