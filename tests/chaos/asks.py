"""What clients ask, and with what manners; all of it drawn from one seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

Body = dict[str, Any]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 12}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["size", "count"],
    "additionalProperties": False,
}
STOPS: Sequence[Sequence[str]] = (["ka "], ["ka lo"], ["🙂"], ["日", "mi nu "], ["o z", "zu "])
MALFORMED: Sequence[bytes] = (
    b"{",
    b"",
    b'{"model": "fake"}',
    b'{"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": 9}',
    b'{"model": "real", "messages": [{"role": "robot", "content": "x"}]}',
    b'{"model": "relay", "messages": [], "n": "two"}',
)


@dataclass(frozen=True)
class Ask:
    """One request. key: which of the client's keys. leave: seconds after which the client is gone.

    slow: it reads a little at a time. reuse: it may go out on a connection that was used before.
    """

    body: Body | bytes
    key: str = "free"
    leave: float | None = None
    slow: bool = False
    reuse: bool = True

    @property
    def fields(self) -> Mapping[str, Any]:
        """The body's fields; of a malformed one none."""
        return self.body if isinstance(self.body, dict) else {}

    @property
    def model(self) -> str:
        return str(self.fields.get("model", ""))

    @property
    def stream(self) -> bool:
        return bool(self.fields.get("stream"))

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass
class Asker:
    """Draws one ask after the other."""

    dice: Random
    count: int = field(default=0)

    def next(self) -> Ask:
        dice = self.dice
        self.count += 1
        if dice.random() < 0.05:
            return Ask(dice.choice(MALFORMED), reuse=dice.random() < 0.5)
        model = dice.choices(["fake", "relay", "real"], [70, 20, 10])[0]
        body = {"fake": self._fake, "relay": self._relay, "real": self._real}[model]()
        body["model"] = model
        if dice.random() < 0.6:
            body["stream"] = True
            if dice.random() < 0.7:
                body["stream_options"] = {"include_usage": True}
        return Ask(
            body,
            key="limited" if dice.random() < 0.1 else "free",
            leave=dice.uniform(0, 3) if dice.random() < 0.12 else None,
            slow=dice.random() < 0.1,
            reuse=dice.random() < 0.7,
        )

    def _message(self, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def _fake(self) -> Body:
        dice = self.dice
        body: Body = {"messages": self._message(f"Say {dice.random()}"), "max_tokens": dice.randrange(1, 250)}
        if dice.random() < 0.2:
            body["n"] = 2
        if dice.random() < 0.3:
            body["stop"] = dice.choice(STOPS)
        elif dice.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": dice.randrange(3)}
        return body

    def _relay(self) -> Body:
        return {"messages": self._message("Count."), "max_tokens": self.dice.randrange(1, 60)}

    def _real(self) -> Body:
        dice = self.dice
        text = f"Tell me about the number {dice.randrange(1000)}."
        body: Body = {"messages": self._message(text), "max_tokens": dice.randrange(4, 32)}
        kind = dice.randrange(6)
        if kind == 0:
            body |= {"tools": [TOOL], "tool_choice": "required", "max_tokens": 48}
        elif kind == 1:
            schema = {"name": "size", "strict": True, "schema": SCHEMA}
            body |= {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 48}
        elif kind == 2:
            body["n"] = 2
        elif kind == 3:
            body["stop"] = [" the", "."]
        elif kind == 4:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body
