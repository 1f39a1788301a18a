"""Going on with a chat stream that broke off, at an upstream that continues messages.

DeepSeek's hosted API (`/beta`) and some others take a last message `{"role": "assistant", "content": ...,
"prefix": true}` and continue it. So the text that the client has goes up again as that message, and what
comes down is made to fit behind it: the same id, no second role, and the counts of one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.openai import decode_object

_KNOWN = {"role", "content"}
_OF_THE_ANSWER = ("id", "created", "model")


class SentText:
    """The text of one chat answer, as the client has it."""

    def __init__(self) -> None:
        self.tokens = 0  # as of the last `rest_of`: events with text, about one for each token
        self._forwarded: list[bytes] = []
        self._identity: dict[str, Any] = {}

    def add(self, events: bytes) -> None:
        """These whole events were written to the client."""
        self._forwarded.append(events)

    def rest_of(self, body: bytes, limit: int | None) -> dict[str, Any] | None:
        """Fields that replace those of `body`: the request for the rest, or None if it can't be told.

        `limit`: tokens that the whole answer may have. Only plain text can go on: one choice, and no
        reasoning, calls or logprobs.
        """
        text = self._text()
        messages = decode_object(body).get("messages")
        if not text or not isinstance(messages, list) or not messages:
            return None
        last = messages[-1]
        if isinstance(last, dict) and last.get("prefix") is True and isinstance(last.get("content"), str):
            text = last["content"] + text
            messages = messages[:-1]
        fields: dict[str, Any] = {
            "messages": [*messages, {"role": "assistant", "content": text, "prefix": True}]
        }
        if limit is not None:
            if limit <= self.tokens:
                return None
            fields["max_tokens"] = limit - self.tokens
        return fields

    def behind(self, events: bytes) -> bytes:
        """Events of the continuation as they follow what was sent before. Raises EngineFailed."""
        kept = []
        for event in events.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                kept.append(event)
                continue
            chunk = _chunk(event)
            if _is_opening(chunk):
                continue
            if usage := chunk.get("usage"):
                chunk["usage"] = self._whole(usage)
            kept.append(b"data: " + msgspec.json.encode({**chunk, **self._identity}))
        return b"\n\n".join(kept)

    def _text(self) -> str:
        """What all events say, "" if they say more than text. Sets `tokens` and the answer's identity."""
        text: list[str] = []
        for event in b"".join(self._forwarded).split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            chunk = _chunk(event)
            if not self._identity:
                self._identity = {name: chunk[name] for name in _OF_THE_ANSWER if name in chunk}
            for choice in chunk.get("choices", []):
                delta = choice.get("delta") or {}
                more = {name for name, value in delta.items() if value} - _KNOWN
                if more or choice.get("index") or choice.get("logprobs") or choice.get("finish_reason"):
                    return ""
                text.append(delta.get("content") or "")
        self.tokens = sum(map(bool, text))
        return "".join(text)

    def _whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The counts of one answer: what was sent before is not of the prompt."""
        prompt = max(0, usage.get("prompt_tokens", 0) - self.tokens)
        completion = usage.get("completion_tokens", 0) + self.tokens
        return {
            **usage,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _chunk(event: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(event[6:], type=dict[str, Any])
    except msgspec.MsgspecError:
        raise EngineFailed("The upstream sent an event that is no JSON object.") from None


def _is_opening(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk only says that an assistant is about to speak."""
    choices = chunk.get("choices") or []
    if not choices or chunk.get("usage"):
        return False
    return not any(
        choice.get("finish_reason") or (choice.get("delta") or {}).get("content") for choice in choices
    )
