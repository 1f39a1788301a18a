"""Files by URL: what is fetched, and all the ways to the inside that are refused."""

from __future__ import annotations

import asyncio
import base64
import gzip
import ssl
from ipaddress import ip_network
from pathlib import Path

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.media.addresses import allowed
from deepseek_api_compat.media.fetch import FetchLimits, Resolver, data_url, fetch, resolve
from fakes.http_server import HttpServer, Peer, Request, Script, answering

HERE = (ip_network("127.0.0.1/32"),)
OPEN = FetchLimits(max_bytes=1000, timeout=30, networks=HERE)
FILE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfile"
CERTIFICATE = Path(__file__).parent.parent / "fakes" / "localhost.pem"

NOT_PUBLIC = """
127.0.0.1 127.8.9.10 0.0.0.0 0.1.2.3 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
100.64.0.1 100.100.100.200 168.63.129.16 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9
192.88.99.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fec0::1
fc00::1 fd00:ec2::254 ff02::1 2001:db8::1 100::1 3fff::1 5f00::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
::127.0.0.1 ::8.8.8.8 2002:7f00:1:: 2002:808:808:: 2001:0:7f00:1:: 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 ::ffff:0:8.8.8.8 not-an-address
"""
PUBLIC = """
8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 169.253.0.1 223.255.255.254 192.167.1.1
2606:4700::1111 2a00:1450:4001::8a 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808
"""
THIS_MACHINE = """
localhost localhost. 127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.1 017700000001 0177.0.0.1 0
0.0.0.0 [::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:0:0:1] 169.254.169.254 2852039166
0xa9fea9fe [fe80::1] １２７.0.0.1 ⓛocalhost
"""


def knowing(**hosts: list[str]) -> Resolver:
    """A resolver that knows these hosts, `_` for `.`."""

    async def resolver(host: str, port: int) -> list[str]:
        return hosts[host.replace(".", "_")]

    return resolver


def moved(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


async def served(response: bytes, limits: FetchLimits = OPEN) -> bytes:
    async with HttpServer(answering(response)) as server:
        return await fetch(f"http://127.0.0.1:{server.endpoint.port}/a", limits)


async def refusal(url: str, limits: FetchLimits = OPEN, resolver: Resolver = resolve) -> str:
    with pytest.raises(InvalidRequest) as refused:
        await fetch(url, limits, resolver=resolver)
    assert refused.value.status == 400
    return refused.value.message


# What is fetched.


async def test_a_file_comes_with_its_name_in_the_request() -> None:
    seen: list[Request] = []

    async def script(peer: Peer) -> None:
        while request := await peer.request():
            seen.append(request)
            await peer.send(FILE)

    async with HttpServer(script) as server:
        port = server.endpoint.port
        url = f"http://pictures.example:{port}/a%20b/c.png?size=1&x=%2F#part"
        assert await fetch(url, OPEN, resolver=knowing(pictures_example=["127.0.0.1"])) == b"file"
    [request] = seen
    assert request.path == "/a%20b/c.png?size=1&x=%2F"
    assert request.headers["host"] == f"pictures.example:{port}"
    assert request.headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & request.headers.keys()


async def test_the_next_address_is_tried_when_nothing_listens_at_the_first() -> None:
    limits = OPEN._replace(networks=(ip_network("127.0.0.0/8"),))
    async with HttpServer(answering(FILE)) as server:
        url = f"http://two.example:{server.endpoint.port}/"
        both = knowing(two_example=["127.0.0.9", "127.0.0.1"])
        assert await fetch(url, limits, resolver=both) == b"file"


async def test_https_checks_the_certificate_against_the_name() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    names: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    where = knowing(localhost=["127.0.0.1"], other_example=["127.0.0.1"])
    async with HttpServer(answering(FILE), tls=tls) as server:
        port = server.endpoint.port
        assert await fetch(f"https://localhost:{port}/", OPEN, resolver=where, tls=trusting) == b"file"
        for url, context in (
            (f"https://other.example:{port}/", trusting),
            (f"https://localhost:{port}/", None),
        ):
            with pytest.raises(InvalidRequest, match="can't be talked to"):
                await fetch(url, OPEN, resolver=where, tls=context)
    assert names == ["localhost", "other.example", "localhost"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_and_carry_no_cookie(status: int) -> None:
    seen: list[Request] = []

    async def script(peer: Peer) -> None:
        while request := await peer.request():
            seen.append(request)
            at_first = moved("../there", status).replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b\r\n\r\n")
            await peer.send(FILE if request.path == "/there" else at_first)

    async with HttpServer(script) as server:
        assert await fetch(f"http://127.0.0.1:{server.endpoint.port}/x/here", OPEN) == b"file"
    assert [request.path for request in seen] == ["/x/here", "/there"]
    assert "cookie" not in seen[1].headers


# What is refused: addresses.


@pytest.mark.parametrize(
    "address",
    NOT_PUBLIC.split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not allowed(address)


@pytest.mark.parametrize(
    "address",
    PUBLIC.split(),
)
def test_addresses_that_are_public(address: str) -> None:
    assert allowed(address)


def test_private_networks_that_the_operator_opened() -> None:
    networks = (ip_network("10.1.0.0/16"), ip_network("fd12::/32"))
    assert allowed("10.1.2.3", networks)
    assert allowed("::ffff:10.1.2.3", networks)
    assert allowed("fd12::5", networks)
    assert not allowed("10.2.0.1", networks)
    assert not allowed("::1", networks)


@pytest.mark.parametrize(
    "host",
    THIS_MACHINE.split(),
)
async def test_every_way_to_write_this_machine(host: str) -> None:
    limits = FetchLimits(max_bytes=1000, timeout=30)
    async with HttpServer(answering(FILE)) as server:
        message = await refusal(f"http://{host}:{server.endpoint.port}/", limits)
        assert server.connections == 0
    assert message in (
        "The URL leads to an address that files are not fetched from.",
        "The URL's host is not known.",  # a system that does not read such notations
        "The URL is malformed.",
    )


async def test_one_private_address_among_public_ones_is_enough() -> None:
    trick = knowing(trick_example=["8.8.8.8", "10.0.0.1"])
    assert "not fetched from" in await refusal("http://trick.example/", resolver=trick)
    assert "not fetched from" in await refusal("http://x.example/", resolver=knowing(x_example=[]))


async def test_rebinding_a_name_is_in_vain_for_it_is_resolved_once() -> None:
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    async with HttpServer(answering(FILE)) as server:
        assert await fetch(f"http://re.example:{server.endpoint.port}/", OPEN, resolver=rebinding) == b"file"
        assert asked == ["re.example"]
        # Asked anew, for a new URL, it is checked anew.
        message = await refusal(f"http://re.example:{server.endpoint.port}/", resolver=rebinding)
        assert "not fetched from" in message
        assert server.connections == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2/",
        "http://169.254.169.254/latest/meta-data/",
        "//[::1]/",
        "http://0x7f000002/",
        "http://user:word@127.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://[broken",
    ],
)
async def test_redirects_to_where_a_url_may_not_lead(location: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await served(moved(location))
    assert "127" not in refused.value.message
    assert "169" not in refused.value.message


async def test_redirects_without_end() -> None:
    async with HttpServer(answering(moved("/again"))) as server:
        message = await refusal(f"http://127.0.0.1:{server.endpoint.port}/")
        assert server.connections == 4
    assert message == "The URL redirects more than 3 times."


async def test_https_does_not_redirect_to_http() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    async with (
        HttpServer(answering(FILE)) as plain,
        HttpServer(answering(moved(f"http://127.0.0.1:{plain.endpoint.port}/")), tls=tls) as secure,
    ):
        with pytest.raises(InvalidRequest, match="from https to http"):
            await fetch(f"https://127.0.0.1:{secure.endpoint.port}/", OPEN, tls=trusting)
        assert plain.connections == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://example.com/a.png", "Only http, https and data"),
        ("file:///etc/passwd", "Only http, https and data"),
        ("example.com/a.png", "Only http, https and data"),
        ("", "Only http, https and data"),
        ("http:///a.png", "names no host"),
        ("http://example.com:0/", "names no host, or a port"),
        ("http://example.com:70000/", "names no host, or a port"),
        ("http://user:password@example.com/", "user name or password"),
        ("http://exa\nmple.com/", "malformed"),
        ("http://[::1/", "malformed"),
        (f"http://{'a' * 300}.example/", "host is not known"),
    ],
)
async def test_urls_that_are_not_looked_up(url: str, says: str) -> None:
    assert says in await refusal(url)


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with HttpServer(answering(FILE)) as server, HttpServer(answering(moved("/proxy"))) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.endpoint.port}")
        assert await fetch(f"http://127.0.0.1:{server.endpoint.port}/", OPEN) == b"file"
        assert proxy.connections == 0


# What is refused: answers.


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
async def test_answers_without_a_file_are_told_without_a_word_of_theirs(status: int) -> None:
    secret = b"HTTP/1.1 %d Secret-Reason\r\nContent-Length: 0\r\n\r\n" % status
    with pytest.raises(InvalidRequest) as refused:
        await served(secret)
    assert refused.value.message == "There is no file to be had at the URL."


async def test_what_speaks_no_http_is_told_likewise() -> None:
    with pytest.raises(InvalidRequest, match="server can't be talked to") as refused:
        await served(b"SSH-2.0-secret_7.4\r\n\r\n")
    assert "secret" not in refused.value.message


async def test_bytes_are_counted_whatever_the_length_said_says() -> None:
    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.send(b"x" * 4096)

    assert await served(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000) == b"x" * 1000
    for script in (endless, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001)):
        async with HttpServer(script) as server:
            message = await refusal(f"http://127.0.0.1:{server.endpoint.port}/")
        assert message == "The file has more than 1000 bytes, the most that is read."


async def test_a_compressed_answer_is_refused_unread() -> None:
    bomb = gzip.compress(bytes(10_000_000))[:900]
    for encoding in (b"gzip", b"identity, gzip", b"br"):
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (
            encoding,
            len(bomb),
        )
        with pytest.raises(InvalidRequest, match="comes compressed"):
            await served(head + bomb)


def dripping(head: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head)
        while True:  # a byte often enough for every timeout between two bytes
            await peer.send(b"x")
            await asyncio.sleep(0.02)

    return script


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Drip: ", b""])
async def test_the_time_holds_over_everything(head: bytes) -> None:
    limits = FetchLimits(max_bytes=1 << 20, timeout=0.3, networks=HERE)
    async with HttpServer(dripping(head)) as server:
        message = await refusal(f"http://127.0.0.1:{server.endpoint.port}/", limits)
    assert message == "The file at the URL did not come within 0.3 s."


async def test_a_resolver_that_hangs_takes_no_longer() -> None:
    async def hanging(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    limits = FetchLimits(max_bytes=1000, timeout=0.05)
    assert "within 0.05 s" in await refusal("http://slow.example/", limits, hanging)


# Data URLs.


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:image/png;base64," + base64.b64encode(b"\x89PNG\xff\xfe").decode(), b"\x89PNG\xff\xfe"),
        ("DATA:;BASE64,aGVsbG8", b"hello"),  # without padding
        ("data:image/png;base64,aGVs%0AbG8%3D", b"hello"),
        ("data:image/png;charset=x;base64,aGVs\r\n bG8=", b"hello"),
        ("data:,a%20b%ff,c", b"a b\xff,c"),
        ("data:;base64,", b""),
    ],
)
def test_data_urls(url: str, content: bytes) -> None:
    assert data_url(url, 1000) == content


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64", "http://a/,b", "data:;base64,a", "data:;base64,a*b=", "data:;base64,ä", ""],
)
def test_data_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidRequest, match="data URL"):
        data_url(url, 1000)


def test_data_urls_that_hold_too_much() -> None:
    head = "data:image/png;base64,"
    assert len(data_url(head + base64.b64encode(bytes(1000)).decode(), 1000)) == 1000
    for url in (head + base64.b64encode(bytes(1001)).decode(), head + "A" * 10**6, "data:," + "x" * 1001):
        with pytest.raises(InvalidRequest, match="more than 1000 bytes"):
            data_url(url, 1000)
