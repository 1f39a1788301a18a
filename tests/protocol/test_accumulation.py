"""What OpenAI's own library adds up from our stream is what the collector answers."""

import json
from itertools import count
from typing import Any

import pytest
from openai._streaming import SSEDecoder
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from deepseek_api_compat.protocol.completion import ChatCollector, ChatStream, Profile
from deepseek_api_compat.protocol.events import Event, Usage
from deepseek_api_compat.protocol.job import Piece, TokenLogprob
from deepseek_api_compat.protocol.output_tags import TagParser

IDENTITY = ("chatcmpl-1", 1700000000, "small")
USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=30, reasoning_tokens=6)
OUTPUT = (
    "<think>\nTwo cities.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "note": "5 < 6 \\"ok\\""}}'
    "\n</tool_call>\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "תל אביב"}}\n</tool_call>'
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
profiles = pytest.mark.parametrize("profile", ["openai", "deepseek"])


def told(output: str, index: int = 0, size: int = 3, logprobs: bool = False) -> list[list[Event]]:
    """The events of a choice, piece by piece."""
    ids = count()
    parser = TagParser(
        start="either", tools_declared=True, index=index, new_id=lambda: f"call_{index}_{next(ids)}"
    )
    texts = [output[at : at + size] for at in range(0, len(output), size)]
    pieces = [
        Piece(text=text, logprobs=[TokenLogprob(text, -0.5, list(text.encode()))] if logprobs else None)
        for text in texts
    ]
    return [parser.feed(piece) for piece in [*pieces, Piece(finish="stop")]]


def accumulated(groups: list[list[Event]], profile: Profile = "openai", n: int = 1) -> dict[str, Any]:
    """What the library makes of the stream's bytes."""
    stream = ChatStream(*IDENTITY, include_usage=True, profile=profile, n=n)
    sse = b"".join([stream.feed(group) for group in groups] + [stream.feed([USAGE]), stream.done()])
    state: Any = ChatCompletionStreamState(input_tools=[TOOL])
    *chunks, last = SSEDecoder().iter_bytes(iter([sse]))
    assert last.data == "[DONE]"
    for chunk in chunks:
        for _ in state.handle_chunk(ChatCompletionChunk.model_validate_json(chunk.data)):
            pass
    return json.loads(state.get_final_completion().to_json())  # type: ignore[no-any-return]


def collected(groups: list[list[Event]], n: int = 1) -> dict[str, Any]:
    collector = ChatCollector(*IDENTITY, n=n)
    for group in groups:
        collector.feed(group)
    collector.feed([USAGE])
    return json.loads(collector.response())  # type: ignore[no-any-return]


@profiles
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_text_and_parallel_calls(profile: Profile, size: int) -> None:
    groups = told(OUTPUT, size=size)
    whole = accumulated(groups, profile)
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == "Let me look."
    assert message["reasoning_content"] == "Two cities."
    assert [(call["id"], call["type"]) for call in message["tool_calls"]] == [
        ("call_0_0", "function"),
        ("call_0_1", "function"),
    ]
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["weather", "weather"]
    wanted = [{"city": "Oslo", "note": '5 < 6 "ok"'}, {"city": "תל אביב"}]
    assert [json.loads(function["arguments"]) for function in functions] == wanted
    # A strict tool: the library parses them while they come.
    assert [function["parsed_arguments"] for function in functions] == wanted
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


def comparable(value: Any) -> Any:
    """Without what only the library adds (nulls, what it has parsed), or what only a stream has."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if not isinstance(value, dict):
        return value
    extra = {"parsed", "parsed_arguments"} | ({"index"} if "function" in value else set())
    # A stream can't take back the empty text it begins with.
    return {
        key: comparable(item)
        for key, item in value.items()
        if key not in extra and item is not None and (key, item) != ("content", "")
    }


@profiles
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(
    "output", [OUTPUT, "Just text: é😀", "<think>only</think>", OUTPUT[OUTPUT.index("<tool") :]]
)
def test_the_stream_adds_up_to_the_collected_answer(profile: Profile, logprobs: bool, output: str) -> None:
    groups = told(output, logprobs=logprobs)
    streamed, whole = accumulated(groups, profile), collected(groups)
    assert streamed["usage"] == whole["usage"]
    assert comparable(streamed["choices"]) == comparable(whole["choices"])


def test_logprobs_are_aligned_with_the_text() -> None:
    choice = accumulated(told("<think>no</think>yes, it is", size=1, logprobs=True))["choices"][0]
    tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert "".join(tokens) == choice["message"]["content"] == "yes, it is"


@profiles
def test_two_choices_interleaved(profile: Profile) -> None:
    first, second = told(OUTPUT, 0, logprobs=True), told("<think>hm</think>No city.", 1, logprobs=True)
    groups = [second.pop(0)]  # whoever begins
    while first or second:
        groups += [side.pop(0) for side in (first, second) if side]
    streamed, whole = accumulated(groups, profile, n=2), collected(groups, n=2)
    assert streamed["usage"] == whole["usage"]
    assert comparable(streamed["choices"]) == comparable(whole["choices"])
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["tool_calls", "stop"]
