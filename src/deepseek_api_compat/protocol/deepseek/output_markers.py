"""Answers in the V3, R1 and V3.1 formats: think tags, and calls between special-token markers.

    reasoning</think>text<｜tool▁calls▁begin｜>CALL CALL ...<｜tool▁calls▁end｜>text

A call in V3 and R1, and in V3.1:

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    ARGUMENTS
    ```<｜tool▁call▁end｜>

    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>

What is not as it should be:

- Reasoning ends at the first `</think>`, or with the output; markers in it are reasoning, and think tags in
  the text are text.
- Text is verbatim, after calls too. White space in a block, and a block without calls, are left out.
- The end of the block also ends an open call; a block may lack its end, and its calls stay calls.
- Arguments are verbatim, be they JSON or not; where there is nothing they are `{}`. In a JSON string an end
  marker is data, unless another marker or the end of the output follows it: then the string was never closed,
  and the call ends here.
- An output that ends in a call leaves the arguments as far as they were written; half an end marker is left
  out if it has come to its bar.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from deepseek_api_compat.protocol.deepseek.output_reader import Markers, NoCall, Reader, Reading
from deepseek_api_compat.protocol.deepseek.segments import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEP,
    THINK_END,
)

_BLOCK, _SEP, _FENCE = Markers(CALLS_BEGIN), Markers(SEP), Markers("\n```json\n")
_IN_BLOCK, _BETWEEN_CALLS = Markers(CALL_BEGIN, CALLS_END), Markers(CALLS_BEGIN, CALL_BEGIN, CALLS_END)
_AFTER_CALL = Markers(*(gap + mark for gap in ("", "\n") for mark in _BETWEEN_CALLS.all))
_THINK_END, _NOTHING = Markers(THINK_END), Markers()
_SPACE, _TO_MARKER, _LINE = re.compile(r"[ \n]*"), re.compile(r"[^<]*"), re.compile(r"[^<\n]*")
_END_BEGINS = re.compile(r"[<`\n]")


class Layout:
    """How a format writes a call: does its name come after a type, and do its arguments stand in a fence?"""

    def __init__(self, *, fenced: bool) -> None:
        self.fenced = fenced
        fences = ("\n```\n", "\n```", "```\n", "```", "") if fenced else ("",)
        self.ends = Markers(*(fence + mark for fence in fences for mark in (CALL_END, CALLS_END)))
        ends = "|".join(self.ends.all)
        self.plain = re.compile(f'"|{ends}')
        self.quoted = re.compile(rf'(?s)"|\\.|{ends}')


V3, V31 = Layout(fenced=True), Layout(fenced=False)


class MarkerParser(Reader):
    """Parser of one choice in the V3, R1 and V3.1 formats."""

    def __init__(
        self, layout: Layout, *, start: str, tools_declared: bool, index: int, new_id: Callable[[], str]
    ) -> None:
        super().__init__(start=start, tools_declared=tools_declared, index=index, new_id=new_id)
        self._layout = layout

    def _thought(self) -> Reading[None]:
        if (yield from self._up_to(_THINK_END, self._pass)):
            self._skip(self._at + len(THINK_END))
            self._thinking = False

    def _content(self) -> Reading[None]:
        while (yield from self._up_to(_BLOCK if self._tools else _NOTHING, self._pass)):
            yield from self._block(len(CALLS_BEGIN))

    def _header(self) -> Reading[str]:
        self._at = self._done
        yield from self._run(_SPACE)
        found = yield from self._expect(_BETWEEN_CALLS)
        if found == CALLS_BEGIN:
            yield from self._run(_SPACE)
            found = yield from self._expect(_IN_BLOCK)
        if found == CALLS_END:
            return ""
        name = yield from self._run(_TO_MARKER)
        yield from self._expect(_SEP)
        if self._layout.fenced:
            name = yield from self._run(_LINE)
            yield from self._expect(_FENCE)
        if not name.strip():
            raise NoCall
        return name.strip()

    def _arguments(self) -> Reading[bool]:
        quoted = False
        while True:
            found = (self._layout.quoted if quoted else self._layout.plain).search(self._held, self._at)
            if found is None:
                if self._last:
                    self._leave_open(quoted)
                    return False
                sure = self._before_end(quoted)
                self._write(self._held[self._done : sure], sure)
                yield
                continue
            ended = self._is_end(found, quoted)
            if ended is False:
                quoted ^= found[0] == '"'
                self._at = found.end()
                continue
            self._write(self._held[self._done : found.start()], found.start())
            if ended:
                self._end_call(found.end())
                return not found[0].endswith(CALLS_END)
            yield

    def _is_end(self, found: re.Match[str], quoted: bool) -> bool | None:
        """Do the arguments end here, and not just a string or an escape in them? None while that is open."""
        if found[0][0] in '"\\':
            return False
        return self._followed(found.end()) if quoted else True

    def _before_end(self, quoted: bool) -> int:
        """Where half an end marker, or half an escape, begins at the end of what is held; else that end."""
        held, ends = self._held, self._layout.ends
        if quoted and held.endswith("\\", self._at):
            return len(held) - 1
        for begun in _END_BEGINS.finditer(held, max(self._at, len(held) - ends.longest)):
            if any(end.startswith(held[begun.start() :]) for end in ends.all):
                return begun.start()
        return len(held)

    def _followed(self, at: int) -> bool | None:
        """Does a marker, or the end of the output, follow? None while that is open."""
        rest = self._held[at : at + _AFTER_CALL.longest]
        if any(rest.startswith(marker) for marker in _AFTER_CALL.all):
            return True
        if self._last:
            return not rest.strip("\n")
        return None if any(marker.startswith(rest) for marker in _AFTER_CALL.all) else False

    def _leave_open(self, quoted: bool) -> None:
        """The output ended before the call did."""
        sure = self._before_end(quoted)
        if quoted or "｜" not in self._held[sure:]:
            sure = len(self._held)
        self._write(self._held[self._done : sure], len(self._held))
