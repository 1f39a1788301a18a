"""Pieces of an engine's output become events, incrementally and without losing text."""

from __future__ import annotations

from typing import Protocol

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.events import Event, Finish, Text
from deepseek_api_compat.protocol.job import Piece


class Parser(Protocol):
    """Reads the output of one choice. Events add up to the same answer whatever the split of the output."""

    @property
    def thinking(self) -> bool:
        """Is what comes next reasoning, as far as is known?"""

    def feed(self, piece: Piece) -> list[Event]:
        """Events of one piece; `Finish` comes with the piece that has `finish`, and nothing after it."""

    def close(self) -> list[Event]:
        """What was held back until the end. Raises EngineFailed if no piece had `finish`."""


class OutputParser:
    """Parser of the plain format: all output is the answer's text."""

    thinking = False

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._finished = False

    def feed(self, piece: Piece) -> list[Event]:
        """Events of one piece; `Finish` comes with the piece that has `finish`."""
        events: list[Event] = []
        # Text may lag behind tokens (half a character), but their logprobs must not get lost.
        if piece.text or piece.logprobs:
            events.append(Text(self._index, piece.text, piece.logprobs))
        if piece.finish is not None and not self._finished:
            self._finished = True
            events.append(Finish(self._index, piece.finish))
        return events

    def close(self) -> list[Event]:
        """What was held back until the end. Raises EngineFailed if no piece had `finish`."""
        if not self._finished:
            raise EngineFailed("The engine's answer ended without saying why.")
        return []
