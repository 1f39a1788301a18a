"""From a validated request to what an engine needs: the prompt's text, sampling, grammar.

A model that brings a chat template gets its prompt from it, as Hugging Face's transformers would render
it; one without gets `plain`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_api_compat.errors import InternalError, InvalidRequest
from deepseek_api_compat.protocol.job import Grammar, Sampling
from deepseek_api_compat.protocol.openai import (
    ChatRequest,
    Generation,
    Message,
    Tool,
    text_of,
)

ROLES = {"developer": "system"}  # OpenAI's newer name for the same thing; templates know the older
REFERENCE_LOGIT = 20.0


def normalise(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: plain dicts whose content is a string.

    Parts are joined without a separator, null becomes "", developer becomes system. Raises
    InvalidRequest for parts that are not text.
    """
    return [_normal(i, message) for i, message in enumerate(messages)]


def _normal(i: int, message: Message) -> dict[str, Any]:
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
    if message.tool_calls:
        normal["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return normal


def render_template(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str,
    eos: str,
    tools: Sequence[Tool] | None = None,
    now: datetime | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt up to where the assistant's answer begins, special tokens spelled out.

    `messages` come from `normalise`. `now` is the time that `strftime_now` tells a template; without it
    that function is undefined, for which templates have a default. `kwargs` are further variables.
    Raises InvalidRequest when the template refuses the messages, InternalError when it is no template.
    """
    if template is None:
        return plain(messages)
    variables = dict(kwargs or {})
    if now is not None:
        variables["strftime_now"] = now.strftime
    variables.update(
        messages=[_with_parsed_arguments(message) for message in messages],
        tools=msgspec.to_builtins(tools) if tools else None,
        bos_token=bos,
        eos_token=eos,
        add_generation_prompt=True,
    )
    compiled = _compile(template)
    try:
        return compiled.render(variables)
    except Exception as error:  # a template is a program of strangers: anything may come out of it
        raise InvalidRequest(
            f"The model's chat template can't render these messages: {error or type(error).__name__}",
            param="messages",
        ) from None


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt for a model without a chat template: `User: ...` and so on, one turn a paragraph."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    # Templates write arguments with `tojson`, which would quote the string that OpenAI sends once more.
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_parsed(call) for call in message["tool_calls"]]}


def _with_parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"], type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model was trained on; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise InternalError(f"The model's chat template is not valid: {error}") from None


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


def grammar_of(request: ChatRequest) -> Grammar | None:
    """The constraint that `response_format` sets, None for free text."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return Grammar({"type": "object"})
    return Grammar(wanted.json_schema.schema)
