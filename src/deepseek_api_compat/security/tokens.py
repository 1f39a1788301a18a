"""Temporary tokens: JSON Web Tokens (RFC 7519) that a key's owner signs without asking this service.

    header   {"alg": "HS256", "typ": "JWT"}
    claims   sub: the key's id; iat, nbf, exp: unix seconds; jti: an id of the token's own; and, to narrow
             what the token may do, models: names, networks: CIDR strings, max_tokens: of one answer
    secret   the key's secret_key as it is shown: 64 hexadecimal digits, as ASCII bytes

Everything is checked strictly, and a claim that is not listed here refuses the token: it may have been meant
to narrow it.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Sequence
from typing import Annotated

import jwt
import msgspec
from jwt.api_jws import PyJWS

from deepseek_api_compat.errors import AuthenticationFailed

ALGORITHM = "HS256"
LEEWAY = 60  # seconds that the clock of whoever made a token may be wrong
MAX_LIFETIME = 86_400  # seconds from iat to exp; for longer, make a key that expires
MAX_LENGTH = 4096  # bytes of a token
MAX_ITEMS = 100  # models or networks in one token
MAX_TOKENS = 2**31

_FORM = re.compile(rb"[A-Za-z0-9_-]{2,1024}\.[A-Za-z0-9_-]{2,4096}\.[A-Za-z0-9_-]{2,1024}")
_Word = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,64}\Z")]
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_Item = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Items = Annotated[tuple[_Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]


class Claims(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a token says; times in unix seconds. None: as wide as the key is."""

    sub: _Word
    iat: _Time
    nbf: _Time
    exp: _Time
    jti: _Word
    models: _Items | None = None
    networks: _Items | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None


class _Header(msgspec.Struct):
    # Other fields (typ, kid) say nothing that is needed here; those in `crit` would have to be understood.
    alg: str
    crit: msgspec.Raw | None = None


_headers = msgspec.json.Decoder(_Header)
_claims = msgspec.json.Decoder(Claims)
_signatures = PyJWS(algorithms=[ALGORITHM])


def issue(
    key_id: str,
    secret_key: str,
    *,
    expires_in: float,
    models: Sequence[str] | None = None,
    networks: Sequence[str] | None = None,
    max_tokens: int | None = None,
    now: float | None = None,
) -> str:
    """A token that is good for `expires_in` seconds from `now` (unix seconds; the clock's, if not given).

    Raises ValueError, in words that fit after a colon, for a value that no token may have.
    """
    if not 1 <= expires_in <= MAX_LIFETIME:
        raise ValueError(f"it must live 1 to {MAX_LIFETIME} seconds")
    begin = int(time.time() if now is None else now)
    claims = Claims(
        sub=key_id,
        iat=begin,
        nbf=begin,
        exp=begin + int(expires_in),
        jti=secrets.token_hex(8),
        models=None if models is None else tuple(models),
        networks=None if networks is None else tuple(networks),
        max_tokens=max_tokens,
    )
    plain = msgspec.to_builtins(claims)
    try:
        msgspec.convert(plain, Claims)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    token = jwt.encode(plain, secret_key, algorithm=ALGORITHM)
    if len(token) > MAX_LENGTH:
        raise ValueError(f"it would be longer than {MAX_LENGTH} bytes; name fewer models or networks")
    return token


def read(token: bytes) -> Claims:
    """The claims of a token, with its signature and times yet to be checked. Raises AuthenticationFailed."""
    if len(token) > MAX_LENGTH:
        raise AuthenticationFailed(f"The token is longer than {MAX_LENGTH} bytes.")
    if not _FORM.fullmatch(token):
        raise AuthenticationFailed("The token is malformed: it must be a JWT of three parts in base64url.")
    header, claims, _ = token.split(b".")
    try:
        _check_header(_headers.decode(_decoded(header)))
        return _claims.decode(_decoded(claims))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, msgspec.ValidationError) else "it is not JSON in base64url"
        raise AuthenticationFailed(f"The token is malformed: {problem}.") from None


def is_signed_by(token: bytes, secret_key: str) -> bool:
    """Whether this secret key signed a token that `read` has accepted."""
    try:
        _signatures.decode(token, secret_key, algorithms=[ALGORITHM])
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        return False
    return True


def check_times(claims: Claims, now: float) -> tuple[float, float]:
    """Since when and until when a token is good. Raises AuthenticationFailed if it is not at `now`."""
    if claims.exp - claims.iat > MAX_LIFETIME:
        raise AuthenticationFailed(
            f"The token asks to live longer than {MAX_LIFETIME} s (exp less iat).", code="scope_too_wide"
        )
    since, until = max(claims.nbf, claims.iat) - LEEWAY, claims.exp + LEEWAY
    if now >= until:
        raise AuthenticationFailed(
            f"The token expired {now - claims.exp:.0f} s ago. If it is new, check the clock that made it.",
            code="token_expired",
        )
    if now < since:
        raise AuthenticationFailed(
            f"The token is good only in {since - now:.0f} s. Check the clock that made it.",
            code="token_not_yet_valid",
        )
    return since, until


def _decoded(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def _check_header(header: _Header) -> None:
    if header.alg != ALGORITHM:
        raise AuthenticationFailed(
            f"The token's algorithm must be {ALGORITHM}; the key's secret_key signs it.", code="bad_algorithm"
        )
    if header.crit is not None:
        raise AuthenticationFailed("The token's header has crit, which this service does not know.")
