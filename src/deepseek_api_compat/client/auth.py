"""Temporary tokens, made from a key and its secret key without asking the service.

Format: docs/keys.md. Nothing but the standard library is needed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

MAX_LIFETIME = 86_400.0  # seconds that the service lets a token live
MOST_MARGIN = 60.0  # seconds before its end in which a token is no longer handed out, at most
_HEADER = b'{"alg":"HS256","typ":"JWT"}'
_KEY = re.compile(r"DSK-([!-,.-~]{1,64})(-.*)?")


class AuthManager:
    """Makes temporary tokens for an API key: `OpenAI(auth=AuthManager(...))` sends them, and any client can.

    api_key: `DSK-<id>-<random>`; only the id goes into a token, and `DSK-<id>` is enough.
    secret_key: what was shown with the key when it was made; it signs, and is never sent.
    expires_in: seconds that a token is good for, 1 to 86400.
    models, networks, max_tokens: what the tokens are narrowed to, within what the key may do.

    May be used by any number of threads and tasks. The service's clock decides: it forgives a minute. Raises
    ValueError for what no token may have.
    """

    def __init__(
        self,
        api_key: str,
        secret_key: str,
        expires_in: float = 3600,
        *,
        models: Sequence[str] | None = None,
        networks: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        found = _KEY.fullmatch(api_key)
        if not found:
            raise ValueError("api_key must be a key of this service: DSK-<id>-<random>.")
        if not secret_key:
            raise ValueError("secret_key is empty; it was shown when the key was made.")
        if not 1 <= expires_in <= MAX_LIFETIME:
            raise ValueError(f"expires_in must be 1 to {MAX_LIFETIME:.0f} seconds.")
        if isinstance(models, str) or isinstance(networks, str):
            raise ValueError("models and networks are lists, of names and of networks.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError("max_tokens must be at least 1.")
        self.key_id = found[1]
        self.expires_in = math.floor(expires_in)
        self._secret = secret_key.encode()
        scope = {"models": models, "networks": networks}
        self._scope: dict[str, Any] = {name: [*items] for name, items in scope.items() if items is not None}
        if max_tokens is not None:
            self._scope["max_tokens"] = max_tokens
        self._lock = threading.Lock()
        self._token = ""
        self._made = (0.0, 0.0)  # by the wall clock, which may jump, and by one that does not

    def __repr__(self) -> str:
        return f"AuthManager({self.key_id!r}, expires_in={self.expires_in})"

    def generate_token(self) -> str:
        """A new token, good from now on for `expires_in` seconds."""
        now = int(time.time())
        claims = {
            "sub": self.key_id,
            "iat": now,
            "nbf": now,
            "exp": now + self.expires_in,
            "jti": secrets.token_hex(8),
            **self._scope,
        }
        signed = _encoded(_HEADER) + b"." + _encoded(json.dumps(claims, separators=(",", ":")).encode())
        signature = hmac.digest(self._secret, signed, hashlib.sha256)
        return (signed + b"." + _encoded(signature)).decode()

    def token(self) -> str:
        """A token that is good for a while yet: the last one, or a new one before that ends."""
        good_for = self.expires_in - min(MOST_MARGIN, self.expires_in / 4)
        with self._lock:
            ages = (time.time() - self._made[0], time.monotonic() - self._made[1])
            if not self._token or min(ages) < 0 or max(ages) >= good_for:
                self._made = (time.time(), time.monotonic())
                self._token = self.generate_token()
            return self._token


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
