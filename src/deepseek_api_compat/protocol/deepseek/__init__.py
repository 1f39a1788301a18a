"""DeepSeek's own prompt formats: a validated request in, the exact prompt out.

Formats: v3, v3-tools, r1, v3.1, v3.2, v4, v4.1. Variants of v3: `0324`, and `fim` for a completion with
a suffix; `v3-tools` is for both with declared tools: the 0324 layout with our tool text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.deepseek import prompt_v3, prompt_v4, prompt_v31, prompt_v32
from deepseek_api_compat.protocol.deepseek.conversation import conversation
from deepseek_api_compat.protocol.openai import ChatRequest, CompletionRequest
from deepseek_api_compat.protocol.segment import Segment

__all__ = ["FORMATS", "Segment", "render"]

_RENDERERS = {
    ("v3", None): prompt_v3.v3,
    ("v3", "0324"): prompt_v3.v3_0324,
    ("v3-tools", None): prompt_v3.v3_tools,
    ("r1", None): prompt_v3.r1,
    ("r1", "official-tool-history"): prompt_v3.r1_official,
    ("v3.1", None): prompt_v31.v31,
    ("v3.2", None): prompt_v32.v32,
}
_V4 = ("v4", "v4.1")
FORMATS = (*dict.fromkeys(name for name, _ in _RENDERERS), *_V4)


def render(
    format: str,
    variant: str | None,
    request: ChatRequest | CompletionRequest,
    functions: Sequence[dict[str, Any]] | None = None,
) -> list[Segment]:
    """The prompt up to where the answer begins; the joined texts of the segments are the prompt.

    `functions` are the declared functions as the client wrote them (see `conversation`). Raises
    InvalidRequest for an unknown format and for what the format can't express.
    """
    if isinstance(request, CompletionRequest):
        return _completion(format, request)
    if format in _V4 and variant is None:
        return prompt_v4.render(format, request)
    renderer = _RENDERERS.get((format, variant))
    if renderer is None:
        raise _unknown(format, variant)
    return [segment for segment in renderer(conversation(request, functions)) if segment.text]


def _completion(format: str, request: CompletionRequest) -> list[Segment]:
    if format not in FORMATS:
        raise _unknown(format, None)
    if not isinstance(request.prompt, str) or request.suffix is None:
        raise InvalidRequest(
            "A completion needs a `prompt` that is a string, and a `suffix`.", param="prompt"
        )
    prompt = prompt_v3.fill_in_the_middle(request.prompt, request.suffix)
    return [segment for segment in prompt if segment.text]


def _unknown(format: str, variant: str | None) -> InvalidRequest:
    if format in FORMATS:
        return InvalidRequest(f"The format {format} has no variant {variant!r}.", param="variant")
    return InvalidRequest(f"There is no format {format!r}; there are: {', '.join(FORMATS)}.", param="format")
