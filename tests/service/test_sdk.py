"""The current `openai` package against the service: what its users call, and what they get."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from deepseek_api_compat.models.prepared import default_model
from fakes.service import Service

MODEL = "smollm2-135m-instruct"
CONFIG = """
[[models]]
name = "{model}"
aliases = ["deepseek-v3"]
temperature = 0.0

  [[models.engines]]
  kind = "llamacpp"
  path = "{path}"
  batch_size = 4
  context = 1024
"""
PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def sdk_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Four slots of the embedded model, greedy unless a request says otherwise."""
    folder = tmp_path_factory.mktemp("sdk")
    config = folder / "config.toml"
    config.write_text(CONFIG.format(model=MODEL, path=default_model()), encoding="utf-8")
    service = Service(folder / "data", "--config", str(config))
    yield service
    assert service.stop() == 0


def client_of(service: Service, **options: Any) -> OpenAI:
    """Without the package's own retries, so that a test sees the first answer."""
    given = {"api_key": service.key, "base_url": f"{service.url}/v1", "max_retries": 0, "timeout": 60}
    return OpenAI(**given | options)


@pytest.fixture
def client(sdk_service: Service) -> Iterator[OpenAI]:
    with client_of(sdk_service) as client:
        yield client


@pytest.fixture
async def async_client(sdk_service: Service) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=sdk_service.key, base_url=f"{sdk_service.url}/v1", max_retries=0, timeout=60)


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="deepseek-v3", messages=PARIS, max_completion_tokens=24)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=24, stream=True)
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) == len(chunks)  # none is empty: `chunk.choices[0]` never fails unasked
    assert choices[0].delta.role == "assistant"
    assert len(choices) > 4
    assert "Paris" in "".join(choice.delta.content or "" for choice in choices)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"


async def test_async_chat_and_stream(async_client: AsyncOpenAI) -> None:
    async with async_client as client:
        request: Any = {"model": MODEL, "messages": PARIS, "max_tokens": 24}
        whole = await client.chat.completions.create(**request)
        stream = await client.chat.completions.create(**request, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) > 4


async def test_leaving_a_stream_leaves_the_client_usable(async_client: AsyncOpenAI) -> None:
    async with async_client as client:
        request: Any = {"model": MODEL, "messages": PARIS}
        async with await client.chat.completions.create(**request, stream=True) as stream:
            async for _ in stream:
                break
        answer = await client.chat.completions.create(**request, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


def test_stream_helper(client: OpenAI) -> None:
    """The package's own accumulator puts the chunks together again."""
    with client.chat.completions.stream(
        model=MODEL, messages=PARIS, max_tokens=24, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert kinds.count("content.delta") > 4
    assert kinds[-1] != "content.delta"
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.usage is not None


COUNTED: list[dict[str, Any]] = [
    {"max_tokens": 7},
    {"max_tokens": 64},  # ends by itself
    {"max_tokens": 64, "stop": "Paris"},
    {"max_tokens": 5, "n": 3, "seed": 7, "temperature": 1.0, "logit_bias": {"2": -100}},  # none ends
]


@pytest.mark.parametrize("options", COUNTED, ids=str)
def test_usage_is_the_same_for_stream_and_whole(client: OpenAI, options: dict[str, Any]) -> None:
    request: Any = {"model": MODEL, "messages": PARIS, **options}
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    streamed, counted = chunks[-1].usage, whole.usage
    assert streamed is not None
    assert counted is not None
    assert streamed.completion_tokens == counted.completion_tokens > 0
    assert streamed.prompt_tokens == counted.prompt_tokens > 0
    assert streamed.total_tokens == counted.total_tokens == counted.prompt_tokens + counted.completion_tokens
    reasons = sorted(choice.finish_reason or "" for choice in whole.choices)
    assert reasons == sorted(c.finish_reason for k in chunks for c in k.choices if c.finish_reason)


def test_n(client: OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": PARIS, "max_tokens": 6, "n": 3, "temperature": 1.5, "seed": 1}
    request["logit_bias"] = {"2": -100}  # the token that would end a choice before it has begun
    whole = client.chat.completions.create(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 18
    parts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert all(parts.values())


def test_stop(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=24, stop=["Paris", "nowhere"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in (answer.choices[0].message.content or "")


def test_logit_bias(client: OpenAI, sdk_service: Service) -> None:
    with sdk_service.client() as http:
        (token,) = http.post("/tokenize", json={"content": " Rome"}).json()["tokens"]
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=3, logit_bias={str(token): 100}
    )
    assert answer.choices[0].message.content == " Rome Rome Rome"


def test_logprobs(client: OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": PARIS, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    (choice,) = client.chat.completions.create(**request).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert len(tokens) == 5
    assert "".join(entry.token for entry in tokens) == choice.message.content
    for entry in tokens:
        assert entry.bytes == list(entry.token.encode())
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]  # greedy: the chosen token is the likeliest
        assert (best.token, best.logprob) == (entry.token, entry.logprob)
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.001
    streamed = [
        entry
        for chunk in client.chat.completions.create(**request, stream=True)
        for streamed_choice in chunk.choices
        if streamed_choice.logprobs
        for entry in streamed_choice.logprobs.content or ()
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in tokens]


class Country(BaseModel):
    name: Literal["France", "Italy"]
    in_europe: bool


class Capital(BaseModel):
    city: Literal["Berlin", "Paris", "Rome"]
    country: Country


def test_parse_helper_gets_an_instance_of_the_schema(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=PARIS, response_format=Capital, max_tokens=200
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Capital)
    assert parsed.country.name in ("France", "Italy")
    assert answer.choices[0].finish_reason == "stop"


def test_json_object(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": 'Answer in JSON, like {"capital": "Rome"}: France?'}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, response_format={"type": "json_object"}, max_tokens=100
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_completions(client: OpenAI) -> None:
    request: Any = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**request, logprobs=2, echo=True)
    assert whole.object == "text_completion"
    plain = client.completions.create(**request)
    assert whole.choices[0].text == request["prompt"] + plain.choices[0].text
    assert whole.choices[0].logprobs is not None
    assert "".join(whole.choices[0].logprobs.tokens or ()) == plain.choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert "".join(parts) == plain.choices[0].text
    several = client.completions.create(**request | {"prompt": ["One, two,", "A, B,"], "n": 2})
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_models(client: OpenAI) -> None:
    listed = client.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert [model.id for model in client.models.list()] == [MODEL]  # through its pages
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve("deepseek-v3").id == MODEL
    assert client.models.retrieve(MODEL).object == "model"


def test_embeddings_of_a_model_that_has_none(client: OpenAI) -> None:
    """The package asks for base64 unless told otherwise; the refusal is the client's error, not ours."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="Hello")
    assert "embedding" in caught.value.message


@pytest.mark.parametrize("prefix", ["/v1", "/v1/compat", "/compat/v1", "/beta", "", "/v1/"])
def test_every_prefix(sdk_service: Service, prefix: str) -> None:
    with client_of(sdk_service, base_url=sdk_service.url + prefix) as client:
        assert client.models.list().data[0].id == MODEL
        assert client.models.retrieve("deepseek-v3").id == MODEL
        answer = client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=1)
        assert answer.choices[0].message.content
        completion = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=1)
        assert completion.choices[0].text


def test_authentication_error(client: OpenAI, sdk_service: Service) -> None:
    key = sdk_service.key or ""
    for wrong in ("DSK-wrong", key[:-1], key + "x", "sk-proj-abc"):
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key=wrong).models.list()
        assert caught.value.status_code == 401
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "authentication_error"
        assert wrong not in str(caught.value)


def test_permission_denied_error(client: OpenAI, sdk_service: Service) -> None:
    key = sdk_service.new_key("reader", "--role", "metrics")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.with_options(api_key=key).models.list()
    assert caught.value.type == "permission_error"


def test_not_found_error_names_the_models(client: OpenAI) -> None:
    for ask in (
        lambda: client.models.retrieve("gpt-4o"),
        lambda: client.chat.completions.create(model="gpt-4o", messages=PARIS),
        lambda: client.completions.create(model="gpt-4o", prompt="Hello"),
        lambda: client.embeddings.create(model="gpt-4o", input="Hello"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert MODEL in caught.value.message
        assert "deepseek-v3" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.files.list()  # a route that is not there


def test_bad_request_error_names_the_field(client: OpenAI) -> None:
    wrong: list[tuple[str, Any]] = [
        ("temperature", 2.5),
        ("top_p", 0),
        ("max_tokens", 0),
        ("n", 1000),
        ("top_logprobs", 2),
        ("messages", []),
        ("stop", [""]),
    ]
    for field, value in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": PARIS, field: value})
        assert (caught.value.param or "").startswith(field)
        assert field in caught.value.message
        assert caught.value.type == "invalid_request_error"


def test_context_length_error_has_both_numbers(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        tokens = [int(number) for number in re.findall(r"(\d+) tokens", caught.value.message)]
        assert tokens[0] == 1024
        assert 3000 < tokens[1] < 3100


def test_rate_limit_error_says_when_to_come_back(client: OpenAI, sdk_service: Service) -> None:
    slow = client.with_options(api_key=sdk_service.new_key("slow", "--rps", "1"))

    def until_refused() -> None:
        for _ in range(20):  # a busy machine may let a second pass between two of them
            slow.models.list()

    with pytest.raises(openai.RateLimitError) as caught:
        until_refused()
    assert caught.value.type == "rate_limit_error"
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "1"
    # The package's own retry waits as long as the service says, and then gets through at once.
    assert slow.with_options(max_retries=1).models.list().data


def test_raw_response_has_the_request_id(client: OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.request_id
    assert raw.headers["x-ratelimit-limit-requests"] == "100"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.request_id not in (None, raw.request_id)
