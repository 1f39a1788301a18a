"""What an output parser says about an answer, piece by piece: small frozen values.

`index` is the number of the choice (0 to n - 1). Events of one choice come in order; those of several
choices come interleaved.
"""

from __future__ import annotations

import msgspec

from deepseek_api_compat.protocol.job import TokenLogprob


class Text(msgspec.Struct, frozen=True, gc=False):
    """More of the answer itself. `logprobs` are those of the tokens that ended in this step."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """More of what the model thinks before it answers."""

    index: int
    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """More of one tool call: `id` and `name` once, on its first event; `arguments` is part of a JSON text."""

    index: int
    call_index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The choice is complete.

    reason: stop | length | tool_calls | content_filter | insufficient_system_resource.
    """

    index: int
    reason: str


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts of the whole request, all choices together.

    cached_tokens is the part of prompt_tokens that came from a cache, reasoning_tokens the part of
    completion_tokens that was thinking.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


Event = Text | Reasoning | ToolCall | Finish | Usage
