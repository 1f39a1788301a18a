"""What the parsers of DeepSeek's formats share: how an output is taken in, waited for, and passed on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TypeVar

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.deepseek.segments import EOS, THINK
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.logprobs import PendingLogprobs

STARTS = ("content", "reasoning", "either", "tool_calls", "content_continuation", "reasoning_continuation")

# Characters from the framing before a call to the end of its header: the longest name OpenAI allows has 64.
HOLD_LIMIT = 512

_T = TypeVar("_T")
Reading = Generator[None, None, _T]  # each `yield` waits for more of the output


class NoCall(Exception):
    """What is read is not what was looked for: a call, or a part of one."""


class Cut(NoCall):
    """The output ended while it still looked like that."""


class Markers:
    """What a reader looks for: any of several spellings, of which none begins another."""

    def __init__(self, *spellings: str) -> None:
        self.all = spellings
        self.longest = max(map(len, spellings), default=0)
        self.find = re.compile("|".join(map(re.escape, spellings)) or "(?!)").search

    def begun(self, text: str, start: int = 0) -> int:
        """Where `text`, from `start` on, ends in the beginning of a marker, or a whole one; else its length.

        Only for markers whose first character is their only "<".
        """
        at = text.rfind("<", max(start, len(text) - self.longest))
        if at >= 0 and any(marker.startswith(text[at:]) for marker in self.all):
            return at
        return len(text)


_EOS, _THINK, _NEWLINE = Markers(EOS), Markers(THINK), Markers("\n")


class Reader(ABC):
    """Parser of one choice. Every split of an output gives events that add up to the same answer.

    A format says in the abstract methods how it writes an answer, as generators that yield where they need
    more of it. What is held begins at `_done` in `_held`; it is read up to `_at`. Both move with it when more
    comes, so no other place in it may be kept over a `yield`.

    Held is at most what may be the beginning of a marker, where a marker is also the header of a call or the
    tag of a parameter, which HOLD_LIMIT bounds; and a value of unknown type, up to that limit.

    A call is reported when its header is complete. What never gets there is text, verbatim. A call counts
    when its end arrived; one that never ends stays as streamed. One EOS token at the very end is left out.
    The logprobs of tokens go with text, or nowhere.
    """

    def __init__(self, *, start: str, tools_declared: bool, index: int, new_id: Callable[[], str]) -> None:
        self._tools = tools_declared
        self._index = index
        self._new_id = new_id
        self._continued = start.endswith("_continuation")
        self._thinking = start.startswith("reasoning")
        self._held = ""
        self._at = self._done = 0
        self._passed = 0  # what came before `_held`
        self._eos = ""  # what may be the EOS token, and is not in `_held` yet
        self._last = False  # no more will come
        self._logprobs = PendingLogprobs()
        self._events: list[Event] = []
        self._calls = self._complete = 0
        self._wrote = False  # any arguments of the last call
        self._reading = self._answer(start)

    @property
    def thinking(self) -> bool:
        """Is what comes next reasoning, as far as is known?"""
        return self._thinking

    def feed(self, piece: Piece) -> list[Event]:
        """Events of one piece; `Finish` comes with the piece that has `finish`, and nothing after it."""
        if self._last:
            return []
        self._take_in(piece)
        next(self._reading, None)
        if piece.finish is not None:
            called = self._complete and piece.finish == "stop"
            self._events.append(Finish(self._index, "tool_calls" if called else piece.finish))
        events, self._events = self._events, []
        return events

    def close(self) -> list[Event]:
        """Nothing is left to say. Raises EngineFailed if no piece had `finish`."""
        if not self._last:
            raise EngineFailed("The engine's answer ended without saying why.")
        return []

    def _take_in(self, piece: Piece) -> None:
        self._passed += self._done
        self._at -= self._done
        self._held, self._done = self._held[self._done :], 0
        text = self._eos + piece.text
        if piece.logprobs:
            self._logprobs.add(piece.logprobs, self._passed + len(self._held) + len(text))
        self._last = piece.finish is not None
        sure = len(text.removesuffix(EOS)) if self._last else _EOS.begun(text)
        self._eos = text[sure:]
        self._held += text[:sure]

    # The answer, from its start to its end.

    def _answer(self, start: str) -> Reading[None]:
        if start in ("reasoning", "either"):
            yield from self._opening()
        if self._thinking:
            yield from self._thought()
        elif start == "tool_calls":
            yield from self._block(0)
        elif not self._continued:
            yield from self._lead()
        yield from self._content()
        self._pass(len(self._held))  # half a marker: it was none

    def _opening(self) -> Reading[None]:
        """The tag that begins the reasoning, and a newline after it, if the model writes them itself."""
        try:
            if (yield from self._one_of(_THINK)):
                self._thinking = True
                self._skip(self._at)
                yield from self._one_of(_NEWLINE)
                self._skip(self._at)
        except Cut:
            return

    @abstractmethod
    def _thought(self) -> Reading[None]:
        """The reasoning, and what ends it."""

    def _lead(self) -> Reading[None]:
        """What is left out where the content begins."""
        yield from ()

    @abstractmethod
    def _content(self) -> Reading[None]:
        """The content, and the calls in it, up to the end of the output."""

    def _block(self, begun: int) -> Reading[None]:
        """Calls, and the end of their block. If no call comes first, `begun` characters are text."""
        while True:
            try:
                name = yield from self._header()
            except NoCall as why:
                if begun:
                    self._pass(self._done + begun)
                elif isinstance(why, Cut) and not self._held[self._done :].strip():
                    self._skip(len(self._held))
                return
            self._skip(self._at)
            if not name:
                return
            self._report(name)
            if not (yield from self._arguments()):
                return
            begun = 0

    @abstractmethod
    def _header(self) -> Reading[str]:
        """From `_done` to where a call's arguments begin: its name; "" for a block's end. Raises NoCall."""

    @abstractmethod
    def _arguments(self) -> Reading[bool]:
        """The arguments of a call, and its end: may another call follow?"""

    # Waiting.

    def _up_to(self, stops: Markers, take: Callable[[int], None], framing: int = 0) -> Reading[str]:
        """Takes all up to the next of `stops`, which begins at `_at` then; "" if the output ends first.

        Left are that many newlines before it; at the end of the output what may have been half of one.
        """
        while True:
            found = stops.find(self._held, self._done)
            sure = found.start() if found else stops.begun(self._held, self._done)
            take(sure if self._last and not found else self._before_newlines(sure, framing))
            if found:
                self._at = sure
                return found[0]
            if self._last:
                return ""
            yield

    def _before_newlines(self, at: int, most: int) -> int:
        if not most:
            return at
        start = max(self._done, at - most)
        return start + len(self._held[start:at].rstrip("\n"))

    # The others raise NoCall at HOLD_LIMIT, and Cut at the end of the output.

    def _run(self, characters: re.Pattern[str]) -> Reading[str]:
        """The longest run of characters that comes next, perhaps empty."""
        run = ""
        while True:
            limit = self._done + HOLD_LIMIT
            found = characters.match(self._held, self._at, limit)
            if found:
                run, self._at = run + found[0], found.end()
            if self._at >= limit:
                raise NoCall
            if self._at < len(self._held):
                return run
            yield from self._more()

    def _one_of(self, markers: Markers) -> Reading[str]:
        """The marker that comes next; "" if none does."""
        while True:
            for marker in markers.all:
                if self._held.startswith(marker, self._at):
                    self._at += len(marker)
                    if self._at > self._done + HOLD_LIMIT:
                        raise NoCall
                    return marker
            rest = self._held[self._at : self._at + markers.longest]
            if not any(marker.startswith(rest) for marker in markers.all):
                return ""
            yield from self._more()

    def _expect(self, markers: Markers) -> Reading[str]:
        """The marker that comes next. Raises NoCall if none does."""
        if not (found := (yield from self._one_of(markers))):
            raise NoCall
        return found

    def _more(self) -> Reading[None]:
        if self._last:
            raise Cut
        yield

    # What was read is passed on, or left out.

    def _pass(self, to: int) -> None:
        """As reasoning or text."""
        if self._thinking:
            if to > self._done:
                self._events.append(Reasoning(self._index, self._held[self._done : to]))
            self._skip(to)
            return
        text, logprobs = self._held[self._done : to], self._logprobs.take(self._passed + to)
        if text or logprobs:
            self._events.append(Text(self._index, text, logprobs))
        self._at = self._done = to

    def _report(self, name: str) -> None:
        self._thinking = False
        self._events.append(ToolCall(self._index, self._calls, self._new_id(), name))
        self._calls += 1
        self._wrote = False

    def _write(self, arguments: str, to: int) -> None:
        """What is held up to there means these arguments."""
        if arguments:
            self._events.append(ToolCall(self._index, self._calls - 1, arguments=arguments))
            self._wrote = True
        self._skip(to)

    def _end_call(self, to: int) -> None:
        """What is held up to there ended the call."""
        self._write("" if self._wrote else "{}", to)
        self._complete += 1

    def _skip(self, to: int) -> None:
        self._logprobs.take(self._passed + to)
        self._at = self._done = to
