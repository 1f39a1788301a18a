"""The package's own client against the service: tokens that renew themselves, plugins, batches."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from deepseek_api_compat import AsyncOpenAI, AuthManager, OpenAI
from deepseek_api_compat.client import auth
from fakes.configs import ENGINE, chat
from fakes.service import Service

SHORT = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def service(start) -> Service:
    return start(ENGINE)


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(api_key=service.key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=service.key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def made(service: Service) -> dict[str, str]:
    """A key with its secret."""
    return json.loads(service.command("keys", "create", "tokens", "--json"))


def ask(client: Any, content: str = "Hello", **more: Any) -> Any:
    return client.chat.completions.create(**chat("tiny", content, **SHORT, **more))


# Tokens


def manager(made: dict[str, str], **options: Any) -> AuthManager:
    return AuthManager(made["api_key"], made["secret_key"], **options)


def test_a_client_renews_its_token(service: Service, made, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAI(auth=manager(made, expires_in=60), base_url=f"{service.url}/v1", max_retries=0) as client:
        first = client.api_key
        assert ask(client).choices
        begin = time.time()
        monkeypatch.setattr(auth.time, "time", lambda: begin + 50)
        assert client.api_key != first
        assert ask(client).choices
        assert client.with_options(timeout=5).api_key == client.api_key
        assert client.with_options(api_key="DSK-other").api_key == "DSK-other"


async def test_an_async_client_with_tokens(service: Service, made) -> None:
    tokens = manager(made, models=["tiny"])
    async with AsyncOpenAI(auth=tokens, base_url=f"{service.url}/v1", max_retries=0) as client:
        answers = await asyncio.gather(*(ask(client) for _ in range(4)))
    assert all(answer.choices for answer in answers)


def test_what_is_wrong_with_a_token_is_said(service: Service, made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tokens: AuthManager) -> str:
        with (
            OpenAI(auth=tokens, base_url=f"{service.url}/v1", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            ask(client)
        return str(caught.value)

    assert "not signed by the key's secret_key" in refused(AuthManager(made["api_key"], "0" * 64))
    begin = time.time()
    for skew in (-7200, 7200):
        monkeypatch.setattr(auth.time, "time", lambda skew=skew: begin + skew)
        assert "heck the clock that made it" in refused(manager(made))


# Plugins and streams


class Shouting:
    """Changes what is asked, and what is answered."""

    def pre_process(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages[-1]["content"] += " Please answer at length, and mention the sea."
        return messages

    def post_process(self, answer: Any) -> Any:
        for choice in answer.choices:
            said = choice.message if hasattr(choice, "message") else choice.delta
            said.content = (said.content or "").upper()
        return answer


class AsyncShouting(Shouting):
    async def pre_process(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:  # type: ignore[override]
        return super().pre_process(messages)

    async def post_process(self, answer: Any) -> Any:
        return super().post_process(answer)


def test_plugins(client: OpenAI) -> None:
    plain = ask(client)
    client.register_plugin(Shouting())
    answer = ask(client)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 5
    content = answer.choices[0].message.content
    assert content == content.upper() != content.lower()
    chunks = [*ask(client, stream=True)]
    assert "".join(chunk.choices[0].delta.get("content", "") for chunk in chunks) == content
    assert ask(client.with_options(timeout=30)).choices[0].message.content == content
    raw = client.chat.completions.with_raw_response.create(**chat("tiny", **SHORT))
    assert raw.parse().usage.prompt_tokens == answer.usage.prompt_tokens


async def test_plugins_of_an_async_client(async_client: AsyncOpenAI) -> None:
    async_client.register_plugin(AsyncShouting())
    content = (await ask(async_client)).choices[0].message.content
    assert content == content.upper() != content.lower()
    stream = await ask(async_client, stream=True)
    assert "".join([chunk.choices[0].delta.get("content", "") async for chunk in stream]) == content


def test_what_is_no_plugin(client: OpenAI) -> None:
    with pytest.raises(TypeError, match="has none"):
        client.register_plugin(object())
    client.register_plugin(AsyncShouting())
    with pytest.raises(TypeError, match="needs AsyncOpenAI"):
        ask(client)


def test_deltas_answer_as_dictionaries(client: OpenAI) -> None:
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    assert deltas[0].get("role") == deltas[0]["role"] == "assistant"
    assert deltas[-1].get("content", "") == ""
    assert deltas[-1].get("tool_calls") is None
    with pytest.raises(KeyError):
        deltas[-1]["refusal"]
    stopped = chat("tiny", max_tokens=60, temperature=0, stop=["e"])
    with client.chat.completions.stream(**stopped) as stream:
        final = stream.until_done().get_final_completion()
    assert final.choices[0].finish_reason == "stop"


# Batches


def requests(count: int) -> list[dict[str, Any]]:
    return [chat("tiny", f"Say {n}.", **SHORT) for n in range(count)]


def texts(answers: list[Any]) -> list[str]:
    return [answer.choices[0].message.content for answer in answers]


def test_a_batch_keeps_order(client: OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    one_by_one = [client.chat.completions.create(**request) for request in requests(6)]
    batch = client.chat.completions.create_batch(requests(6), batch_size=3, progress=True)
    assert [answer.usage.prompt_tokens for answer in batch] == [a.usage.prompt_tokens for a in one_by_one]
    assert len({answer.id for answer in batch}) == 6
    assert "6/6" in capsys.readouterr().err
    assert client.chat.completions.create_batch([]) == []


async def test_an_async_batch(async_client: AsyncOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    batch = await async_client.chat.completions.create_batch(requests(5), batch_size=2, checkpoint=file)
    again = await async_client.chat.completions.create_batch(requests(5), batch_size=2, checkpoint=file)
    assert [answer.id for answer in again] == [answer.id for answer in batch]


def test_errors_in_a_batch(client: OpenAI, tmp_path: Path) -> None:
    wrong = [*requests(2), chat("nobody"), *requests(1)]
    create_batch, file = client.chat.completions.create_batch, tmp_path / "answers.jsonl"
    with pytest.raises(openai.NotFoundError):
        create_batch(wrong, batch_size=1, checkpoint=file)
    assert len(file.read_bytes().splitlines()) == 2
    found = create_batch(wrong, checkpoint=file, return_exceptions=True)
    assert isinstance(found[2], openai.NotFoundError)
    assert len(texts([*found[:2], found[3]])) == 3
    with pytest.raises(ValueError, match="Request 0 asks for a stream"):
        create_batch([chat("tiny", stream=True)])
    with pytest.raises(ValueError, match="at least 1"):
        create_batch([], batch_size=0)


BATCH = """
import json, sys
from deepseek_api_compat import OpenAI
client = OpenAI(api_key=sys.argv[1], base_url=sys.argv[2])
requests = json.loads(sys.argv[4])
for answer in client.chat.completions.create_batch(requests, batch_size=2, checkpoint=sys.argv[3]):
    print(answer.id)
"""


def test_a_batch_goes_on_after_a_crash(service: Service, tmp_path: Path) -> None:
    """Killed with some answers in the file; the last line is cut too."""
    file = tmp_path / "answers.jsonl"
    asked = [chat("tiny", f"Say {n}.", max_tokens=30, logit_bias={"2": -100}) for n in range(8)]
    argv = [sys.executable, "-c", BATCH, service.key or "", f"{service.url}/v1", str(file), json.dumps(asked)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not file.exists() or file.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        process.kill()
    whole = file.read_bytes()
    known = [
        json.loads(line)["answer"]["id"] for line in whole.splitlines(keepends=True) if line[-1:] == b"\n"
    ]
    assert 2 <= len(known) < 8
    file.write_bytes(whole + b'{"request": "cut')
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    ids = done.stdout.split()
    assert len(ids) == 8
    assert set(known) <= set(ids)
    assert file.read_bytes().count(b"\n") == 8


def test_a_file_that_is_no_checkpoint(client: OpenAI, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Hello\n")
    with pytest.raises(ValueError, match=r"notes.txt, line 1: this is no checkpoint"):
        client.chat.completions.create_batch(requests(1), checkpoint=file)
    assert file.read_text() == "Hello\n"
