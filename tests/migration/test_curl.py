"""curl against the service: the commands of the documents as they are written, and the matrix's cells.

curl has no JSON of its own; its cells look at what it prints, and with `--fail-with-body` at how it ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fakes.configs import TINY
from fakes.service import Service

ROOT = Path(__file__).resolve().parent.parent.parent
WRITTEN = "http://127.0.0.1:8000"
CALL = """\
curl -sS -X Post {written}/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer ${{KEY:-$DEEPSEEK_API_KEY}}" {options} \\
  -d @-"""
HTTP_ERROR = 22  # curl's exit code with --fail


def documented() -> dict[str, str]:
    """Every curl command of the documents that asks a service on this machine's port 8000."""
    found = {}
    for page in sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for number, command in enumerate(re.findall(r"^curl (?:.*\\\n)*.*$", block, re.M)):
                if f"{WRITTEN}/v1/chat/completions" in command:
                    found[f"{page.name} {len(found)}.{number}"] = command
    return found


def bash(service: Service, command: str, text: str = "", key: str | None = None) -> tuple[int, str]:
    """Exit code and output of a command in which the address is written as in the documents."""
    environment = {**os.environ, "DEEPSEEK_API_KEY": str(service.key), **({"KEY": key} if key else {})}
    done = subprocess.run(
        ["bash", "-c", command.replace(WRITTEN, service.url)],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def post(service: Service, options: str = "", key: str | None = None, **body: Any) -> tuple[int, str]:
    body = {"model": "deepseek-v3", "temperature": 0, "max_tokens": 24, **body}
    body.setdefault("messages", [{"role": "user", "content": "What is the capital of France?"}])
    return bash(service, CALL.format(written=WRITTEN, options=options), json.dumps(body), key)


def answer(service: Service, **body: Any) -> dict[str, Any]:
    code, printed = post(service, **body)
    assert code == 0
    return dict(json.loads(printed))


@pytest.mark.parametrize("place", documented())
def test_commands_of_the_documents(service: Service, place: str) -> None:
    code, printed = bash(service, documented()[place])
    assert code == 0, printed
    assert "Paris" in printed


def test_there_are_commands_in_the_documents() -> None:
    assert {place.split()[0] for place in documented()} >= {"README.md", "README.zh-CN.md", "api.md"}


def test_chat(service: Service) -> None:
    got = answer(service)
    assert "Paris" in got["choices"][0]["message"]["content"]
    assert got["model"] == TINY


def test_stream(service: Service) -> None:
    code, printed = post(service, "-N", stream=True)
    *events, done = [line.removeprefix("data: ") for line in printed.splitlines() if line]
    assert (code, done) == (0, "[DONE]")
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "Paris" in "".join(deltas)
    assert len(deltas) > 4


def test_tools(service: Service) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    got = answer(service, messages=question, tools=tools, tool_choice="required", max_tokens=48)
    (choice,) = got["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny, 21 degrees."}
    messages = [*question, choice["message"], result]
    second = answer(service, messages=messages, tools=tools, tool_choice="none")
    assert second["choices"][0]["message"]["content"]


def test_json(service: Service) -> None:
    say = [{"role": "user", "content": 'Say this again: {"capital": "Paris"}'}]
    got = answer(service, messages=say, response_format={"type": "json_object"})
    assert json.loads(got["choices"][0]["message"]["content"]) == {"capital": "Paris"}
    age = {"type": "object", "properties": {"age": {"enum": [7, 8]}}, "required": ["age"]}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": age}}
    got = answer(service, response_format=schema)
    assert json.loads(got["choices"][0]["message"]["content"]) in ({"age": 7}, {"age": 8})


@pytest.mark.parametrize(
    ("more", "status", "error"),
    [
        ({"key": "sk-wrong"}, 401, "invalid_api_key"),
        ({"model": "gpt-nothing"}, 404, "model_not_found"),
        ({"temperature": 3}, 400, "`temperature` must be a number <= 2.0."),
    ],
)
def test_errors(service: Service, more: dict[str, Any], status: int, error: str) -> None:
    code, printed = post(service, "--fail-with-body -w '\\n%{http_code}'", **more)
    body, told = printed.rsplit("\n", 1)
    assert (code, told) == (HTTP_ERROR, str(status))
    got = json.loads(body)["error"]
    assert error in (got["code"], got["message"])


def test_usage(service: Service) -> None:
    usage = answer(service)["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    _, printed = post(service, stream=True, stream_options={"include_usage": True})
    last = [json.loads(line.removeprefix("data: ")) for line in printed.splitlines() if "{" in line][-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert last["usage"]["prompt_tokens"] == usage["prompt_tokens"]
