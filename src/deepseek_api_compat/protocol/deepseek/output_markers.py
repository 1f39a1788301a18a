"""Answers in the V3, R1 and V3.1 formats: think tags, and calls between special-token markers.

The parser is a small machine: each state takes what it can from the front of the held text and says whether
it got anywhere. Held text is never longer than a marker, or one call's header, which is limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece, TokenLogprob

EOS = "<｜end▁of▁sentence｜>"
THINK, THINK_END = "<think>", "</think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"

HEADER_LIMIT = 512  # characters; the longest name OpenAI allows has 64
_IN_STRING = re.compile(r'["\\]')


@dataclass(frozen=True)
class Layout:
    """How a format writes a call.

    header: from the call's marker to its arguments; group 1 is the name
    ends:   what can end the arguments, outside of JSON strings
    stop:   the characters where the end of arguments or a string can begin
    """

    header: re.Pattern[str]
    ends: tuple[str, ...]
    stop: re.Pattern[str]


V31 = Layout(re.compile(f"{CALL}([^<]*[^<\\s][^<]*){SEP}"), (CALL_END, CALLS_END), re.compile('["<]'))
V3 = Layout(
    re.compile(f"{CALL}[^<]*{SEP}([^<\\n]*[^<\\s][^<\\n]*)\\n```json\\n"),
    tuple(fence + end for fence in ("\n```", "```", "") for end in (CALL_END, CALLS_END)),
    re.compile('["<\\n`]'),
)


def held_tail(text: str, *markers: str) -> int:
    """Length of the longest end of `text` that begins one of the markers (an entire marker too)."""
    for i in range(max(0, len(text) - max(map(len, markers))), len(text)):
        tail = text[i:]
        if any(marker.startswith(tail) for marker in markers):
            return len(tail)
    return 0


class MarkerParser:
    """Parser of one choice. Every split of an output gives events that add up to the same answer.

    A call counts when its end arrived. One that never ends stays as streamed so far, and its finish reason is
    the engine's; markup that never became a call is text.
    """

    def __init__(
        self, layout: Layout, *, reasoning: bool, tools_declared: bool, index: int, new_id: Callable[[], str]
    ) -> None:
        self._layout = layout
        self._tools = tools_declared
        self._index = index
        self._new_id = new_id
        self._held = ""
        self._state = self._think_open if reasoning else self._content
        self._events: list[Event] = []
        self._logprobs: list[TokenLogprob] = []
        self._last = False  # no more text will come
        self._in_string = False
        self._calls = self._complete = 0

    def feed(self, piece: Piece) -> list[Event]:
        """Events of one piece; `Finish` comes with the piece that has `finish`."""
        if self._last:
            return []
        self._held += piece.text
        if piece.logprobs:
            self._logprobs += piece.logprobs
        if piece.finish is not None:
            self._last = True
            self._held = self._held.removesuffix(EOS)
        while self._state():
            pass
        if piece.finish is not None:
            if self._logprobs and self._state == self._content:
                self._events.append(Text(self._index, "", self._logprobs))
            called = self._complete and piece.finish == "stop"
            self._events.append(Finish(self._index, "tool_calls" if called else piece.finish))
        elif self._state == self._content and not self._held and self._logprobs:
            self._text("")  # half a character: its text comes later, its logprobs must not get lost
        events, self._events = self._events, []
        return events

    def close(self) -> list[Event]:
        """Nothing is left to say. Raises EngineFailed if no piece had `finish`."""
        if not self._last:
            raise EngineFailed("The engine's answer ended without saying why.")
        return []

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _text(self, text: str) -> None:
        self._events.append(Text(self._index, text, self._logprobs or None))
        self._logprobs = []

    def _safe(self, *markers: str) -> int:
        """How much of the held text can't be part of a marker."""
        return len(self._held) - (0 if self._last else held_tail(self._held, *markers))

    def _think_open(self) -> bool:
        if not self._last and THINK.startswith(self._held) and self._held != THINK:
            return False
        self._held = self._held.removeprefix(THINK)
        self._state = self._think
        return True

    def _think(self) -> bool:
        end = self._held.find(THINK_END)
        thought = self._take(end if end >= 0 else self._safe(THINK_END, EOS))
        if thought:
            self._events.append(Reasoning(self._index, thought))
        self._logprobs = []
        if end < 0:
            return False
        self._take(len(THINK_END))
        self._state = self._content
        return True

    def _content(self) -> bool:
        start = self._held.find(CALLS) if self._tools else -1
        text = self._take(start if start >= 0 else self._safe(CALLS, EOS))
        if text:
            self._text(text)
        if start >= 0:
            self._state = self._block
        return start >= 0

    def _block(self) -> bool:
        """At a block's marker, or between two calls: all is held until it is a call, an end, or text."""
        after = self._held.removeprefix(CALLS)
        rest = after.lstrip(" \n")
        if rest.startswith(CALLS_END):
            self._held = rest[len(CALLS_END) :]
            self._state = self._content
            return True
        header = self._layout.header.match(rest)
        if header and header.end() <= HEADER_LIMIT:
            self._held = rest[header.end() :]
            call_id, name = self._new_id(), header[1].strip()
            self._events.append(ToolCall(self._index, self._calls, call_id, name))
            self._calls += 1
            self._in_string = False
            self._logprobs = []
            self._state = self._arguments
            return True
        begun = rest.startswith(CALL) or any(mark.startswith(rest) for mark in (CALL, CALLS_END, CALLS))
        if not self._last and (EOS.startswith(rest) or (begun and len(rest) < HEADER_LIMIT)):
            return False
        if after and not rest and self._complete:  # only framing is left after the last call
            self._held = ""
            return False
        if self._held:
            # Past the marker, so that it isn't found again; the rest may hold another block.
            marker = len(self._held) - len(after)
            self._text(self._take(marker or len(after) - len(rest) + (not rest.startswith(CALLS))))
        self._state = self._content
        return True

    def _arguments(self) -> bool:
        held, layout, at, ended = self._held, self._layout, 0, 0
        limit = self._safe(EOS)
        while at < limit:
            found = (_IN_STRING if self._in_string else layout.stop).search(held, at, limit)
            if found is None:
                at = limit
                break
            at = found.start()
            if held[at] == '"':
                self._in_string = not self._in_string
            elif self._in_string:  # a backslash and what it escapes
                if at + 2 > limit and not self._last:
                    break
                at += 1
            else:
                rest = held[at : at + 40]
                end = next((end for end in layout.ends if rest.startswith(end)), "")
                if end:
                    ended = len(end)
                    break
                if not self._last and any(end.startswith(rest) for end in layout.ends):
                    break
            at += 1
        arguments = self._take(min(at, len(held)))
        if arguments:
            self._events.append(ToolCall(self._index, self._calls - 1, arguments=arguments))
        self._logprobs = []
        if ended:
            closes_block = self._take(ended).endswith(CALLS_END)
            self._complete += 1
            self._state = self._content if closes_block else self._block
        return bool(ended)
