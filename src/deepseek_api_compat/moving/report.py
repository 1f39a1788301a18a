"""What was read, what of it was carried over, and what was not and why."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Outcome = Literal["carried", "partly", "not carried", "already here"]


class Entry(msgspec.Struct, frozen=True):
    """`place`: what it is, such as `key alice`. `why`: unless it needs none."""

    place: str
    outcome: Outcome
    why: str = ""


class Report:
    """Entries in the order in which they were read."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def carried(self, place: str, why: str = "") -> None:
        self.entries.append(Entry(place, "carried", why))

    def partly(self, place: str, why: str) -> None:
        self.entries.append(Entry(place, "partly", why))

    def left(self, place: str, why: str) -> None:
        self.entries.append(Entry(place, "not carried", why))

    def already(self, place: str) -> None:
        """What was read of `place` is stored already, by an import before this one."""
        self.entries = [entry for entry in self.entries if entry.place != place]
        self.entries.append(Entry(place, "already here"))

    def counts(self) -> dict[str, int]:
        found = [entry.outcome for entry in self.entries]
        return {outcome: found.count(outcome) for outcome in dict.fromkeys(found)}

    def as_json(self) -> list[dict[str, Any]]:
        return [msgspec.structs.asdict(entry) for entry in self.entries]

    def as_text(self) -> str:
        """One line an entry, grouped by what became of it."""
        lines = []
        titles = ("carried", "already here", "partly", "not carried")
        for outcome in titles:
            found = [entry for entry in self.entries if entry.outcome == outcome]
            if found:
                lines.append(f"{outcome.capitalize()} ({len(found)}):")
                lines += [f"  {entry.place}" + f": {entry.why}" * bool(entry.why) for entry in found]
        return "\n".join(lines)
