"""Stop strings, looked for in the answer's own text after it was told from reasoning and calls."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence

from deepseek_api_compat.protocol.events import Event, Finish, Text, ToolCall
from deepseek_api_compat.protocol.logprobs import PendingLogprobs


class Stops:
    """Ends one choice before the stop string that is complete first; of several that end there, the longest.

    Only `Text` is searched. Text on both sides of another event is not joined. At most one character less
    than the longest stop is held back. Calls made before stay: as when the engine itself stops,
    the finish is then "tool_calls", if the arguments of at least one are whole.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = _Trie(stops)
        self._node = 0
        self._held = ""
        self._end = 0  # of all text so far
        self._logprobs = PendingLogprobs()
        self._index = 0
        self._calls: dict[int, list[str]] = {}  # the arguments of each
        self._met = False

    def feed(self, events: Sequence[Event]) -> tuple[list[Event], bool]:
        """What may be passed on, and whether a stop was met: then `Finish` ends it, and no more comes."""
        out: list[Event] = []
        for event in events:
            if self._met:
                break
            if isinstance(event, Text):
                self._text(event, out)
                continue
            self._release("", out)
            self._node = 0
            if isinstance(event, ToolCall):
                self._calls.setdefault(event.call_index, []).append(event.arguments)
            out.append(event)
        return out, self._met

    def _text(self, event: Text, out: list[Event]) -> None:
        self._index = event.index
        self._end += len(event.text)
        if event.logprobs:
            self._logprobs.add(event.logprobs, self._end)
        text = self._held + event.text
        self._node, cut = self._stops.search(self._node, text, len(self._held))
        if cut is not None:
            self._met = True
            self._held = text[:cut]
            self._end -= len(text) - cut
            self._release("", out)
            out.append(Finish(event.index, "tool_calls" if self._called() else "stop"))
            return
        begun = len(text) - self._stops.depth[self._node]
        self._held = text[:begun]
        self._release(text[begun:], out)

    def _release(self, keep: str, out: list[Event]) -> None:
        """Passes on what was held, and holds `keep`."""
        text, self._held = self._held, keep
        logprobs = self._logprobs.take(self._end - len(keep))
        if text or logprobs:
            out.append(Text(self._index, text, logprobs))

    def _called(self) -> bool:
        return any(_is_json("".join(arguments)) for arguments in self._calls.values())


class _Trie:
    """Aho and Corasick's search for several strings at once (CACM 18, 1975): each character is read once.

    A node is a beginning of some string, the root (0) the empty one; depth is its length.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest other node that this one ends with
        self._found = [0]  # length of the longest string that this node ends with
        self.depth = [0]
        for string in strings:
            self._add(string)
        self._link()
        firsts = "".join(self._next[0])
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else "(?!)")

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._found.append(0)
                self.depth.append(self.depth[node] + 1)
            node = self._next[node][character]
        self._found[node] = len(string)

    def _link(self) -> None:
        todo = deque(self._next[0].values())
        while todo:
            node = todo.popleft()
            for character, child in self._next[node].items():
                fallback = self._fallback[child] = self._step(self._fallback[node], character)
                self._found[child] = self._found[child] or self._found[fallback]
                todo.append(child)

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(character, 0)

    def search(self, node: int, text: str, start: int) -> tuple[int, int | None]:
        """Goes on from a node at `start`: the node at the end, and where the first whole string begins."""
        at = start
        while at < len(text):
            if not node:
                first = self._first.search(text, at)
                if first is None:
                    break
                at = first.start()
            node = self._step(node, text[at])
            at += 1
            if self._found[node]:
                return node, at - self._found[node]
        return node, None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
