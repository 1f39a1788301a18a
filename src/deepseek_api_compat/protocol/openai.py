"""OpenAI's request types, and decoding of untrusted bodies into them.

The types carry the rules: a range or length in an annotation is checked by the decoder and shown in
`/openapi.json`; what depends on other fields or on the operator's limits is checked right after.
null for an optional field means "not given"; unknown fields are ignored; of duplicate keys the last counts.

Every `decode_*` function raises InvalidRequest, and nothing else, for whatever is wrong with a body; its
`param` is the field's path as OpenAI writes it (`messages[0].content`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, field

from deepseek_api_compat.errors import InvalidRequest

MAX_DEPTH = 100  # of JSON that is handed on as a value: schemas, tool parameters
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens on /completions

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
# One text or several, each as a string or token ids; that the kinds aren't mixed is checked afterwards.
Texts = str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]


class DecodeLimits(msgspec.Struct, frozen=True):
    """What one request may ask for, whoever sends it."""

    max_n: int = 16
    max_messages: int = 10_000
    max_prompts: int = 2048


class Wire(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all wire types."""


class TextPart(Wire, frozen=True, tag_field="type", tag="text", kw_only=True):
    text: str


class RefusalPart(Wire, frozen=True, tag_field="type", tag="refusal", kw_only=True):
    refusal: str


class ImageUrl(Wire, frozen=True, kw_only=True):
    """`url`: http, https or data. `detail` is for models that see."""

    url: NonEmpty
    detail: str | None = None


class ImagePart(Wire, frozen=True, tag_field="type", tag="image_url", kw_only=True):
    """A picture; some clients leave out the object around the URL."""

    image_url: ImageUrl | NonEmpty


class InputAudio(Wire, frozen=True, kw_only=True):
    """`data` is base64."""

    data: NonEmpty
    format: NonEmpty


class AudioPart(Wire, frozen=True, tag_field="type", tag="input_audio", kw_only=True):
    """Sound."""

    input_audio: InputAudio


class FilePart(Wire, frozen=True, tag_field="type", tag="file"):
    """A file. Decoded only as far as needed to refuse it."""


Part = str | TextPart | RefusalPart | ImagePart | AudioPart | FilePart


def text_of(content: str | list[Part] | None, param: str) -> str:
    """The text of a message: its parts joined without a separator; "" for null.

    Raises InvalidRequest, with `param` as the field's path, for parts that are not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part_text(part, param) for part in content)


def _part_text(part: Part, param: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, RefusalPart):
        return part.refusal
    raise InvalidRequest(
        f"`{param}` has a part of type {part.__struct_config__.tag}, but this model reads text only.",
        param=param,
    )


def media_sizes(messages: list[Message]) -> list[int]:
    """Of each picture and recording in them, how many characters of a body it takes."""
    return [
        _media_size(part)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
        if isinstance(part, ImagePart | AudioPart)
    ]


def _media_size(part: ImagePart | AudioPart) -> int:
    if isinstance(part, AudioPart):
        return len(part.input_audio.data)
    picture = part.image_url
    return len(picture if isinstance(picture, str) else picture.url)


class FunctionCall(Wire, frozen=True, kw_only=True):
    name: str
    arguments: str = ""


class MessageToolCall(Wire, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire, frozen=True, kw_only=True):
    """One turn. `content` is only null for an assistant's; `tool_call_id` says which call a tool answers.

    `prefix` marks a last assistant message that the answer continues. The role `latest_reminder` exists
    in DeepSeek V4 only.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    prefix: bool | None = None


class FunctionDefinition(Wire, frozen=True, kw_only=True):
    name: NonEmpty
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire, frozen=True, kw_only=True):
    # Written out even where it is the default: templates and upstreams read it.
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Wire, frozen=True, kw_only=True):
    name: str


class NamedToolChoice(Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Wire, frozen=True, kw_only=True):
    """A schema that the answer must match; `schema` is a JSON Schema object."""

    name: NonEmpty
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Wire, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(Wire, frozen=True, kw_only=True):
    """DeepSeek's switch; a plain boolean means the same."""

    type: Literal["enabled", "disabled"]


class StreamOptions(Wire, frozen=True, kw_only=True):
    include_usage: bool | None = None


class Generation(Wire, frozen=True, kw_only=True):
    """What chat and legacy completions have in common."""

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Meta(max_length=16)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: LogitBias | None = None
    wants_stream: bool | None = field(name="stream", default=None)
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Metadata | None = None

    @property
    def stream(self) -> bool:
        return bool(self.wants_stream)

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        if not self.stop:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Generation, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking: bool | Thinking | None = None
    reasoning_effort: NonEmpty | None = None  # "none", "high", ...: models differ in which they know
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def thinks(self) -> bool | None:
        """Whether the model shall think before it answers; None where the request leaves that open.

        `thinking` counts before `chat_template_kwargs` (as vLLM and SGLang take it), that before
        `reasoning_effort`.
        """
        if self.thinking is not None:
            return self.thinking if isinstance(self.thinking, bool) else self.thinking.type == "enabled"
        kwargs = self.chat_template_kwargs or {}
        for name in ("thinking", "enable_thinking"):
            if isinstance(chosen := kwargs.get(name), bool):
                return chosen
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None for as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Generation, frozen=True, kw_only=True):
    """`POST /v1/completions`. `logprobs` is the number of alternatives per token."""

    prompt: Texts
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return _each(self.prompt)

    @property
    def limit(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class EmbeddingRequest(Wire, frozen=True, kw_only=True):
    """`POST /v1/embeddings`."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _each(self.input)


class TokenizeRequest(Wire, frozen=True, kw_only=True):
    """`POST /tokenize`: one of `content` and `prompt` (the same thing) or `messages`."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    with_special: bool | None = field(name="add_special_tokens", default=None)

    @property
    def text(self) -> str:
        return self.content or self.prompt or ""

    @property
    def add_special_tokens(self) -> bool:
        """Off unless asked for, so that the count is what the same text costs as a prompt."""
        return bool(self.with_special)


class DetokenizeRequest(Wire, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[TokenId]
    model: str | None = None


_chat = msgspec.json.Decoder(ChatRequest)
_completion = msgspec.json.Decoder(CompletionRequest)
_embedding = msgspec.json.Decoder(EmbeddingRequest)
_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, Any])
_encoder = msgspec.json.Encoder()

KNOWN_FIELDS = frozenset(
    name
    for type_ in (ChatRequest, CompletionRequest, EmbeddingRequest)
    for name in type_.__struct_encode_fields__
)

T = TypeVar("T")


def decode_chat(body: bytes, limits: DecodeLimits) -> ChatRequest:
    request = _decode(_chat, body)
    _check_generation(request, limits)
    _check_messages(request.messages, limits)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    if request.tools:
        _check_tools(request.tools)
    format_ = request.response_format
    if format_ is not None and format_.type == "json_schema":
        if format_.json_schema is None:
            raise InvalidRequest(
                "`response_format.json_schema` is missing.", param="response_format.json_schema"
            )
        _check_depth(format_.json_schema.schema, "response_format.json_schema.schema")
    return request


class _DeclaredTool(msgspec.Struct):
    function: dict[str, Any]


class _Declared(msgspec.Struct):
    tools: list[_DeclaredTool] | None = None


_declared = msgspec.json.Decoder(_Declared)


class _Messages(msgspec.Struct):
    messages: list[dict[str, Any]]


_messages = msgspec.json.Decoder(_Messages)


def declared_functions(body: bytes) -> list[dict[str, Any]] | None:
    """The functions of a body that `decode_chat` accepts, as written: all fields, in their order."""
    tools = _declared.decode(body).tools
    return None if tools is None else [tool.function for tool in tools]


def decode_completion(body: bytes, limits: DecodeLimits) -> CompletionRequest:
    request = _decode(_completion, body)
    _check_generation(request, limits)
    _check_texts(request.prompt, "prompt", limits)
    return request


def decode_embedding(body: bytes, limits: DecodeLimits) -> EmbeddingRequest:
    request = _decode(_embedding, body)
    _check_texts(request.input, "input", limits)
    return request


def decode_tokenize(body: bytes, limits: DecodeLimits) -> TokenizeRequest:
    request = _decode(_tokenize, body)
    given = [value for value in (request.content, request.prompt, request.messages) if value is not None]
    if len(given) != 1:
        raise InvalidRequest("Give exactly one of `content`, `prompt` and `messages`.", param="content")
    if request.messages is not None:
        _check_messages(request.messages, limits)
    if request.tools:
        _check_tools(request.tools)
    return request


def decode_detokenize(body: bytes, limits: DecodeLimits) -> DetokenizeRequest:
    return _decode(_detokenize, body)


def decode_object(body: bytes) -> dict[str, Any]:
    """Any JSON object. Raises InvalidRequest."""
    return _decode(_object, body)


def messages_of(body: bytes) -> list[dict[str, Any]]:
    """The messages of a body that `decode_chat` or `decode_tokenize` accepts, as written: all fields."""
    return _messages.decode(body).messages


def reencode(body: bytes, replace: dict[str, Any]) -> bytes:
    """`body` with top-level fields replaced or added, unknown fields verbatim, and every key once.

    An upstream that takes the first of two equal keys, or compares names without regard to case (as Go's
    decoder does), then can't see another value than the one that was checked here.
    Raises InvalidRequest where `decode_*` would, short of the fields' own rules.
    """
    fields: dict[str, Any] = _decode(_fields, body)
    if not fields.keys() <= KNOWN_FIELDS:
        fields = {
            name: value
            for name, value in fields.items()
            if name in KNOWN_FIELDS or name.casefold() not in KNOWN_FIELDS
        }
    fields.update(replace)
    return _encoder.encode(fields)


def _check_generation(request: Generation, limits: DecodeLimits) -> None:
    if request.n is not None and request.n > limits.max_n:
        raise InvalidRequest(f"`n` must be at most {limits.max_n}.", param="n")
    if request.stream_options is not None and not request.wants_stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", param="stream_options")


def _check_messages(messages: list[Message], limits: DecodeLimits) -> None:
    if len(messages) > limits.max_messages:
        raise InvalidRequest(
            f"`messages` must have at most {limits.max_messages} items, not {len(messages)}.",
            param="messages",
        )
    for i, message in enumerate(messages):
        role = message.role
        if message.content is None and role != "assistant":
            raise InvalidRequest(
                f"`messages[{i}].content` must be a string or a list of parts.",
                param=f"messages[{i}].content",
            )
        if role == "tool" and message.tool_call_id is None:
            raise InvalidRequest(
                f"`messages[{i}].tool_call_id` must name the call that this message answers.",
                param=f"messages[{i}].tool_call_id",
            )


def _check_tools(tools: list[Tool]) -> None:
    for i, tool in enumerate(tools):
        _check_depth(tool.function.parameters, f"tools[{i}].function.parameters")


def _check_depth(value: Any, param: str) -> None:
    # The decoder's own bound is the interpreter's stack, which other code would then overrun.
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise InvalidRequest(f"`{param}` is nested more than {MAX_DEPTH} levels deep.", param=param)


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _check_texts(value: Texts, param: str, limits: DecodeLimits) -> None:
    if isinstance(value, str):
        return
    kinds = set(map(type, value))
    if len(kinds) > 1:
        raise InvalidRequest(
            f"`{param}` must be a string, or a list of strings, of token ids, or of lists of token ids.",
            param=param,
        )
    if int not in kinds and len(value) > limits.max_prompts:
        raise InvalidRequest(f"`{param}` must have at most {limits.max_prompts} items.", param=param)


def _each(value: Any) -> list[str | list[int]]:
    return value if isinstance(value, list) and not isinstance(value[0], int) else [value]


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        if not body.isascii():
            str(body, "utf-8")  # the decoder does not look into the strings of fields that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(_why_malformed(body, str(error))) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None


# A high surrogate without a low one. The backslashes before it come in pairs, else they'd escape its own.
_LONE_SURROGATE = re.compile(rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB]..)(?!\\u[dD][c-fC-F])")


def _why_malformed(body: bytes, problem: str) -> str:
    if not body.strip():
        return "The body is empty; a JSON object is needed."
    # The decoder calls a lone surrogate at the end of a string "truncated".
    if found := _LONE_SURROGATE.search(body):
        problem = f"lone surrogate {found[1].decode('latin-1')} (byte {found.start(1)})"
    return f"The body is not valid JSON: {problem.removeprefix('JSON is malformed: ')}."


_PLACE = re.compile(r"(?s)(.*) - at (`key` in )?`\$\.?(.*?)(\[\.\.\.\].*)?`")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_EXPECTED = re.compile(r"Expected `([^`]*)`(?:, got `(.*)`)?(.*)")
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def _invalid_field(problem: str) -> InvalidRequest:
    """msgspec's message and path, in OpenAI's terms."""
    param, inside = "", ""
    if found := _PLACE.fullmatch(problem):
        problem, param = found[1], found[3]
        inside = "A key of " if found[2] else "A value in " if found[4] else ""
    if missing := _MISSING.fullmatch(problem):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return InvalidRequest(f"`{param}` is missing.", param=param)
    subject = f"{inside}`{param}`" if param else "The body"
    if expected := _EXPECTED.fullmatch(problem):
        wanted = " or ".join(_TYPES.get(name, name) for name in expected[1].split(" | "))
        got = f", not {_TYPES.get(expected[2], expected[2])}" if expected[2] else ""
        sentence = f"{subject} must be {wanted}{expected[3]}{got}."
    else:
        # A wrong value is quoted in full, so it may be long.
        sentence = f"{subject}: {problem[:1].lower()}{problem[1:200]}."
    return InvalidRequest(sentence, param=param or None)
