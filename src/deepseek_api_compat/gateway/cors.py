"""Which pages of other sites may call the service from a browser (the Fetch standard's CORS protocol)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepseek_api_compat.gateway.response import Headers

MAX_AGE = 600  # seconds for which a browser need not ask again

_METHODS = b"access-control-allow-methods: GET, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
_EXPOSED = (
    b"access-control-expose-headers: x-request-id, retry-after, x-ratelimit-limit-requests,"
    b" x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens,"
    b" x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens\r\n"
)
_VARY = b"vary: origin\r\n"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_\-]+(?:[ \t]*,[ \t]*[A-Za-z0-9_\-]+)*")
_MAX_HEADER_NAMES = 4096  # bytes


class Cors:
    """Origins whose pages may read answers.

    Never `*`, and never Access-Control-Allow-Credentials: a key is sent by the page's own code, not by the
    browser.

    Failure policy: what is not listed gets no CORS header, so that the browser keeps answers from it.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins`: as browsers send them, scheme://host or scheme://host:port."""
        self._allow = {
            origin.encode(): b"access-control-allow-origin: %b\r\n" % origin.encode() for origin in origins
        }

    def headers(self, origin: bytes) -> Headers:
        """For any answer. `origin`: the request's Origin header, empty if it has none."""
        allow = self._allow.get(origin)
        return [_VARY] if allow is None else [allow, _EXPOSED, _VARY]

    def preflight(self, origin: bytes, method: bytes, names: bytes) -> Headers | None:
        """For an OPTIONS request that is a preflight from a listed origin; None for any other.

        `method`, `names`: the headers Access-Control-Request-Method and -Headers. The answer is the same for
        every path and method: it tells nothing of what is there.
        """
        allow = self._allow.get(origin)
        if allow is None or not method:
            return None
        found = [allow, _VARY, _METHODS, b"access-control-max-age: %d\r\n" % MAX_AGE]
        if len(names) <= _MAX_HEADER_NAMES and _HEADER_NAMES.fullmatch(names):
            # Whatever the page wants to send: clients have headers of their own (x-stainless-...), and none
            # of them means anything here. A `*` would not hold for Authorization.
            found.append(b"access-control-allow-headers: %b\r\n" % names)
        return found
