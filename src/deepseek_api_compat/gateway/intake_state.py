"""How the ledger's intake is doing, as the supervisor tells its workers."""

from __future__ import annotations

import msgspec


class IntakeState(msgspec.Struct, frozen=True):
    """How the intake is doing.

    lag_seconds: since when nothing could be taken in; 0 if the last round took in everything.
    pending: bytes of journals that may still have to be taken in, at most. damaged: places in journals that
    could not be read since the start. problem: a sentence, or None.
    """

    lag_seconds: float = 0.0
    pending: int = 0
    damaged: int = 0
    problem: str | None = None
