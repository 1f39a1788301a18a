"""From a validated request to what an engine needs: messages in plain form, sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.job import Sampling
from deepseek_api_compat.protocol.openai import (
    Generation,
    Message,
    text_of,
)

ROLES = {"developer": "system"}  # OpenAI's newer name for the same thing; templates know the older
REFERENCE_LOGIT = 20.0


def normalise(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: plain dicts whose content is a string.

    Parts are joined without a separator, null becomes "", developer becomes system. Raises
    InvalidRequest for parts that are not text, and for a `prefix` that can't be continued.
    """
    last = len(messages) - 1
    return [_normal(i, message, i == last) for i, message in enumerate(messages)]


def _normal(i: int, message: Message, is_last: bool) -> dict[str, Any]:
    if message.prefix and not (is_last and message.role == "assistant" and not message.tool_calls):
        raise InvalidRequest(
            f"`messages[{i}].prefix`: only a last assistant message without tool calls can be continued.",
            param=f"messages[{i}].prefix",
        )
    if message.role == "latest_reminder":
        raise InvalidRequest(
            f"`messages[{i}].role`: only DeepSeek V4 knows `latest_reminder`.", param=f"messages[{i}].role"
        )
    normal: dict[str, Any] = {
        "role": ROLES.get(message.role, message.role),
        "content": text_of(message.content, f"messages[{i}].content"),
    }
    if message.name is not None:
        normal["name"] = message.name
    if message.tool_call_id is not None:
        normal["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        normal["reasoning_content"] = message.reasoning_content
    if message.role == "assistant" and message.tool_calls:
        normal["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return normal


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt for a model without a chat template: `User: ...` and so on, one turn a paragraph."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


_OPENAI_DEFAULT = Sampling()


def sampling_of(
    request: Generation, *, temperature_mapping: bool, default: Sampling = _OPENAI_DEFAULT
) -> Sampling:
    """Sampling parameters; temperature and top_p of `default` where the request gives none."""
    temperature = default.temperature if request.temperature is None else request.temperature
    return Sampling(
        temperature=map_temperature(temperature) if temperature_mapping else temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=request.seed,
        logit_bias=request.logit_bias or {},
    )


def map_temperature(temperature: float) -> float:
    """What DeepSeek's hosted API makes of a temperature (DeepSeek-V3-0324 model card): 1.0 becomes 0.3."""
    return 0.3 * temperature if temperature <= 1 else temperature - 0.7


def repetition_penalty(presence: float, frequency: float) -> float:
    """The multiplicative penalty r (Keskar et al. 2019, CTRL) nearest to OpenAI's additive penalties.

    OpenAI's take presence + frequency * count off the logit of a token that has occurred; r divides a
    positive logit and multiplies a negative one, however often the token has occurred. Both agree for a
    token that occurred once and has logit L when L / r = L - p, so r = L / (L - p). L is 20, about the
    logit of a likely next token: p = 2 gives 1.11, p = -2 gives 0.91, 0 gives exactly 1 (no penalty).
    """
    return REFERENCE_LOGIT / (REFERENCE_LOGIT - presence - frequency)
