"""Texts with placeholders: made of a request's, and turned back in an answer that comes in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from deepseek_api_compat.plugins.pii_kinds import Kind, find

# What no one wrote for a reader, or names something that must stay what it is.
_NO_TEXT = frozenset(
    {"role", "type", "id", "tool_call_id", "url", "image_url", "input_audio", "file", "prefix"}
)


class Masker:
    """One request's placeholders: the same value has the same one, numbered as they appear."""

    def __init__(self, kinds: Sequence[Kind], written: str) -> None:
        """`written` is all that the client wrote: no placeholder looks like a part of it."""
        self._kinds = kinds
        self._placeholders: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}
        self._mark = _mark(sorted({kind.label for kind in kinds}), written)

    @property
    def originals(self) -> dict[str, str]:
        """The value of each placeholder."""
        return {placeholder: value for (_, value), placeholder in self._placeholders.items()}

    def message(self, message: Any) -> Any:
        """A message, or a part of one, without personal data."""
        if isinstance(message, str):
            return self.text(message)
        if isinstance(message, list):
            return [self.message(part) for part in message]
        if not isinstance(message, dict):
            return message
        made: dict[str, Any] = {}
        for name, value in message.items():
            if name == "arguments" and isinstance(value, str):
                made[name] = self.arguments(value)
            elif name == "function" and isinstance(value, dict):  # its name is a declared one
                made[name] = {**self.message(value), **{k: v for k, v in value.items() if k == "name"}}
            else:
                made[name] = value if name in _NO_TEXT else self.message(value)
        return made

    def text(self, text: str) -> str:
        pieces, at = [], 0
        for start, end, label in find(text, self._kinds):
            pieces += [text[at:start], self._placeholder(label, text[start:end])]
            at = end
        return "".join([*pieces, text[at:]]) if pieces else text

    def arguments(self, text: str) -> str:
        """Arguments of a tool call: JSON stays JSON, and as it is written if there is nothing to mask."""
        try:
            value = json.loads(text)
            masked = self._json(value)
        except (ValueError, RecursionError):
            return self.text(text)
        return text if masked == value else json.dumps(masked, ensure_ascii=False)

    def _json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._json(item) for item in value]
        if isinstance(value, dict):
            return {self.text(name): self._json(item) for name, item in value.items()}
        if isinstance(value, int) and not isinstance(value, bool):
            masked = self.text(str(value))
            return value if masked == str(value) else masked
        return value

    def _placeholder(self, label: str, value: str) -> str:
        made = self._placeholders.get((label, value))
        if made is None:
            number = self._counts[label] = self._counts.get(label, 0) + 1
            made = self._placeholders[label, value] = f"<{self._mark}{label}_{number}>"
        return made


def _mark(labels: Sequence[str], written: str) -> str:
    """What stands before the label: as many X as the client has not written itself."""
    taken = re.compile(rf"(?:<|\\u003c)(X*)(?:{'|'.join(labels)})_[0-9]", re.IGNORECASE)
    longest = max((len(match[1]) + 1 for match in taken.finditer(written)), default=0)
    return "X" * longest


class Table:
    """Which text stands for which, in plain text or in JSON."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values
        kinds = sorted({re.escape(name[: name.rindex("_") + 1]) for name in values})
        self._any = re.compile(rf"(?:{'|'.join(kinds)})[0-9]+(?:>|\\u003e)")
        self._beginnings = frozenset(name[:end] for name in values for end in range(1, len(name)))
        self._longest = max(map(len, values)) - 1

    @classmethod
    def of_texts(cls, originals: dict[str, str]) -> Table:
        return cls(originals)

    @classmethod
    def of_json(cls, originals: dict[str, str]) -> Table:
        """For a JSON text: what comes back is escaped, and placeholders may have been."""
        escaped = {name: json.dumps(value, ensure_ascii=False)[1:-1] for name, value in originals.items()}
        also = {name.replace("<", r"\u003c").replace(">", r"\u003e"): escaped[name] for name in escaped}
        return cls(escaped | also)

    def restored(self, text: str) -> str:
        return self._any.sub(lambda match: self._values.get(match[0], match[0]), text)

    def held(self, text: str) -> int:
        """How many characters at the end may be the beginning of a placeholder."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((length for length in lengths if text[-length:] in self._beginnings), 0)


class Restorer:
    """One text that comes in pieces: each placeholder in it turns back, however it is cut."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._kept = ""

    def feed(self, piece: str) -> str:
        """What can be said by now; kept is only what may still become a placeholder."""
        text = self._kept + piece
        kept = self._table.held(text)
        self._kept = text[len(text) - kept :]
        return self._table.restored(text[: len(text) - kept])

    def close(self) -> str:
        """What was kept: no placeholder after all."""
        kept, self._kept = self._kept, ""
        return kept
