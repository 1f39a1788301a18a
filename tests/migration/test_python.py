"""Clients for Python against the service, each in an environment of its own with exact versions.

A row is a program in clients/ that prints a line of JSON for each cell; `make migration-python` makes the
environments of environments.toml. "ours" is this package's client, from the source, over that openai.

What a library can't do, and so has no cell:

| row | what |
|---|---|
| openai 0.28 | parses no schemas; one error class for 400 and 404, without `code` of its own |
| `langchain-deepseek`, `llama-index-llms-deepseek` | `reasoning_content`: the embedded model does not think |
| LangChain, LlamaIndex, llm | list no models |
| LlamaIndex | counts no tokens of streams unless `stream_options` is in `additional_kwargs` |
| llm | can't force a call, so the model is told what to write; has no error classes, but an exit code |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.configs import TINY
from fakes.rows import Cells, Rows
from fakes.service import Service

ROOT = Path(__file__).resolve().parent.parent.parent
CLIENTS = Path(__file__).parent / "clients"
ENVIRONMENTS = Path(os.environ.get("MIGRATION_ENVIRONMENTS", ROOT / ".venv-migration"))
OLD = {"openai 0.28": ["openai-0.28", "openai_028.py"]}
OPENAI = {f"openai {major}": [f"openai-{major}", "openai_clients.py", "openai"] for major in (1, 2, 3)}
OURS = {f"ours, openai {major}": [f"openai-{major}", "openai_clients.py", "ours"] for major in (1, 2, 3)}
LANGCHAIN = {
    f"langchain-{of}": ["langchain-deepseek", "langchain_models.py", of] for of in ("openai", "deepseek")
}
LLAMA_INDEX = {
    f"llama-index-llms-{of}": ["llama-index", "llama_index_models.py", of]
    for of in ("openai-like", "deepseek")
}
LLM = {"llm": ["llm", "llm_command.py"]}
# The slow ones first: all start at once.
ROWS = LLAMA_INDEX | LANGCHAIN | LLM | OLD | OPENAI | OURS

pytestmark = pytest.mark.skipif(not ENVIRONMENTS.is_dir(), reason="needs `make migration-python`")


@pytest.fixture(scope="session")
def rows(service: Service) -> Iterator[Rows]:
    """All rows at once: they wait for the engine most of the time."""
    made = json.loads(service.command("keys", "create", "tokens", "--json"))
    environment = {
        **os.environ,
        "BASE_URL": service.url,
        "DEEPSEEK_API_KEY": str(service.key),
        "TOKEN_KEY": made["api_key"],
        "TOKEN_SECRET": made["secret_key"],
        "PYTHONPATH": str(ROOT / "src"),
    }
    commands = {
        row: [str(ENVIRONMENTS / name / "bin" / "python"), *argv] for row, (name, *argv) in ROWS.items()
    }
    rows = Rows(commands, CLIENTS, environment)
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
    assert got["parts"] > 4 if "parts" in got else got["object"] == "chat.completion.chunk"
    assert got["text"] == cells["chat"]["text"]
    assert got["finishes"] == ["stop"]
    assert got.get("helper", got["text"]) == got["text"]


def test_chat_of_asyncio(cells: Cells) -> None:
    assert "Paris" in cells["chat_async"]
    assert cells["chat"]["text"].startswith(cells["chat_async"])


def test_tools(row: str, cells: Cells) -> None:
    got = cells["tools"]
    assert got["name"] == "get_weather"
    assert got["args"] in ({"city": "Paris"}, {"city": "Rome"})
    assert got["id"].startswith("call_")
    assert got["answer"]
    if row in LLM:  # it streams, and has called the function itself
        assert got["result"] == "Sunny, 21 degrees."
    else:
        assert got["finish"] == "tool_calls"
        assert got["streamed"] == got["args"]


def test_json(row: str, cells: Cells) -> None:
    got = cells["json"]
    assert got["object"] == {"capital": "Paris"}
    for person in (got["schema"], got.get("called", got["schema"])):
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 12
        assert 1 <= person["age"] <= 99
    assert got.get("typed", row in OLD | LLM)


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        ("key", 401, "The API key is malformed"),
        ("model", 404, "The model 'gpt-nothing' does not exist. Known models: "),
        ("parameter", 400, "`temperature` must be a number <= 2.0."),
        ("stream", 400, "`top_p` must be a number <= 1.0."),
    ],
)
def test_errors(row: str, cells: Cells, case: str, status: int, words: str) -> None:
    got = cells["errors"][case]
    if row in LLM:
        words = "`max_tokens` must be an integer >= 1." if status == 400 else words
        assert got["exit"] == 1
        assert f"Error code: {status} - {words}" in got["message"]
        return
    assert words in got["message"]
    assert got["status"] == status
    assert got["class"] == error_class(row, status)


def error_class(row: str, status: int) -> str:
    names = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
    if row in OLD:
        names |= {400: "InvalidRequestError", 404: "InvalidRequestError"}
    if row in LANGCHAIN:  # subclasses of openai's
        names = {
            400: "OpenAIInvalidRequestError",
            401: "OpenAIAuthenticationError",
            404: "OpenAIModelNotFoundError",
        }
    return names[status]


@pytest.mark.parametrize("row", OPENAI | OURS | LANGCHAIN | LLAMA_INDEX, indirect=True)
def test_errors_have_code_and_param(cells: Cells) -> None:
    errors = cells["errors"]
    assert errors["key"]["code"] == "invalid_api_key"
    assert errors["model"]["code"] == "model_not_found"
    assert errors["parameter"]["param"] == "temperature"
    assert errors["key"]["request_id"].startswith("req-")


def test_usage(cells: Cells) -> None:
    got = cells["usage"]
    assert got["whole"] == got["streamed"]
    prompt, answer, total = got["whole"]
    assert prompt > 0
    assert answer > 0
    assert prompt + answer == total
    assert got["cached"] > 0  # the same prompt was asked just before


@pytest.mark.parametrize("row", OLD | OPENAI | OURS, indirect=True)
def test_models(cells: Cells) -> None:
    assert cells["models"] == {"ids": [TINY], "one": TINY}


@pytest.mark.parametrize("row", OURS, indirect=True)
def test_our_tokens(cells: Cells) -> None:
    got = cells["token"]
    assert got["text"] == cells["chat"]["text"]
    assert got["jwt"] == 2
    assert got["forged"]["class"] == "AuthenticationError"
    assert "not signed by the key's secret_key" in got["forged"]["message"]


@pytest.mark.parametrize("row", OURS, indirect=True)
def test_our_plugins(cells: Cells) -> None:
    got = cells["plugin"]
    assert got["text"] == got["streamed"] == cells["chat"]["text"].upper()


@pytest.mark.parametrize("row", OURS, indirect=True)
def test_our_batches(cells: Cells) -> None:
    got = cells["batch"]
    assert len(got["texts"]) == 4
    assert got["kept"] == got["texts"]
    assert got["single"] == got["texts"][3]
