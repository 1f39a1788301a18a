"""Answers in the V3.2, V4 and V4.1 formats: think tags, and calls written in DSML tags."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from deepseek_api_compat.protocol.deepseek.output_markers import (
    EOS,
    HEADER_LIMIT,
    THINK_END,
    V31,
    MarkerParser,
)
from deepseek_api_compat.protocol.events import Reasoning, ToolCall

# V4.1 has a blank after the bar. Each parser reads the tags of all versions: models mix them up.
_BLOCKS = tuple(
    f"<｜DSML｜{name}>" for name in ("tool_calls", "toolcalls", "function_calls", " calls", "calls")
)
_OPENERS = (*_BLOCKS, "<｜DSML｜invoke", "<｜DSML｜ invoke")
_BLOCK = "(?:" + "|".join(_BLOCKS) + ")"
_BLOCK_END = "(?:" + "|".join("</" + block[1:] for block in _BLOCKS) + ")"
_CALL = re.compile(rf'\n*{_BLOCK}?\s*<｜DSML｜ ?invoke name="([^"<]*[^"<\s][^"<]*)"\s*(/?)>')
_END = re.compile(rf"(?:\n*{_BLOCK})?\s*{_BLOCK_END}")
_FIRST_TAG = re.compile(r"\n*<[^<]*")
_PARAMETER = re.compile(r'\s*<｜DSML｜ ?parameter name="([^"<]*)"(?: string="(true|false)")?>')
_CALL_END = re.compile(rf"\s*(?:</｜DSML｜ ?invoke>|(?={_BLOCK_END}))")
_VALUE_ENDS = ("</｜DSML｜parameter>", "</｜DSML｜ parameter>")
_VALUE_STOPS = (
    *_VALUE_ENDS,
    "<｜DSML｜parameter name=",
    "<｜DSML｜ parameter name=",
    "</｜DSML｜invoke>",
    "</｜DSML｜ invoke>",
)
_OUTSIDE = re.compile("|".join(_OPENERS))
_STOP = re.compile("|".join(_VALUE_STOPS))


class DsmlParser(MarkerParser):
    """As MarkerParser; arguments become JSON while their parameters are written.

    trim: V4 and V4.1: newlines at both ends of reasoning and before and at the start of content are framing.
    """

    def __init__(
        self,
        *,
        trim: bool,
        continued: bool,
        reasoning: bool,
        tools_declared: bool,
        index: int,
        new_id: Callable[[], str],
    ) -> None:
        super().__init__(V31, reasoning=reasoning, tools_declared=tools_declared, index=index, new_id=new_id)
        self._trim = trim
        self._fresh = trim and not continued  # newlines here are still framing
        self._parameters = 0
        self._string: bool | None = None

    def in_block(self) -> None:
        """The prompt has opened the block of calls."""
        self._state = self._block

    def _newlines(self, text: str) -> int:
        """How many newlines at the end of the text are framing."""
        found = len(text) - len(text.rstrip("\n"))
        return found if self._trim else min(found, 2)

    def _skip_framing(self) -> None:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held

    def _think(self) -> bool:
        self._skip_framing()
        held = self._held
        end = held.find(THINK_END)
        call = _find(_BLOCK, held) if self._tools and self._trim else -1
        if call >= 0 and (end < 0 or call < end):
            end = call
        stop = end if end >= 0 else self._safe(THINK_END, EOS, *(_BLOCKS if self._tools else ()))
        if self._trim and not (self._last and end < 0):
            stop -= self._newlines(held[:stop])
        if thought := self._take(stop):
            self._events.append(Reasoning(self._index, thought))
        self._logprobs = []
        if end < 0:
            return False
        if call == end:
            self._state = self._block
            return True
        self._held = self._held.lstrip("\n") if self._trim else self._held
        self._take(len(THINK_END))
        self._fresh = self._trim
        self._state = self._content
        return True

    def _content(self) -> bool:
        self._skip_framing()
        held = self._held
        found = _OUTSIDE.search(held) if self._tools else None
        stray = held.find(THINK_END) if self._trim else -1
        if stray >= 0 and (not found or stray < found.start()):
            if stray:
                self._text(self._take(stray))
            self._take(len(THINK_END))
            return True
        markers = (EOS, *(_OPENERS if self._tools else ()), *((THINK_END,) if self._trim else ()))
        stop = found.start() if found else self._safe(*markers)
        if self._tools and (found or not self._last):
            stop -= self._newlines(held[:stop])
        if stop:
            self._text(self._take(stop))
        if found:
            self._state = self._block
        return bool(found)

    def _block(self) -> bool:
        held = self._held
        if call := _CALL.match(held):
            self._take(call.end())
            self._events.append(ToolCall(self._index, self._calls, self._new_id(), call[1]))
            self._calls += 1
            self._parameters = 0
            self._state = self._arguments
            if call[2]:
                self._end("{}")
            return True
        if end := _END.match(held):
            self._take(end.end())
            self._state = self._content
            return True
        rest = held.lstrip()
        wait = not rest or rest[0] == "<"
        if not self._last and wait and len(held) < HEADER_LIMIT:
            return False
        if not rest and self._complete:
            self._held = ""
            return False
        first = _FIRST_TAG.match(held)
        if held:
            self._text(self._take(first.end() if first else len(held) - len(rest) + 1))
        self._state = self._content
        return True

    def _emit(self, arguments: str) -> None:
        if arguments:
            self._events.append(ToolCall(self._index, self._calls - 1, arguments=arguments))
        self._logprobs = []

    def _end(self, arguments: str) -> None:
        self._emit(arguments)
        self._complete += 1
        self._state = self._block

    def _arguments(self) -> bool:
        if found := _PARAMETER.match(self._held):
            self._take(found.end())
            self._string = None if found[2] is None else found[2] == "true"
            key = json.dumps(found[1], ensure_ascii=False)
            self._emit(("{" if not self._parameters else ", ") + key + ": " + ('"' if self._string else ""))
            self._parameters += 1
            self._state = self._value
            return True
        if found := _CALL_END.match(self._held):
            self._take(found.end())
            self._end("}" if self._parameters else "{}")
            return True
        rest = self._held.lstrip()
        if (rest and rest[0] != "<") or len(rest) >= HEADER_LIMIT:
            self._held = rest
            self._state = self._body
            return True
        return False

    def _body(self) -> bool:
        """Arguments as plain JSON instead of parameters."""
        end = re.search(r"\s*</｜DSML｜ ?invoke>", self._held)
        stop = end.start() if end else self._safe("</｜DSML｜invoke>", "</｜DSML｜ invoke>", EOS)
        if not end and not self._last:
            stop = len(self._held[:stop].rstrip())
        self._emit(self._take(stop))
        if end:
            self._take(end.end() - end.start())
            self._end("")
        return bool(end)

    def _value(self) -> bool:
        end = _STOP.search(self._held)
        stop = end.start() if end else self._safe(*_VALUE_STOPS, EOS)
        if self._string is None:
            if not end and not self._last:
                return False  # what it is shows only when it's complete
            text = self._take(stop)
            try:
                json.loads(text)
            except ValueError:
                text = json.dumps(text, ensure_ascii=False)
            self._emit(text)
        else:
            text = self._take(stop)
            self._emit(json.dumps(text, ensure_ascii=False)[1:-1] if self._string else text)
        if end:
            self._emit('"' if self._string else "")
            if end[0] in _VALUE_ENDS:
                self._take(len(end[0]))
            self._state = self._arguments
        return bool(end)


def _find(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return found.start() if found else -1
