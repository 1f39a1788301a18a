"""openai-node and Vercel's AI SDK against the service, each in its two newest majors.

A row is a program in node/ that prints a line of JSON for each cell; `make migration-node` installs what they
import.

What a library can't do, and so has no cell:

| row | what |
|---|---|
| `@ai-sdk/deepseek` | never sends `json_schema`: the schema goes into a system message, with `json_object` |
| AI SDK | has one error for every status, `APICallError`, without `code` and `param`; lists no models |
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.configs import TINY
from fakes.rows import Cells, Rows
from fakes.service import Service

NODE = Path(__file__).parent / "node"
OPENAI = {"openai-node 6": ["openai.mjs", "openai-6"], "openai-node 7": ["openai.mjs", "openai"]}
AI = {
    "ai 6, openai-compatible": ["ai.mjs", "ai-6", "openai-compatible-2", "compatible"],
    "ai 6, deepseek": ["ai.mjs", "ai-6", "deepseek-2", "deepseek"],
    "ai 7, openai-compatible": ["ai.mjs", "ai", "@ai-sdk/openai-compatible", "compatible"],
    "ai 7, deepseek": ["ai.mjs", "ai", "@ai-sdk/deepseek", "deepseek"],
}
ROWS = OPENAI | AI

node = shutil.which("node")
pytestmark = pytest.mark.skipif(
    node is None or not (NODE / "node_modules").is_dir(), reason="needs node and `make migration-node`"
)


@pytest.fixture(scope="session")
def rows(service: Service) -> Iterator[Rows]:
    """All rows at once: they wait for the engine most of the time."""
    environment = {**os.environ, "BASE_URL": service.url, "DEEPSEEK_API_KEY": str(service.key)}
    rows = Rows({row: [str(node), *argv] for row, argv in ROWS.items()}, NODE, environment)
    yield rows
    rows.close()


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cells(row: str, rows: Rows) -> Cells:
    return rows.cells(row)


def test_chat(cells: Cells) -> None:
    got = cells["chat"]
    assert "Paris" in got["text"]
    assert got["finish"] == "stop"
    assert got["model"] == TINY


def test_stream(cells: Cells) -> None:
    got = cells["stream"]
    assert got["parts"] > 4
    assert got["text"] == cells["chat"]["text"]
    assert got["finishes"] == ["stop"]
    assert got.get("helper", got["text"]) == got["text"]


def test_tools(row: str, cells: Cells) -> None:
    got = cells["tools"]
    assert got["name"] == "get_weather"
    assert got["args"] in ({"city": "Paris"}, {"city": "Rome"})
    assert got["id"].startswith("call_")
    assert got["finish"] == ("tool_calls" if row in OPENAI else "tool-calls")
    assert got["answer"]
    if row in OPENAI:
        assert got["streamed"] == got["args"]
        assert cells["runTools"] == {"given": [got["args"]["city"]], "roles": ["user", "assistant", "tool"]}
    else:  # the SDK called the function itself and went on with its result
        assert got["given"] == got["streamed"] == [got["args"]["city"]]
        assert got["steps"] == 2
        assert got["streamedAnswer"]


def test_json(row: str, cells: Cells) -> None:
    got = cells["json"]
    assert got["object"] == {"capital": "Paris"}
    assert got["finish"] == "stop"
    if row in AI:
        assert got["worded"] == {"capital": "Paris"}
    if not row.endswith("deepseek"):
        person = got["schema"]
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 12
        assert 1 <= person["age"] <= 99
    if row.endswith("openai-compatible"):
        assert got["streamed"] == got["schema"]
        assert got["partial"] > 1


@pytest.mark.parametrize(
    ("case", "status", "name", "words"),
    [
        ("key", 401, "AuthenticationError", "The API key is malformed"),
        ("model", 404, "NotFoundError", "The model 'gpt-nothing' does not exist. Known models: "),
        ("parameter", 400, "BadRequestError", "`temperature` must be a number <= 2.0."),
        ("stream", 400, "BadRequestError", "`top_p` must be a number <= 1.0."),
    ],
)
def test_errors(row: str, cells: Cells, case: str, status: int, name: str, words: str) -> None:
    got = cells["errors"][case]
    assert got["apiError"]
    assert got["status"] == status
    assert words in got["message"]
    assert got["class"] == (name if row in OPENAI else "AI_APICallError")
    if row in OPENAI:
        assert got["requestID"].startswith("req-")
    else:
        assert not got["retryable"]


@pytest.mark.parametrize("row", OPENAI, indirect=True)
def test_errors_have_code_and_param(cells: Cells) -> None:
    assert cells["errors"]["key"]["code"] == "invalid_api_key"
    assert cells["errors"]["model"]["code"] == "model_not_found"
    assert cells["errors"]["parameter"]["param"] == "temperature"


def test_usage(row: str, cells: Cells) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    if row in AI:
        names = ("inputTokens", "outputTokens", "totalTokens")
    whole, streamed = ([cells["usage"][kind][name] for name in names] for kind in ("whole", "streamed"))
    assert whole == streamed
    assert whole[0] > 0
    assert whole[1] > 0
    assert whole[0] + whole[1] == whole[2]


def test_cached_tokens_are_told(row: str, cells: Cells) -> None:
    streamed = cells["usage"]["streamed"]  # the same prompt was asked just before
    if row in AI:
        assert streamed["inputTokenDetails"]["cacheReadTokens"] > 0
    else:
        assert streamed["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("row", OPENAI, indirect=True)
def test_models(cells: Cells) -> None:
    assert cells["models"] == {"ids": [TINY], "one": TINY}
