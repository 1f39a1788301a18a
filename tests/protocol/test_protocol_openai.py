"""Untrusted bodies: what is accepted, and how everything else is refused."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import (
    MAX_DEPTH,
    ChatRequest,
    DecodeLimits,
    ImagePart,
    ImageUrl,
    NamedToolChoice,
    TextPart,
    decode_chat,
    decode_completion,
    decode_detokenize,
    decode_embedding,
    decode_tokenize,
    reencode,
)

LIMITS = DecodeLimits(max_n=4, max_messages=3, max_prompts=3)
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FULL: dict[str, Any] = {
    "model": "deepseek-v3",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi "}, "there", PICTURE],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
    ],
    "temperature": 2,
    "top_p": 0.5,
    "presence_penalty": -2,
    "frequency_penalty": 1.5,
    "n": 4,
    "max_tokens": 5,
    "stop": ["a", "b"],
    "seed": -(2**63),
    "logit_bias": {"5": -100, "7": 1.5},
    "logprobs": True,
    "top_logprobs": 20,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "u",
    "metadata": {"k": "v"},
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "unknown": {"ignored": [1]},
}


def chat(**fields: Any) -> ChatRequest:
    return decode_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), LIMITS)


def refused(decode: Callable[[bytes, DecodeLimits], object], body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(body, LIMITS)
    return caught.value


def test_every_field_of_a_chat_request() -> None:
    request = decode_chat(json.dumps(FULL).encode(), LIMITS)
    assert request.messages[1].content == [
        TextPart(text="Hi "),
        "there",
        ImagePart(image_url=ImageUrl(url="data:,", detail="low")),
    ]
    assert request.messages[2].tool_calls is not None
    assert request.messages[2].tool_calls[0].function.name == "f"
    assert (request.temperature, request.top_p, request.choices) == (2.0, 0.5, 4)
    assert request.stops == ("a", "b")
    assert request.logit_bias == {5: -100.0, 7: 1.5}
    assert request.stream
    assert request.include_usage
    assert isinstance(request.tool_choice, NamedToolChoice)


def test_null_means_not_given() -> None:
    optional = [name for name in ChatRequest.__struct_encode_fields__ if name not in ("model", "messages")]
    assert chat(**dict.fromkeys(optional)) == chat()
    assert not chat().stream
    assert not chat().include_usage
    assert (chat().choices, chat().stops, chat().limit) == (1, (), None)


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5).limit == 5
    assert chat(max_completion_tokens=7).limit == 7
    assert chat(max_tokens=5, max_completion_tokens=7).limit == 7


def test_stop_as_a_string() -> None:
    assert chat(stop="x").stops == ("x",)
    assert chat(stop=[]).stops == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": -0.01}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": True}}},
            "response_format.json_schema.schema",
        ),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"user": 5}, "user"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools[1].function"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [USER] * 4}, "messages"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": 5.0}, "`max_tokens` must be an integer or null, not a number."),
        ({"temperature": 3}, "`temperature` must be a number <= 2.0."),
        ({"n": 10**9}, "`n` must be at most 4."),
        ({"logit_bias": {"x": 1}}, "A key of `logit_bias` must be an integer, not a string."),
        ({"logit_bias": {"1": None}}, "A value in `logit_bias` must be a number, not null."),
        ({"messages": [{"role": "robot"}]}, "`messages[0].role`: invalid enum value 'robot'."),
        ({"messages": [USER] * 4}, "`messages` must have at most 3 items, not 4."),
    ],
)
def test_messages_are_sentences(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.message == sentence


def test_a_long_wrong_value_is_not_echoed_in_full() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[{"role": "x" * 10**6}])
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is empty; a JSON object is needed."),
        (b" \n", "The body is empty; a JSON object is needed."),
        (b"[]", "The body must be an object, not an array."),
        (b"null", "The body must be an object, not null."),
        (b"{", "The body is not valid JSON: Input data was truncated."),
        (b'{"model":NaN}', "The body is not valid JSON: invalid character (byte 9)."),
        (b'{"x":Infinity}', "The body is not valid JSON: invalid character (byte 5)."),
        (b'{"x":1,}', "The body is not valid JSON: trailing comma in object (byte 7)."),
        (b'{"x":"\xff"}', "The body is not valid UTF-8 (byte 6)."),
        (b'{"x":"\xed\xa0\x80"}', "The body is not valid UTF-8 (byte 6)."),
        (rb'{"x":"\ud800"}', r"The body is not valid JSON: lone surrogate \ud800 (byte 6)."),
        (rb'{"x":"\uD800\u0041"}', r"The body is not valid JSON: lone surrogate \uD800 (byte 6)."),
        (rb'{"x":"\udc00"}', "The body is not valid JSON: invalid utf-16 surrogate pair (byte 12)."),
        (rb'{"x":"\\ud800', "The body is not valid JSON: Input data was truncated."),
        (b'{"x":' * 100_000, "The body is nested too deeply."),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "The body is nested too deeply."),
    ],
)
@pytest.mark.parametrize(
    "decode", [decode_chat, decode_completion, decode_embedding, decode_tokenize, decode_detokenize]
)
def test_malformed_bodies(
    decode: Callable[[bytes, DecodeLimits], object], body: bytes, sentence: str
) -> None:
    error = refused(decode, body)
    assert error.message == sentence
    assert error.param is None


def test_a_surrogate_pair_is_a_character() -> None:
    body = rb'{"model":"m","messages":[{"role":"user","content":"\ud83d\ude00"}]}'
    assert decode_chat(body, LIMITS).messages[0].content == "😀"


def test_deep_values_are_refused_before_other_code_sees_them() -> None:
    deep: Any = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": [deep]}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": deep}}
    with pytest.raises(InvalidRequest, match="nested more than 100 levels"):
        chat(response_format=schema)
    with pytest.raises(InvalidRequest, match=r"tools\[0\].function.parameters"):
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])


def test_completion_prompts() -> None:
    def prompts(value: object) -> list[str | list[int]]:
        return decode_completion(json.dumps({"model": "m", "prompt": value}).encode(), LIMITS).prompts

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2, 3, 4, 5]) == [[1, 2, 3, 4, 5]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]


@pytest.mark.parametrize(
    "value", [None, [], [[]], ["a", 1], ["a", [1]], [-1], [2**31], [1.5], [True], ["a"] * 4, {"a": 1}]
)
def test_wrong_texts(value: object) -> None:
    prompt = refused(decode_completion, json.dumps({"model": "m", "prompt": value}).encode())
    assert (prompt.param or "").startswith("prompt")
    text = refused(decode_embedding, json.dumps({"model": "m", "input": value}).encode())
    assert (text.param or "").startswith("input")


def test_completion_defaults_and_ranges() -> None:
    def completion(**fields: Any) -> bytes:
        return json.dumps({"model": "m", "prompt": "a", **fields}).encode()

    assert decode_completion(completion(), LIMITS).limit == 16
    assert decode_completion(completion(max_tokens=3, logprobs=0, echo=True), LIMITS).limit == 3
    assert refused(decode_completion, completion(logprobs=21)).param == "logprobs"
    assert refused(decode_completion, completion(logprobs=True)).param == "logprobs"
    assert refused(decode_completion, completion(n=5)).param == "n"


def test_embedding() -> None:
    request = decode_embedding(b'{"model":"m","input":["a","b"],"encoding_format":"base64"}', LIMITS)
    assert request.inputs == ["a", "b"]
    assert (
        refused(decode_embedding, b'{"model":"m","input":"a","encoding_format":"x"}').param
        == "encoding_format"
    )


def test_tokenize_takes_one_text_or_messages() -> None:
    assert decode_tokenize(b'{"content":"a"}', LIMITS).text == "a"
    assert decode_tokenize(b'{"prompt":"a","add_special_tokens":true}', LIMITS).add_special_tokens
    assert decode_tokenize(b'{"prompt":""}', LIMITS).text == ""
    messages = decode_tokenize(b'{"messages":[{"role":"user","content":"a"}]}', LIMITS).messages
    assert messages is not None
    assert messages[0].content == "a"
    assert refused(decode_tokenize, b"{}").param == "content"
    assert refused(decode_tokenize, b'{"prompt":"a","content":"a"}').param == "content"
    assert refused(decode_tokenize, b'{"messages":[{"role":"user"}]}').param == "messages[0].content"


def test_detokenize() -> None:
    assert decode_detokenize(b'{"tokens":[1,2]}', LIMITS).tokens == [1, 2]
    assert refused(decode_detokenize, b'{"tokens":[-1]}').param == "tokens[0]"
    assert refused(decode_detokenize, b"{}").param == "tokens"


def test_reencode_replaces_adds_and_keeps_the_rest_verbatim() -> None:
    body = '{"model":"ours", "new" : {"a": 1.50, "e":"é\\u00e9"},"messages":[]}'.encode()
    assert (
        reencode(body, {"model": "theirs", "stream_options": {"include_usage": True}})
        == (
            '{"model":"theirs","new":{"a": 1.50, "e":"é\\u00e9"},"messages":[],'
            '"stream_options":{"include_usage":true}}'
        ).encode()
    )


def test_of_duplicate_keys_the_last_counts_everywhere() -> None:
    body = (
        b'{"n":9,"model":"a","messages":[{"role":"user","content":"y"}],"mod\\u0065l":"b",'
        b'"messages":[{"role":"user","content":"x"}],"n":2}'
    )
    request = decode_chat(body, LIMITS)
    assert (request.model, request.n, len(request.messages)) == ("b", 2, 1)
    sent = reencode(body, {})
    assert msgspec.json.decode(sent) == {
        "model": "b",
        "n": 2,
        "messages": [{"role": "user", "content": "x"}],
    }
    assert sent.count(b'"model"') == sent.count(b'"n"') == sent.count(b'"messages"') == 1


@pytest.mark.parametrize("smuggled", ["Model", "MODEL", "N", "Max_Tokens", "max_token\u017f", "meſſages"])
def test_a_name_that_differs_only_in_case_is_not_sent_on(smuggled: str) -> None:
    body = json.dumps({"model": "m", "Temperature_x": 1, smuggled: "evil"}).encode()
    assert msgspec.json.decode(reencode(body, {})) == {"model": "m", "Temperature_x": 1}


def test_a_million_messages_are_refused() -> None:
    body = b'{"model":"m","messages":[' + b",".join([b'{"role":"user","content":""}'] * 10**6) + b"]}"
    assert refused(decode_chat, body).message == "`messages` must have at most 3 items, not 1000000."


# Whatever comes in, the decoders answer with a request or with InvalidRequest.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
# No deadlines: the first text that hypothesis draws on a machine takes a second.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from(
    sorted({*FULL, "prompt", "input", "content", "tokens", "max_completion_tokens", "echo", "suffix"})
)


def survives(body: bytes) -> None:
    for decode in (decode_chat, decode_completion, decode_embedding, decode_tokenize, decode_detokenize):
        try:
            decode(body, LIMITS)
        except InvalidRequest as error:
            json.dumps(error.body()).encode()
            continue
        reencode(body, {"model": "x"})  # what was accepted can be sent on


@patiently
@given(st.binary(max_size=200))
def test_random_bytes(body: bytes) -> None:
    survives(body)


@patiently
@given(st.dictionaries(NAMES, JSON, max_size=8))
def test_random_values_in_known_fields(fields: dict[str, Any]) -> None:
    survives(json.dumps({"model": "m", **fields}).encode())


@patiently
@given(NAMES, JSON)
def test_one_random_field_in_a_valid_request(name: str, value: object) -> None:
    survives(json.dumps({**FULL, name: value}).encode())


@patiently
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_mutated_bytes_of_a_valid_request(rng: random.Random, times: int) -> None:
    body = bytearray(json.dumps(FULL, ensure_ascii=False).encode())
    for _ in range(times):
        at = rng.randrange(len(body))
        choice = rng.random()
        if choice < 0.4:
            body[at] = rng.randrange(256)
        elif choice < 0.7:
            del body[at : at + rng.randrange(1, 9)]
        else:
            body[at:at] = body[at : at + rng.randrange(1, 40)]
    survives(bytes(body))
