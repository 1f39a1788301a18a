"""Answers in the V3.2, V4 and V4.1 formats: think tags, and calls written in DSML tags.

    reasoning</think>text

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">raw text</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>text

V3.2 calls the block `function_calls`; V4.1 `calls`, and has a blank after each tag's bar. Models mix them up,
so each parser reads the tags of all. Framing, which is left out, are two newlines before a block in V3.2; in
V4 and V4.1 all newlines (at most NEWLINES) before a block and before `</think>`, and those where reasoning or
content begin.

What is not as it should be:

- Reasoning ends at the first `</think>`, with the output, or where a block begins with a call in it. Other
  tags in it are reasoning. Later `</think>` are left out in V4 and V4.1, and text in V3.2.
- Text after calls is text. White space in a block, and a block without calls, are left out.
- A block may lack its beginning or its end. Its end also ends an open call, and the next parameter or the end
  of the call an open parameter.
- Parameters with string="false" are passed on as written, be they JSON or not. Without `string=` they are
  JSON if they are that, else a string; beyond HOLD_LIMIT characters those that begin with "{" or "[" are
  taken for JSON and others for a string. Parameters of the same name are all passed on.
- What is no parameter goes into the arguments as it is written, up to the end of the call, without white
  space around it: a call may have its arguments in JSON instead of parameters.
- An output that ends in a call leaves the arguments as far as they were written. Half a tag is left out
  between parameters, and in a value if it has come to its bar.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import msgspec

from deepseek_api_compat.protocol.deepseek.output_reader import (
    HOLD_LIMIT,
    Cut,
    Markers,
    NoCall,
    Reader,
    Reading,
)
from deepseek_api_compat.protocol.deepseek.segments import THINK_END

NEWLINES = 64  # how many can be framing

_NAMES = ("tool_calls", "toolcalls", "function_calls", " calls", "calls")
_BLOCKS = Markers(*(f"<｜DSML｜{name}>" for name in _NAMES))
_BLOCK_ENDS = Markers(*(f"</｜DSML｜{name}>" for name in _NAMES))
_CALLS = Markers('<｜DSML｜invoke name="', '<｜DSML｜ invoke name="')
_CALL_ENDS = Markers("</｜DSML｜invoke>", "</｜DSML｜ invoke>")
_PARAMETERS = Markers('<｜DSML｜parameter name="', '<｜DSML｜ parameter name="')
_VALUE_ENDS = Markers("</｜DSML｜parameter>", "</｜DSML｜ parameter>")

_THINK_END, _THOUGHT_STOPS = Markers(THINK_END), Markers(THINK_END, *_BLOCKS.all)
_CONTENT_STOPS = {  # are there tools, and are stray think tags left out?
    (False, False): Markers(),
    (False, True): _THINK_END,
    (True, False): Markers(*_BLOCKS.all, *_CALLS.all),
    (True, True): Markers(THINK_END, *_BLOCKS.all, *_CALLS.all),
}
_IN_BLOCK = Markers(*_CALLS.all, *_BLOCK_ENDS.all)
_BETWEEN_CALLS = Markers(*_BLOCKS.all, *_IN_BLOCK.all)
_IN_CALL = Markers(*_PARAMETERS.all, *_CALL_ENDS.all, *_BLOCK_ENDS.all)
_BODY_STOPS = Markers(*_CALL_ENDS.all, *_BLOCK_ENDS.all)
_VALUE_STOPS = Markers(*_VALUE_ENDS.all, *_PARAMETERS.all, *_CALL_ENDS.all)
_QUOTE, _TAG_ENDS = Markers('"'), Markers(">", "/>")
_STRING, _JSON, _UNTYPED = '" string="true">', '" string="false">', '">'
_TYPES = Markers(_STRING, _JSON, _UNTYPED)

_SPACE, _NEWLINES, _ATTRIBUTE = re.compile(r"[ \t\r\n]*"), re.compile(r"\n*"), re.compile(r'[^"<]*')
_LIKE_JSON, _BRACKET = re.compile(r'[ \t\r\n]*(?:\Z|[-"\[{tfn0-9])'), re.compile(r"[ \t\r\n]*[\[{]")


class DsmlParser(Reader):
    """Parser of one choice in the V3.2, V4 and V4.1 formats; `trim`: the framing of the latter two."""

    def __init__(
        self, *, trim: bool, start: str, tools_declared: bool, index: int, new_id: Callable[[], str]
    ) -> None:
        super().__init__(start=start, tools_declared=tools_declared, index=index, new_id=new_id)
        self._trim = trim
        self._framing = NEWLINES if trim else 2  # before a block
        self._closed = False  # by its own tag

    def _lead(self) -> Reading[None]:
        """In V4 and V4.1 the newlines where reasoning or content begin."""
        while self._trim:
            self._skip(_end(_NEWLINES, self._held, self._done))
            if self._last or self._done < len(self._held):
                return
            yield

    def _thought(self) -> Reading[None]:
        if not self._continued:
            yield from self._lead()
        stops = _THOUGHT_STOPS if self._tools else _THINK_END
        framing = self._framing if self._trim or self._tools else 0
        while self._thinking and (found := (yield from self._up_to(stops, self._pass, framing))):
            if found != THINK_END:
                yield from self._block(self._at + 1 - self._done)
                continue
            if not self._trim:
                self._pass(self._at)
            self._skip(self._at + len(THINK_END))
            self._thinking = False
            yield from self._lead()

    def _content(self) -> Reading[None]:
        stops, framing = _CONTENT_STOPS[self._tools, self._trim], self._framing if self._tools else 0
        while found := (yield from self._up_to(stops, self._pass, framing)):
            if found == THINK_END:
                self._pass(self._at)
                self._skip(self._at + len(THINK_END))
            else:
                yield from self._block(self._at + 1 - self._done)

    def _header(self) -> Reading[str]:
        self._at = self._done
        yield from self._run(_SPACE)
        found = yield from self._expect(_BETWEEN_CALLS)
        if found in _BLOCKS.all:
            yield from self._run(_SPACE)
            found = yield from self._expect(_IN_BLOCK)
        if found in _BLOCK_ENDS.all:
            return ""
        name = yield from self._run(_ATTRIBUTE)
        yield from self._expect(_QUOTE)
        yield from self._run(_SPACE)
        self._closed = (yield from self._expect(_TAG_ENDS)) == "/>"
        if not name.strip():
            raise NoCall
        return name.strip()

    def _arguments(self) -> Reading[bool]:
        first = True
        while not self._closed:
            try:
                found = yield from self._parameter()
            except Cut:
                self._skip(len(self._held))
                return False
            except NoCall:
                return (yield from self._body())
            if found is None:
                break
            key, kind = found
            self._skip(self._at)
            string = (yield from self._is_string()) if kind == _UNTYPED else kind == _STRING
            opening = ("{" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": "
            self._write(opening + ('"' if string else ""), self._done)
            first = False
            if not (yield from self._value(string)):
                return False
        self._write("" if first else "}", self._at)
        self._end_call(self._at)
        return True

    def _parameter(self) -> Reading[tuple[str, str] | None]:
        """The tag that begins a parameter: its name and its type; None for the call's end. Raises NoCall."""
        yield from self._run(_SPACE)
        found = yield from self._expect(_IN_CALL)
        if found in _BLOCK_ENDS.all:
            self._at -= len(found)
        if found not in _PARAMETERS.all:
            return None
        key = yield from self._run(_ATTRIBUTE)
        return key, (yield from self._expect(_TYPES))

    def _is_string(self) -> Reading[bool]:
        """Is the value that comes next, whose type isn't written, a string?"""
        while True:
            found = _VALUE_STOPS.find(self._held, self._done)
            stop = found.start() if found else _VALUE_STOPS.begun(self._held, self._done)
            limit = self._done + HOLD_LIMIT
            if not _LIKE_JSON.match(self._held, self._done, limit):
                return True
            if stop > limit:
                return not _BRACKET.match(self._held, self._done, limit)
            if found or self._last:
                return not _is_json(self._held[self._done : stop])
            yield

    def _value(self, string: bool) -> Reading[bool]:
        """A parameter's value and its end: did it come?"""
        take = self._take_string if string else self._take
        found = yield from self._up_to(_VALUE_STOPS, take)
        if not found:
            self._leave_open(take)
            return False
        self._write('"' if string else "", self._at + (len(found) if found in _VALUE_ENDS.all else 0))
        return True

    def _body(self) -> Reading[bool]:
        """Arguments that are no parameters, and their end."""
        self._skip(_end(_SPACE, self._held, self._done, self._done + HOLD_LIMIT))
        found = yield from self._up_to(_BODY_STOPS, self._take, NEWLINES)
        if not found:
            self._leave_open(self._take)
            return False
        self._end_call(self._at + (len(found) if found in _CALL_ENDS.all else 0))
        return True

    def _take(self, to: int) -> None:
        self._write(self._held[self._done : to], to)

    def _take_string(self, to: int) -> None:
        self._write(json.dumps(self._held[self._done : to], ensure_ascii=False)[1:-1], to)

    def _leave_open(self, take: Callable[[int], None]) -> None:
        """The output ended before the call did."""
        if "｜" not in self._held[self._done :]:
            take(len(self._held))
        self._skip(len(self._held))


def _end(run: re.Pattern[str], text: str, start: int, limit: int = sys.maxsize) -> int:
    found = run.match(text, start, limit)
    return found.end() if found else start


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
