"""PII masking: engines see placeholders in place of personal data, and clients see the data again.

Failure policy: as a plugin whose on_error is "refuse" - nothing passes unmasked. What was found is kept in
memory for as long as its request, and appears in no log, metric or error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deepseek_api_compat.plugins import Context, Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.plugins.pii_kinds import DEFAULT, chosen
from deepseek_api_compat.plugins.pii_texts import Masker, Restorer, Table


class PiiMasking:
    """kinds: names of pii_kinds.KINDS. patterns: more of them, regular expressions by name.

    reverse: whether placeholders in answers turn back into what they stand for.
    """

    name = "pii"
    on_error = "refuse"
    quick = True

    def __init__(
        self,
        kinds: Sequence[str] = DEFAULT,
        patterns: dict[str, str] | None = None,
        reverse: bool = True,
    ) -> None:
        """Raises ValueError for a kind or a pattern that there can't be."""
        self._kinds = chosen(kinds, patterns or {})
        if not self._kinds:
            raise ValueError("there is nothing to mask without kinds and patterns")
        if not reverse:
            self.on_event = None  # type: ignore[assignment, method-assign]

    def pre_process(self, request: dict[str, Any], context: Context) -> dict[str, Any]:
        masker = Masker(self._kinds, json.dumps(request, ensure_ascii=False))
        made = {**request, "messages": masker.message(request["messages"])}
        if isinstance(user := request.get("user"), str):
            made["user"] = masker.text(user)
        if originals := masker.originals:
            context.state["answer"] = _Answer(originals, json_text=_wants_json(request))
        return made

    def on_event(self, event: Event, context: Context) -> Sequence[Event] | None:
        answer: _Answer | None = context.state.get("answer")
        return None if answer is None else answer.feed(event)


class _Answer:
    """The texts of an answer's choices, turned back as they come."""

    def __init__(self, originals: dict[str, str], *, json_text: bool) -> None:
        """`json_text`: the answer itself is JSON, where what comes back is escaped."""
        prose, in_json = Table.of_texts(originals), Table.of_json(originals)
        self._reasoning, self._arguments = prose, in_json
        self._texts = in_json if json_text else prose
        # By choice, then by text: "text", "reasoning", or the number of a tool call.
        self._open: dict[int, dict[str | int, Restorer]] = {}

    def feed(self, event: Event) -> Sequence[Event] | None:
        if isinstance(event, Finish):
            return [*self._closed(event.index), event]
        if isinstance(event, Text):
            text = self._restorer(event.index, "text").feed(event.text)
            made: Event = Text(event.index, text, event.logprobs)
            said = bool(text or event.logprobs)
        elif isinstance(event, Reasoning):
            text = self._restorer(event.index, "reasoning").feed(event.text)
            made, said = Reasoning(event.index, text), bool(text)
        elif isinstance(event, ToolCall):
            text = self._restorer(event.index, event.call_index).feed(event.arguments)
            made = ToolCall(event.index, event.call_index, event.id, event.name, text)
            said = bool(text or event.id or event.name)
        else:
            assert isinstance(event, Usage)
            return None
        # What reasoning keeps goes before the answer.
        earlier = [] if isinstance(event, Reasoning) else self._closed(event.index, "reasoning")
        return [*earlier, made] if said else earlier

    def _restorer(self, index: int, of: str | int) -> Restorer:
        texts = self._open.setdefault(index, {})
        if of not in texts:
            tables = {"text": self._texts, "reasoning": self._reasoning}
            texts[of] = Restorer(self._arguments if isinstance(of, int) else tables[of])
        return texts[of]

    def _closed(self, index: int, only: str | None = None) -> list[Event]:
        """What was kept of a choice's texts."""
        made: list[Event] = []
        for of, restorer in self._open.get(index, {}).items():
            if (only is None or of == only) and (kept := restorer.close()):
                if isinstance(of, int):
                    made.append(ToolCall(index, of, arguments=kept))
                else:
                    made.append(Text(index, kept) if of == "text" else Reasoning(index, kept))
        return made


def _wants_json(request: dict[str, Any]) -> bool:
    form = request.get("response_format")
    return isinstance(form, dict) and form.get("type") in ("json_object", "json_schema")
