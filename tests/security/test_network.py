"""Allow lists and trusted proxies: who is let in, and who is believed about it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deepseek_api_compat.security import network
from deepseek_api_compat.security.network import MAX_HOPS, UNKNOWN, AllowList, TrustedProxies
from deepseek_api_compat.security.scope import networks

ALLOWED = AllowList(networks(["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "fe80::/64"]))


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.0",
        "10.255.255.255",
        "192.0.2.7",
        "::ffff:10.1.2.3",
        "::FFFF:0a01:0203",
        "2001:db8::1",
        "2001:0DB8:0000::0001",
        "fe80::1%eth0",
        "fe80::1%25",
    ],
)
def test_addresses_that_are_in_a_network(text: str):
    assert ALLOWED.permits(text)
    assert ALLOWED.permits(text)  # and so when it is remembered


@pytest.mark.parametrize(
    "text",
    [
        "11.0.0.0",
        "192.0.2.8",
        "::ffff:11.0.0.1",
        "::10.0.0.1",  # an IPv6 address of its own, not IPv4 written as IPv6
        "64:ff9b::10.0.0.1",  # translated: who sent it, only the translator knows
        "2002:0a00:0001::",
        "2001:db9::1",
        "fe80:0:0:1::1",
        "10.0.0.1%eth0",
        "010.0.0.1",
        "10.1",
        "167772161",
        "0x0a000001",
        "10.0.0.1 ",
        "10.0.0.1\n",
        "10.0.0.1/8",
        "١٠.0.0.1",
        "localhost",
        "unix:",
        UNKNOWN,
    ],
)
def test_what_is_not_in_a_network_or_is_no_address(text: str):
    assert not ALLOWED.permits(text)
    assert not ALLOWED.permits(text)


def test_an_empty_list_lets_nobody_in():
    assert not AllowList().permits("127.0.0.1")
    assert not AllowList().permits("::1")


def test_everyone_is_both_families():
    assert AllowList(networks(["0.0.0.0/0"])).permits("::ffff:192.0.2.1")
    assert not AllowList(networks(["0.0.0.0/0"])).permits("::1")
    assert not AllowList(networks(["::/0"])).permits("192.0.2.1")


def test_what_is_remembered_is_bounded_and_does_not_change_the_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "_MAX_REMEMBERED", 8)
    allowed = AllowList(networks(["10.0.0.0/24"]))
    texts = [f"10.0.{third}.{last}" for third in (0, 1) for last in range(30)]
    for _ in range(2):
        assert [allowed.permits(text) for text in texts] == [True] * 30 + [False] * 30
    assert len(allowed._known) == 8
    proxies = TrustedProxies(networks(["127.0.0.1"]))
    for text in texts:
        assert proxies.client("127.0.0.1", text.encode()) == text
    assert len(proxies._known) == 8
    assert proxies.client("127.0.0.1", b"192.0.2.1" + b" " * 1000) == "192.0.2.1"
    assert all(len(chain) < 1000 for _, chain in proxies._known)  # long ones are not kept


addresses = st.one_of(
    st.builds(IPv4Address, st.integers(0, 2**32 - 1)), st.builds(IPv6Address, st.integers(0, 2**128 - 1))
)
some_networks = st.lists(
    st.one_of(
        st.builds(
            lambda a, n: IPv4Network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
        ),
        st.builds(
            lambda a, n: IPv6Network((a, n), strict=False), st.integers(0, 2**128 - 1), st.integers(0, 128)
        ),
    ),
    max_size=5,
)


@given(some_networks, addresses)
def test_a_list_permits_what_is_in_one_of_its_networks(listed, found):
    plain = found.ipv4_mapped or found if isinstance(found, IPv6Address) else found
    assert AllowList(listed).permits(str(found)) == any(plain in one for one in listed)


@given(some_networks, st.data())
def test_each_network_has_its_own_addresses(listed, data):
    allowed = AllowList(networks([str(one) for one in listed]))
    for one in listed:
        number = data.draw(st.integers(int(one.network_address), int(one.broadcast_address)))
        written = one.network_address.__class__(number)
        assume(not isinstance(written, IPv6Address) or written.ipv4_mapped is None)  # those count as IPv4
        assert allowed.permits(str(written))


@given(st.integers(0, 2**32 - 1), some_networks)
def test_an_ipv4_address_counts_the_same_however_it_is_written(number, listed):
    plain = IPv4Address(number)
    allowed = AllowList(networks([str(one) for one in listed]))
    for written in (f"::ffff:{plain}", f"::ffff:{number >> 16:x}:{number & 0xFFFF:x}", f"::ffff:{plain}%lo"):
        assert allowed.permits(written) == allowed.permits(str(plain))


@given(st.text(max_size=60))
def test_any_text_gets_an_answer(text):
    assert AllowList(networks(["0.0.0.0/0", "::/0"])).permits(text) in (True, False)
    assert not AllowList().permits(text)


# X-Forwarded-For

PROXIES = TrustedProxies(networks(["127.0.0.1", "10.0.0.0/24", "2001:db8:1::/48"]))
CLIENT = "198.51.100.9"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (b"", "127.0.0.1"),
        (b"198.51.100.9", CLIENT),
        (b"198.51.100.9:51234", CLIENT),
        (b"  198.51.100.9\t", CLIENT),
        (b"::ffff:198.51.100.9", CLIENT),
        (b"[::ffff:198.51.100.9]:443", CLIENT),
        (b"192.0.2.1, 198.51.100.9", CLIENT),  # what the client claims is not read
        (b"nonsense, 198.51.100.9", CLIENT),
        (b"127.0.0.1, 198.51.100.9", CLIENT),
        (b"198.51.100.9, 10.0.0.5", CLIENT),
        (b"198.51.100.9,10.0.0.5:80,[2001:db8:1::7]:443", CLIENT),
        (b"192.0.2.1, 198.51.100.9, 10.0.0.5, 10.0.0.6", CLIENT),
        (b"2001:db8::9", "2001:db8::9"),
        (b"[2001:db8::9]", "2001:db8::9"),
        (b"[2001:db8::9]:1", "2001:db8::9"),
        (b"10.0.0.5", "10.0.0.5"),  # a proxy itself, such as its health check
        (b"10.0.0.6, 10.0.0.5", "10.0.0.6"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_proxy(forwarded: bytes, client: str):
    assert PROXIES.client("127.0.0.1", forwarded) == client
    assert PROXIES.client("127.0.0.1", forwarded) == client


def test_a_proxy_is_known_however_its_address_is_written():
    assert PROXIES.client("::ffff:127.0.0.1", CLIENT.encode()) == CLIENT
    assert PROXIES.client("2001:DB8:1::7", CLIENT.encode()) == CLIENT


@pytest.mark.parametrize("peer", ["198.51.100.200", "10.0.1.1", "::1", UNKNOWN, "127.0.0.1x"])
def test_a_header_from_anyone_else_is_not_believed(peer: str):
    assert PROXIES.client(peer, b"10.0.0.1") == peer
    assert PROXIES.client(peer, b"192.0.2.1, 127.0.0.1") == peer


@pytest.mark.parametrize(
    "forwarded",
    [
        b"unknown",
        b"_hidden",
        b"198.51.100.9, unknown",
        b"198.51.100.9,",
        b",",
        b" ",
        b"198.51.100.9, , 10.0.0.5",
        b"198.51.100.9:",
        b"198.51.100.9:x",
        b"198.51.100.9:123456",
        b"198.51.100.9:" + b"9" * 5000,
        b"198.51.100.9 10.0.0.5",
        b"198.51.100.9; 10.0.0.5",
        b"[198.51.100.9]",
        b"[2001:db8::9",
        b"[2001:db8::9]x",
        b"2001:db8::9]:1",
        b'"198.51.100.9"',
        b"for=198.51.100.9",
        b"198.51.100.09",
        b"\xd9\xa1.0.0.1",
        b"198.51.100.9\x00",
    ],
)
def test_where_a_proxy_wrote_no_address_the_client_is_unknown(forwarded: bytes):
    """Not the proxy, which may be on an allow list where its clients are not."""
    assert PROXIES.client("127.0.0.1", forwarded) == UNKNOWN
    assert not ALLOWED.permits(PROXIES.client("127.0.0.1", forwarded))


def test_a_chain_has_an_end():
    hops = [b"198.51.100.9", *[b"10.0.0.5"] * (MAX_HOPS - 1)]
    assert PROXIES.client("127.0.0.1", b", ".join(hops)) == CLIENT
    assert PROXIES.client("127.0.0.1", b", ".join([*hops, b"10.0.0.5"])) == UNKNOWN
    assert PROXIES.client("127.0.0.1", b"10.0.0.5," * 20_000 + b"10.0.0.5") == UNKNOWN


@given(
    st.binary(max_size=80),
    st.lists(st.sampled_from([b"10.0.0.5", b"10.0.0.9:1", b"[2001:db8:1::2]:3"]), max_size=5),
)
def test_a_client_never_chooses_its_address(claimed: bytes, hops: list[bytes]):
    """Whatever it sends in the header, the first trusted proxy appends where the connection came from."""
    written = b",".join([claimed, CLIENT.encode(), *hops])
    assert PROXIES.client("127.0.0.1", written) == CLIENT


@given(st.binary(max_size=200))
def test_any_header_gives_an_address_or_none(forwarded: bytes):
    found = PROXIES.client("127.0.0.1", forwarded)
    assert found == UNKNOWN or ip_network(found)
