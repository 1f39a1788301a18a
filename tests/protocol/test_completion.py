"""Events to OpenAI responses; what streams and what is collected must be the same answer."""

import base64
import json
import struct
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.completion import (
    ChatCollector,
    ChatStream,
    CompletionCollector,
    CompletionStream,
    Profile,
    embedding_response,
    legacy_logprobs,
    model_list,
    model_object,
    usage_object,
)
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.protocol.job import TokenLogprob

IDENTITY = ("chatcmpl-1", 1700000000, "small")
USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3, reasoning_tokens=1)
USAGE_OBJECT = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 1},
    "prompt_cache_hit_tokens": 4,
    "prompt_cache_miss_tokens": 6,
}
HELLO: list[Event] = [Text(0, "Hel"), Text(0, "lo"), Finish(0, "stop"), USAGE]
THE = TokenLogprob(" the", -0.25, [32, 116, 104, 101], [TokenLogprob(" a", float("-inf"), [32, 97])])


def chunks(sse: bytes) -> list[dict[str, Any]]:
    """The JSON of each event, without [DONE]; checks the framing."""
    *events, rest = sse.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in events)
    return [json.loads(event[6:]) for event in events if event != b"data: [DONE]"]


def deltas(sse: bytes) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks(sse) for choice in chunk["choices"]]


def test_a_chat_stream_byte_by_byte() -> None:
    stream = ChatStream(*IDENTITY, fingerprint="fp_1")
    head = (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"small",'
        b'"system_fingerprint":"fp_1","choices":[{"index":0,"delta":'
    )
    tail = b',"logprobs":null,"finish_reason":null}]}\n\n'
    assert stream.feed([Text(0, 'é"\n')]) == (
        head + b'{"role":"assistant","content":""}' + tail + head + '{"content":"é\\"\\n"}'.encode() + tail
    )
    assert stream.feed([Text(0, "!")]) == head + b'{"content":"!"}' + tail
    assert stream.feed([Finish(0, "stop"), USAGE]) == (
        head + b'{"content":""},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    )
    assert stream.done() == b"data: [DONE]\n\n"


def test_usage_in_a_last_chunk_only_if_asked_for() -> None:
    plain = ChatStream(*IDENTITY)
    assert all("usage" not in chunk for chunk in chunks(plain.feed(HELLO) + plain.done()))

    asked = ChatStream(*IDENTITY, include_usage=True)
    *others, last = chunks(asked.feed(HELLO) + asked.done())
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == USAGE_OBJECT


@pytest.mark.parametrize("include_usage", [False, True])
def test_deepseek_profile_sends_usage_on_the_finishing_chunk(include_usage: bool) -> None:
    stream = ChatStream(*IDENTITY, profile="deepseek", include_usage=include_usage)
    assert chunks(stream.feed([Text(0, "a"), Finish(0, "length")]))[-1]["choices"][0]["finish_reason"] is None
    (last,) = chunks(stream.feed([USAGE]))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"] == USAGE_OBJECT
    assert stream.done() == b"data: [DONE]\n\n"


def test_deepseek_profile_with_several_choices_holds_back_only_the_last_finish() -> None:
    stream = ChatStream(*IDENTITY, profile="deepseek", n=2)
    first = chunks(stream.feed([Text(0, "a"), Text(1, "b"), Finish(1, "stop")]))[-1]
    assert (first["choices"][0]["index"], first["choices"][0]["finish_reason"]) == (1, "stop")
    (last,) = chunks(stream.feed([Finish(0, "stop"), USAGE]))
    assert last["choices"][0]["index"] == 0
    assert "usage" in last


def test_deepseek_profile_without_usage_still_finishes() -> None:
    stream = ChatStream(*IDENTITY, profile="deepseek")
    stream.feed([Finish(0, "stop")])
    (last,) = chunks(stream.done())
    assert last["choices"][0]["finish_reason"] == "stop"


def test_each_choice_gets_its_role_once() -> None:
    sse = ChatStream(*IDENTITY, n=2).feed([Text(1, "b"), Text(0, "a"), Text(1, "b"), Finish(0, "stop")])
    indexes = [
        choice["index"] for chunk in chunks(sse) for choice in chunk["choices"] if "role" in choice["delta"]
    ]
    assert indexes == [0, 1]


def test_tool_call_deltas_carry_id_and_name_once() -> None:
    sse = ChatStream(*IDENTITY).feed(
        [ToolCall(0, 0, "c1", "f"), ToolCall(0, 0, arguments='{"x"'), ToolCall(0, 1, "c2", "g", "{}")]
    )
    assert [delta["tool_calls"][0] for delta in deltas(sse)[1:]] == [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x"'}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_logprobs_of_chat() -> None:
    expected = {
        "content": [
            {
                "token": " the",
                "logprob": -0.25,
                "bytes": [32, 116, 104, 101],
                "top_logprobs": [{"token": " a", "logprob": -9999.0, "bytes": [32, 97]}],
            }
        ]
    }
    events: list[Event] = [Text(0, " the", [THE]), Finish(0, "stop")]
    chunk = chunks(ChatStream(*IDENTITY).feed(events))[1]
    assert chunk["choices"][0]["logprobs"] == expected
    collector = ChatCollector(*IDENTITY)
    collector.feed(events)
    assert json.loads(collector.response())["choices"][0]["logprobs"] == expected


def test_a_broken_stream_ends_with_an_error_event() -> None:
    sse = ChatStream(*IDENTITY).error(EngineFailed("The engine died."))
    assert sse == (
        b'data: {"error":{"message":"The engine died.","type":"server_error","param":null,'
        b'"code":"engine_failed"}}\n\n'
    )


def test_a_collected_chat() -> None:
    collector = ChatCollector(*IDENTITY, fingerprint="fp_1")
    collector.feed([Reasoning(0, "h"), Reasoning(0, "m"), *HELLO])
    assert json.loads(collector.response()) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "small",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE_OBJECT,
    }


def test_content_is_null_only_beside_tool_calls() -> None:
    collector = ChatCollector(*IDENTITY, n=3)
    collector.feed([ToolCall(0, 0, "c1", "f", "{}"), Text(1, "a"), ToolCall(1, 0, "c1", "f", "{}")])
    contents = [choice["message"]["content"] for choice in json.loads(collector.response())["choices"]]
    assert contents == [None, "a", ""]


def test_legacy_completions_with_echo_and_logprobs() -> None:
    events: list[Event] = [
        Text(1, " the", [THE]),
        Text(1, " the", [THE]),
        Finish(1, "stop"),
        Finish(0, "length"),
    ]
    logprobs = {
        "tokens": [" the", " the"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{" a": -9999.0, " the": -0.25}] * 2,
        "text_offset": [2, 6],
    }
    collector = CompletionCollector(*IDENTITY, prompts=2, echo=["a", "bb"])
    collector.feed(events)
    assert json.loads(collector.response())["choices"] == [
        {"text": "a", "index": 0, "logprobs": None, "finish_reason": "length"},
        {"text": "bb the the", "index": 1, "logprobs": logprobs, "finish_reason": "stop"},
    ]

    sse = CompletionStream(*IDENTITY, prompts=2, echo=["a", "bb"]).feed(events)
    choices = [choice for chunk in chunks(sse) for choice in chunk["choices"]]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (1, "bb", None),
        (1, " the", None),
        (1, " the", None),
        (1, "", "stop"),
        (0, "a", None),
        (0, "", "length"),
    ]
    assert [choice["logprobs"]["text_offset"] for choice in choices[1:3]] == [[2], [6]]


def test_offsets_of_several_tokens_in_one_step() -> None:
    half = TokenLogprob("a", -1.0, [97])
    assert legacy_logprobs([THE, half, THE], 3)["text_offset"] == [3, 7, 8]


def test_echo_goes_with_the_prompt_of_the_choice() -> None:
    collector = CompletionCollector(*IDENTITY, prompts=2, n=2, echo=["a", "b"])
    texts = [choice["text"] for choice in json.loads(collector.response())["choices"]]
    assert texts == ["a", "a", "b", "b"]


def test_models() -> None:
    (model,) = model_list([model_object("small", 1700000000, "us", aliases=["s"])])["data"]
    assert Model.model_validate(model).id == "small"
    assert model["aliases"] == ["s"]


def test_embeddings_as_floats_and_as_base64() -> None:
    vectors = [[0.5, -1.0], [2.0, 0.25]]
    floats = embedding_response("small", vectors, 7)
    assert [one.embedding for one in CreateEmbeddingResponse.model_validate(floats).data] == vectors
    packed = embedding_response("small", vectors, 7, encoding="base64")
    assert [
        list(struct.unpack("<2f", base64.b64decode(one["embedding"]))) for one in packed["data"]
    ] == vectors
    assert packed["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


# Any events, cut anywhere, stream and collect to the same answer, and the openai package reads both.

patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LOGPROBS = st.lists(
    st.builds(
        TokenLogprob,
        st.text(max_size=3),
        st.floats(-50, 0),
        st.lists(st.integers(0, 255), max_size=3),
        st.lists(st.builds(TokenLogprob, st.text(max_size=3), st.floats(-50, 0), st.just([])), max_size=2),
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def answers(draw: st.DrawFn, *, n: int, chat: bool) -> list[Event]:
    """Events of n complete choices, interleaved, and the usage."""
    kinds = ["text", "reasoning", "call"] if chat else ["text"]
    queues: list[list[Event]] = []
    for index in range(n):
        queue: list[Event] = []
        logprobs = draw(st.booleans())
        calls = 0
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
            piece = draw(st.text(max_size=4))
            if kind == "text":
                queue.append(Text(index, piece, draw(LOGPROBS) if logprobs else None))
            elif kind == "reasoning":
                queue.append(Reasoning(index, piece))
            else:
                queue += [
                    ToolCall(index, calls, f"call_{calls}", "f"),
                    ToolCall(index, calls, arguments=piece),
                ]
                calls += 1
        queue.append(Finish(index, draw(st.sampled_from(["stop", "length"]))))
        queues.append(queue)
    order = draw(st.permutations([index for index, queue in enumerate(queues) for _ in queue]))
    heads = [iter(queue) for queue in queues]
    return [*(next(heads[index]) for index in order), USAGE]


def cut(events: list[Event], at: int) -> list[list[Event]]:
    at = min(at, len(events))
    return [events[:at], events[at:]]


def accumulate(sse: bytes) -> dict[int, dict[str, Any]]:
    """What a client makes of a chat stream, by choice."""
    found: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"content": "", "reasoning": "", "calls": {}, "logprobs": [], "finish": None}
    )
    for chunk in chunks(sse):
        ChatCompletionChunk.model_validate(chunk)
        for choice in chunk["choices"]:
            one, delta = found[choice["index"]], choice["delta"]
            assert one["finish"] is None, "nothing may follow the finish"
            one["content"] += delta.get("content") or ""
            one["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                whole = one["calls"].setdefault(
                    call["index"], {"id": call.get("id"), "name": "", "arguments": ""}
                )
                whole["name"] += call["function"].get("name", "")
                whole["arguments"] += call["function"]["arguments"]
            if choice["logprobs"] is not None:
                one["logprobs"] += choice["logprobs"]["content"]
            one["finish"] = choice["finish_reason"]
    return found


@patiently
@given(st.data(), st.integers(1, 3), st.integers(0, 20), st.sampled_from(["openai", "deepseek"]))
def test_chat_streams_as_it_collects(data: st.DataObject, n: int, at: int, profile: Profile) -> None:
    events = data.draw(answers(n=n, chat=True))
    stream = ChatStream(*IDENTITY, n=n, include_usage=True, profile=profile)
    collector = ChatCollector(*IDENTITY, n=n)
    sse = b""
    for part in cut(events, at):
        sse += stream.feed(part)
        collector.feed(part)
    sse += stream.done()
    assert sse.endswith(b"data: [DONE]\n\n")
    streamed = accumulate(sse)
    whole = json.loads(collector.response())
    ChatCompletion.model_validate(whole)
    assert whole["usage"] == chunks(sse)[-1]["usage"] == usage_object(USAGE)
    assert len(whole["choices"]) == len(streamed) == n
    for choice in whole["choices"]:
        message, one = choice["message"], streamed[choice["index"]]
        assert (message["content"] or "") == one["content"]
        assert message.get("reasoning_content", "") == one["reasoning"]
        assert choice["finish_reason"] == one["finish"]
        assert ((choice["logprobs"] or {}).get("content") or []) == one["logprobs"]
        calls = [
            {"id": call["id"], "name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in message.get("tool_calls", [])
        ]
        assert calls == [one["calls"][number] for number in sorted(one["calls"])]


@patiently
@given(st.data(), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.integers(0, 20))
def test_completions_stream_as_they_collect(
    data: st.DataObject, prompts: int, n: int, echoes: bool, at: int
) -> None:
    events = data.draw(answers(n=prompts * n, chat=False))
    echo = [f"prompt {number}: " for number in range(prompts)] if echoes else None
    stream = CompletionStream(*IDENTITY, include_usage=True, prompts=prompts, n=n, echo=echo)
    collector = CompletionCollector(*IDENTITY, prompts=prompts, n=n, echo=echo)
    sse = b""
    for part in cut(events, at):
        sse += stream.feed(part)
        collector.feed(part)
    texts: dict[int, str] = defaultdict(str)
    finishes: dict[int, str] = {}
    logprobs: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for chunk in chunks(sse + stream.done()):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"] is not None:
                finishes[choice["index"]] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                logprobs[choice["index"]][name] += values
    whole = json.loads(collector.response())
    Completion.model_validate(whole)
    assert whole["usage"] == chunks(sse)[-1]["usage"]
    assert len(whole["choices"]) == prompts * n
    for choice in whole["choices"]:
        assert choice["text"] == texts[choice["index"]]
        assert choice["finish_reason"] == finishes[choice["index"]]
        assert (choice["logprobs"] or {}) == logprobs[choice["index"]]
