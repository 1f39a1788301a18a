"""What operators do, as it is written down: who did what to which key, and when. Never a secret.

Entries are only ever added: the database itself refuses to change or delete one.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec


class Actor(msgspec.Struct, frozen=True):
    """Who does something.

    key      an API key with this id, over HTTP; `request_id` is the request's
    user     a user of this machine with this number (uid), by a command
    service  the service itself, at its first start
    """

    kind: Literal["key", "user", "service"]
    id: str
    request_id: str | None = None


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done. `number` grows by at least 1 with each; `at` is in unix milliseconds.

    `changes` are the fields of the key that have another value now, and that value, as `keys.get` shows them.
    """

    number: int = 0
    at: int
    actor: Actor
    op: str
    key_id: str
    key_name: str
    changes: dict[str, Any]


def this_user() -> Actor:
    """The user that runs this process."""
    return Actor("user", str(os.getuid()))
