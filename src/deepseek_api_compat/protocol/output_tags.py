"""Answers of models with a chat template of their own: think tags, and calls as JSON between call tags.

    <think>
    reasoning
    </think>

    text
    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

This is how the Hermes and Qwen models write them; the tags are plain text for most tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.deepseek.output import call_id
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.logprobs import PendingLogprobs

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
STARTS = ("content", "reasoning", "either", "content_continuation", "reasoning_continuation")

HOLD_LIMIT = 65536  # characters

_SPACE = re.compile(r"\s*")
_CLOSING = re.compile(r"[\s}]*")
_SCALAR = re.compile(r"[-+.\w]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]<]')
# Text and escapes that mean something alone; halves of a surrogate pair do not.
_RUN = re.compile(r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}))+')
_HIGH_HALF = re.compile(r"\\u[dD][89abAB]")
_ESCAPE = re.compile(
    r'\\(?:["\\/bfnrt]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4})'
)
_LONE_HALF = re.compile("[\ud800-\udfff]")

_T = TypeVar("_T")
_Reading = Generator[None, None, _T]  # each `yield` waits for more of the output


class _NoCall(Exception):
    """What is read is no call, or no longer one."""


class TagParser:
    """Parser of one choice. Every split of an output gives events that add up to the same answer.

    Reasoning ends at the first `</think>`; before that, a call's tag is text like any other. Framing is left
    out: one newline after `<think>`, one before and two after `</think>`; one before a call, white space that
    is all there is before the first call, and white space between and after calls.

    A call is reported when its name is known and its arguments begin; what is no call by then is text,
    verbatim. A call counts when its end tag arrived, also in place of braces that are missing; surplus
    braces are left out. One that never ends stays as streamed, and what follows it is text.

    Without arguments, or with null, they are `{}`. Arguments in a JSON string are what the string says. Wrong
    JSON in arguments is passed on as written. Of several names or arguments the first counts; other keys are
    left out. Arguments before the name are held until it is known; HOLD_LIMIT bounds all that is held.
    """

    def __init__(
        self, *, start: str, tools_declared: bool, index: int = 0, new_id: Callable[[], str] = call_id
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}.")
        self._tools = tools_declared
        self._index = index
        self._new_id = new_id
        self._thinking = start.startswith("reasoning")
        self._held = ""
        self._at = 0  # read up to here
        self._done = 0  # reported, or left out, up to here
        self._passed = 0  # what came before `_held`
        self._logprobs = PendingLogprobs()
        self._events: list[Event] = []
        self._last = False  # no more text will come
        self._calls = self._complete = 0
        self._reported = self._wrote = False  # the call that is read, and any of its arguments
        self._reading = self._answer(start)

    @property
    def thinking(self) -> bool:
        """Is what comes next reasoning, as far as is known?"""
        return self._thinking

    def feed(self, piece: Piece) -> list[Event]:
        """Events of one piece; `Finish` comes with the piece that has `finish`."""
        if self._last:
            return []
        self._passed += self._done
        self._at -= self._done
        self._held, self._done = self._held[self._done :] + piece.text, 0
        if piece.logprobs:
            self._logprobs.add(piece.logprobs, self._passed + len(self._held))
        self._last = piece.finish is not None
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

    # The answer, from its start to its end.

    def _answer(self, start: str) -> _Reading[None]:
        continued = start.endswith("_continuation")
        if not continued and start != "content":
            yield from self._opening()
        if self._thinking:
            yield from self._thought(continued)
        if self._tools and not continued:
            yield from self._gap(first=True)
        yield from self._content()

    def _opening(self) -> _Reading[None]:
        """The tag that begins the reasoning, if the model writes it."""
        if (yield from self._space_and(THINK)):
            self._thinking = True
            self._skip(self._at)

    def _thought(self, continued: bool) -> _Reading[None]:
        if not continued:
            yield from self._newlines(1)
        while (end := self._held.find(THINK_END, self._done)) < 0:
            self._reason(self._certain(THINK_END))
            if self._last:
                return
            yield
        self._reason(self._framed(end))
        self._skip(end + len(THINK_END))
        self._thinking = False
        yield from self._newlines(2)

    def _content(self) -> _Reading[None]:
        while True:
            call = self._held.find(CALL, self._done) if self._tools else -1
            if call >= 0:
                self._text(self._framed(call))
                self._at = call + len(CALL)
                if (yield from self._call()):
                    yield from self._gap()
                continue
            self._text(self._certain(CALL) if self._tools else len(self._held))
            if self._last:
                return
            yield

    def _gap(self, *, first: bool = False) -> _Reading[None]:
        """Where white space before a call is framing: at the start of the answer, and after each call."""
        while (yield from self._space_and(CALL)):
            if not (yield from self._call()):
                return
            first = False
        if not first and self._ended(_SPACE):
            self._skip(len(self._held))

    # A call.

    def _call(self) -> _Reading[bool]:
        """What follows a call's tag: has a call been reported? If not, tag and framing have become text."""
        self._reported = self._wrote = False
        try:
            yield from self._object()
        except _NoCall:
            if self._reported:
                self._unended()
            else:
                self._text(self._at)
            return self._reported
        self._complete += 1
        self._skip(self._at)
        return True

    def _unended(self) -> None:
        """What follows is text, unless the output was cut within the closing of the call."""
        self._skip(len(self._held) if self._ended(_CLOSING, CALL_END) else self._done)

    def _object(self) -> _Reading[None]:
        """A whole call, with its end tag. Raises _NoCall."""
        name, arguments = "", None
        yield from self._expect("{")
        key = yield from self._key(first=True)
        while key is not None:
            if key == "name" and not name:
                name = yield from self._name()
                if arguments is not None:
                    self._report(name)
                    self._write(arguments)
            elif key in ("arguments", "parameters") and arguments is None:
                arguments = yield from self._arguments(name)
            else:
                yield from self._value(_leave_out)
            key = yield from self._key()
        if not name:
            raise _NoCall
        yield from self._closing()
        if not self._reported:
            self._report(name)
        if not self._wrote:
            self._write("{}")

    def _key(self, *, first: bool = False) -> _Reading[str | None]:
        """The next key and its colon; None where the object ends, or the end tag may be instead."""
        found = yield from self._next()
        if found == "," and not first:
            self._at += 1
            found = yield from self._next()
        elif not first and found not in "}<":
            raise _NoCall
        if found == "}":
            self._at += 1
            if self._reported:
                self._skip(self._at)
        if found in "}<":
            return None
        key = yield from self._string()
        yield from self._expect(":")
        return key

    def _closing(self) -> _Reading[None]:
        """The end tag, perhaps after surplus braces. Raises _NoCall."""
        while True:
            yield from self._more()
            self._at = _end(_CLOSING, self._held, self._at, self._room())
            if self._at < self._room():
                break
        if not (yield from self._follows(CALL_END)):
            raise _NoCall

    def _name(self) -> _Reading[str]:
        name = (yield from self._string()).strip()
        if not name:
            raise _NoCall
        return name

    def _arguments(self, name: str) -> _Reading[str]:
        """The value of the arguments: reported while it is read if the name is known, else returned."""
        kept: list[str] = []
        take = self._write if name else kept.append
        first = yield from self._next()
        scalar = "" if first in '"{[' else (yield from self._scalar())
        if name:
            self._report(name)
        if scalar:
            take(scalar if scalar != "null" else "")
        else:
            yield from self._value(take)
        if name:
            self._skip(self._at)
        return "".join(kept)

    def _report(self, name: str) -> None:
        self._events.append(ToolCall(self._index, self._calls, self._new_id(), name))
        self._calls += 1
        self._reported = True
        self._skip(self._at)

    def _write(self, arguments: str) -> None:
        if arguments:
            self._events.append(ToolCall(self._index, self._calls - 1, arguments=arguments))
            self._wrote = True
        self._skip(self._at)

    # JSON. `take` gets the parts of a value as they come; all raise _NoCall.

    def _value(self, take: Callable[[str], None]) -> _Reading[None]:
        """Any value; of a string what it says, of others their JSON."""
        first = yield from self._next()
        if first == '"':
            yield from self._unquoted(take)
        elif first in "{[":
            yield from self._nested(take)
        else:
            take((yield from self._scalar()))

    def _scalar(self) -> _Reading[str]:
        text = ""
        while True:
            start, self._at = self._at, _end(_SCALAR, self._held, self._at, self._room())
            text += self._held[start : self._at]
            if self._at < self._room():
                break
            yield from self._more()
        if not text:
            raise _NoCall
        return text

    def _string(self) -> _Reading[str]:
        """A whole string; one that breaks the line is none, so that a lost quote can't hide the next call."""
        yield from self._expect('"')
        text = ""
        while True:
            yield from self._more()
            start, self._at = self._at, _end(_PLAIN, self._held, self._at, self._room())
            text += self._held[start : self._at]
            if self._at == self._room():
                continue
            mark = self._held[self._at]
            if mark == "\\":
                text += yield from self._escape()
                continue
            if mark != '"':
                raise _NoCall
            self._at += 1
            return text

    def _unquoted(self, take: Callable[[str], None]) -> _Reading[None]:
        yield from self._expect('"')
        while True:
            yield from self._more()
            start, self._at = self._at, _end(_RUN, self._held, self._at, self._room())
            if self._at > start:
                take(json.loads(f'"{self._held[start : self._at]}"', strict=False))
            elif self._held[self._at] == "\\":
                take((yield from self._escape()))
            else:
                self._at += 1
                return

    def _escape(self) -> _Reading[str]:
        """What an escape stands for; what is none stays as it is written, and half a pair is U+FFFD."""
        while len(self._held) - self._at < self._escape_length() and not self._last:
            yield
        found = _ESCAPE.match(self._held, self._at)
        if found is None:
            self._at += 1
            return "\\"
        self._at = found.end()
        return _LONE_HALF.sub("\ufffd", json.loads(f'"{found[0]}"'))

    def _escape_length(self) -> int:
        if not self._held.startswith("\\u", self._at):
            return 2
        return 12 if _HIGH_HALF.match(self._held, self._at) else 6

    def _nested(self, take: Callable[[str], None]) -> _Reading[None]:
        """An object or a list as it is written, up to its end or the end tag of the call."""
        depth, quoted = 0, False
        jump = 0  # characters to pass over: what a backslash escapes, or a "<" that begins no end tag
        while True:
            yield from self._more()
            held, start, end = self._held, self._at, self._room()
            at, tag = start + jump, False
            while at < end:
                found = (_IN_STRING if quoted else _OUTSIDE).search(held, at, end)
                if found is None:
                    at = end
                    break
                at, mark = found.end(), found[0]
                if mark == "\\":
                    at += 1
                elif mark == '"':
                    quoted = not quoted
                elif mark == "<":
                    at, tag = at - 1, True
                    break
                else:
                    depth += 1 if mark in "{[" else -1
                    if not depth:
                        break
            jump = max(0, at - end)
            self._at = at - jump
            take(held[start : self._at])
            if not depth:
                return
            if tag:
                if (yield from self._follows(CALL_END)):
                    self._at -= len(CALL_END)
                    return
                jump = 1

    # Waiting. What is held is read no further than HOLD_LIMIT, whatever the split.

    def _room(self) -> int:
        return min(len(self._held), self._done + HOLD_LIMIT)

    def _more(self) -> _Reading[None]:
        """Waits for a character. Raises _NoCall where none will come, and at the limit."""
        while self._at >= self._room():
            if self._last or self._at >= self._done + HOLD_LIMIT:
                raise _NoCall
            yield

    def _space(self) -> _Reading[None]:
        """Passes over white space. Raises _NoCall as `_more`."""
        while True:
            yield from self._more()
            self._at = _end(_SPACE, self._held, self._at, self._room())
            if self._at < self._room():
                return

    def _next(self) -> _Reading[str]:
        """The next character that is no white space."""
        yield from self._space()
        return self._held[self._at]

    def _expect(self, character: str) -> _Reading[None]:
        if (yield from self._next()) != character:
            raise _NoCall
        self._at += 1

    def _follows(self, tag: str) -> _Reading[bool]:
        """Passes over the tag if it comes next."""
        while (
            not self._last
            and len(self._held) - self._at < len(tag)
            and tag.startswith(self._held[self._at :])
        ):
            yield
        found = self._held.startswith(tag, self._at)
        self._at += len(tag) if found else 0
        return found

    def _space_and(self, tag: str) -> _Reading[bool]:
        """Passes over white space and the tag, if they come next."""
        self._at = self._done
        try:
            yield from self._space()
        except _NoCall:
            return False
        return (yield from self._follows(tag))

    def _ended(self, framing: re.Pattern[str], tag: str = "") -> bool:
        """Has the output ended with nothing left but framing, and perhaps the beginning of a tag?"""
        held, left = self._held, len(self._held) - self._done
        at = _end(framing, held, self._done, len(held))
        return self._last and left < HOLD_LIMIT and len(held) - at <= len(tag) and tag.startswith(held[at:])

    def _newlines(self, most: int) -> _Reading[None]:
        """Leaves out newlines."""
        for _ in range(most):
            while self._done == len(self._held) and not self._last:
                yield
            if not self._held.startswith("\n", self._done):
                return
            self._skip(self._done + 1)

    # What was read is reported, or left out. The logprobs of tokens go with text, or nowhere.

    def _certain(self, tag: str) -> int:
        """How far the held text is neither part of the tag nor the newline before it."""
        end = len(self._held)
        if self._last:
            return end
        begun = self._held.rfind("<", max(self._done, end - len(tag) + 1))
        if begun >= 0 and tag.startswith(self._held[begun:]):
            end = begun
        return self._framed(end)

    def _framed(self, at: int) -> int:
        return at - 1 if at > self._done and self._held[at - 1] == "\n" else at

    def _text(self, to: int) -> None:
        text, logprobs = self._held[self._done : to], self._logprobs.take(self._passed + to)
        if text or logprobs:
            self._events.append(Text(self._index, text, logprobs))
        self._at = self._done = to

    def _reason(self, to: int) -> None:
        if to > self._done:
            self._events.append(Reasoning(self._index, self._held[self._done : to]))
        self._skip(to)

    def _skip(self, to: int) -> None:
        self._logprobs.take(self._passed + to)
        self._at = self._done = to


def _end(pattern: re.Pattern[str], text: str, at: int, limit: int) -> int:
    """Where the longest match at a place ends."""
    found = pattern.match(text, at, limit)
    return found.end() if found else at


def _leave_out(text: str) -> None:
    """Takes a value that nobody needs."""
