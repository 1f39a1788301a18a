"""Files that clients name by URL, fetched without letting them reach the network behind the server.

The host is resolved once and every address checked; the connection goes to a checked address and nowhere
else, so a name that resolves differently the second time (DNS rebinding) gains nothing. A redirect is a
new URL, checked like the first. What goes wrong is told without addresses and without a word of what was
answered: an error must not be a way to look around inside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import cache
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import httpx

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.media.addresses import Network, allowed

Resolver = Callable[[str, int], Awaitable[list[str]]]

INVALID, TOO_LARGE = "invalid_url", "file_too_large"  # codes of the errors
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_CHUNK = 1 << 16  # bytes
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "deepseek-api-compat"}


class FetchLimits(NamedTuple):
    """How much a fetch may take: bytes of the file, seconds for the whole of it.

    networks: private networks that may be fetched from all the same.
    """

    max_bytes: int
    timeout: float
    max_redirects: int = 3
    networks: tuple[Network, ...] = ()


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system knows them. Raises OSError, UnicodeError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reads some hundred certificates: once


async def fetch(
    url: str, limits: FetchLimits, *, resolver: Resolver = resolve, tls: ssl.SSLContext | None = None
) -> bytes:
    """The file at an http or https URL.

    Raises InvalidRequest: another scheme, a sign-in in the URL, an address that is not public, a redirect
    too many or from https to http, an answer other than 200, a compressed, too large or too slow one.
    """
    try:
        return await asyncio.wait_for(_follow(url, limits, resolver, tls), limits.timeout)
    except (asyncio.TimeoutError, httpx.TimeoutException):
        raise _refused(f"The file at the URL did not come within {limits.timeout:g} s.") from None
    except (httpx.HTTPError, httpx.StreamError):
        raise _refused("The file at the URL could not be fetched: its server can't be talked to.") from None


def data_url(url: str, max_bytes: int) -> bytes:
    """The file inside a `data:` URL, base64 or percent-encoded.

    Raises InvalidRequest when it can't be decoded or has more than `max_bytes`. Decoding many megabytes
    takes tens of milliseconds: in an event loop, call it in a thread.
    """
    head, comma, data = url.partition(",")
    if not comma or not head[:5].lower() == "data:":
        raise _refused("The data URL is not one: it has to look like 'data:image/png;base64,...'.")
    encoded = head.lower().endswith(";base64")
    if len(data) > (5 if encoded else 3) * max_bytes + 100:  # each byte may be %XX
        raise _too_large(max_bytes)
    content = unquote_to_bytes(data) if "%" in data or not encoded else data.encode("utf-8", "replace")
    if encoded:
        content = b"".join(content.split())
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise _refused("The data URL can't be decoded: what it holds is not base64.") from None
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


async def _follow(url: str, limits: FetchLimits, resolver: Resolver, tls: ssl.SSLContext | None) -> bytes:
    target = _parse(url)
    if tls is None:
        tls = await asyncio.to_thread(_tls)
    for _ in range(limits.max_redirects + 1):
        addresses = await _checked(target, limits, resolver)
        answer = await _get(target, addresses, limits, tls)
        if isinstance(answer, bytes):
            return answer
        following = _parse(answer, target)
        if target.scheme == "https" and following.scheme != "https":
            raise _refused("The URL redirects from https to http.")
        target = following
    raise _refused(f"The URL redirects more than {limits.max_redirects} times.")


def _parse(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """A URL that may be looked up. Raises InvalidRequest."""
    try:
        target = httpx.URL(url) if base is None else base.join(url)
    except httpx.InvalidURL:
        raise _refused("The URL is malformed.") from None
    if target.scheme not in _PORTS:
        raise _refused("Only http, https and data URLs are read.")
    if target.userinfo:
        raise _refused("The URL has a user name or password in it; such URLs are not fetched.")
    if not target.raw_host or not 0 < _port(target) < 1 << 16:
        raise _refused("The URL names no host, or a port that can't be.")
    return target


def _port(url: httpx.URL) -> int:
    return _PORTS[url.scheme] if url.port is None else url.port


async def _checked(url: httpx.URL, limits: FetchLimits, resolver: Resolver) -> list[str]:
    try:
        addresses = await resolver(url.raw_host.decode("ascii"), _port(url))
    except (OSError, UnicodeError):
        raise _refused("The URL's host is not known.") from None
    # All of them: a name with one address inside and one outside is a trick, or a mistake.
    if not addresses or not all(allowed(address, limits.networks) for address in addresses):
        raise _refused("The URL leads to an address that files are not fetched from.")
    return list(dict.fromkeys(addresses))


async def _get(url: httpx.URL, addresses: list[str], limits: FetchLimits, tls: ssl.SSLContext) -> bytes | str:
    """The file, or where it is said to be. Raises InvalidRequest and what httpx raises."""
    # A client of its own for each URL: no cookie and no connection goes from one to the next.
    async with httpx.AsyncClient(verify=tls, trust_env=False, timeout=limits.timeout) as http:
        for address in addresses[:-1]:
            try:
                return await _ask(http, url, address, limits)
            except httpx.ConnectError:  # not there: nothing has been sent yet
                continue
        return await _ask(http, url, addresses[-1], limits)


async def _ask(http: httpx.AsyncClient, url: httpx.URL, address: str, limits: FetchLimits) -> bytes | str:
    name = url.raw_host.decode("ascii").rstrip(".")
    async with http.stream(
        "GET",
        url.copy_with(host=address),
        headers={**_HEADERS, "Host": url.netloc.decode("ascii")},
        extensions={"sni_hostname": name},  # the certificate has to be for this name, too
    ) as response:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            return response.headers["location"]
        if response.status_code != httpx.codes.OK:
            raise _refused("There is no file to be had at the URL.")
        if response.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise _refused("The file at the URL comes compressed, though it was asked for as it is.")
        return await _body(response, limits.max_bytes)


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"The file has more than {max_bytes} bytes, the most that is read.", code=TOO_LARGE)


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, code=INVALID)
