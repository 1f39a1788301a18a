"""Every cell with the command line of `llm`, whose models are in the folder LLM_USER_PATH.

Its commands run in this process, for it takes longer to start than to answer; test_documents.py starts it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from cells import ASK_PERSON, KEY, MODEL, PARIS, PERSON, SAY_JSON, SUNNY, URL, run
from click.testing import CliRunner, Result

MODELS = f"""
- model_id: {MODEL}
  model_name: {MODEL}
  api_base: {URL}
  api_key_name: deepseek
  supports_schema: true
  supports_tools: true
- model_id: nothing
  model_name: gpt-nothing
  api_base: {URL}
  api_key_name: deepseek
"""
FUNCTION = f'''
def get_weather(city: str) -> str:
    "Today's weather"
    return "{SUNNY}"
'''
# llm can't force a call, so the model is told what to write.
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ASK_CALL = f"Call get_weather with city Paris. Answer only: {CALL}"


def command(*argv: str) -> Result:
    from llm.cli import cli  # it reads its models now

    return CliRunner().invoke(cli, argv)


def llm(*argv: str, model: str = MODEL, key: str = KEY) -> Result:
    return command("prompt", "-m", model, "--key", key, "-o", "temperature", "0", *argv)


def said(*argv: str) -> str:
    done = llm(*argv)
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()


def logged(count: int) -> list[dict[str, Any]]:
    """What the log has of the last answers, the newest last."""
    told = command("logs", "-n", str(count), "--json").stdout
    return sorted(json.loads(told), key=lambda entry: entry["id"])


def chat() -> Any:
    text = said("-o", "max_tokens", "24", "--no-stream", PARIS)
    (entry,) = logged(1)
    answer = entry["response_json"]
    return {"text": text, "finish": answer["choices"][0]["finish_reason"], "model": answer["model"]}


def chat_async() -> Any:
    return said("-o", "max_tokens", "8", "--async", PARIS)


def stream() -> Any:
    text = said("-o", "max_tokens", "24", PARIS)
    (entry,) = logged(1)
    answer = entry["response_json"]
    return {"object": answer["object"], "text": text, "finishes": [answer["finish_reason"]]}


def tools() -> Any:
    text = said("-o", "max_tokens", "48", "--functions", FUNCTION, ASK_CALL)
    first, second = logged(2)
    (call,) = first["tool_calls"]
    (result,) = second["tool_results"]
    return {
        "name": call["name"],
        "args": call["arguments"],
        "id": call["tool_call_id"],
        "finish": first["response_json"]["finish_reason"],
        "result": result["output"],
        "answer": text,
    }


def json_() -> Any:
    return {
        "object": json.loads(said("-o", "max_tokens", "40", "-o", "json_object", "1", SAY_JSON)),
        "schema": json.loads(said("-o", "max_tokens", "60", "--schema", json.dumps(PERSON), ASK_PERSON)),
    }


def errors() -> Any:
    # It checks ranges by itself, but for this one.
    cases = {
        "key": llm(PARIS, key="sk-wrong"),
        "model": llm(PARIS, model="nothing"),
        "parameter": llm("--no-stream", "-o", "max_tokens", "-1", PARIS),
        "stream": llm("-o", "max_tokens", "-1", PARIS),
    }
    return {name: {"exit": done.exit_code, "message": done.stderr} for name, done in cases.items()}


def usage() -> Any:
    """From what `--usage` prints."""
    got: dict[str, Any] = {}
    for name, more in {"whole": ["--no-stream"], "streamed": []}.items():
        told = llm("--usage", "-o", "max_tokens", "4", *more, PARIS).stderr
        found = re.search(r"Token usage: (\d+) input, (\d+) output, (\{.*\})", told)
        assert found, told
        prompt, answer = int(found[1]), int(found[2])
        got[name] = [prompt, answer, prompt + answer]
        got["cached"] = json.loads(found[3])["prompt_tokens_details"]["cached_tokens"]
    return got


json_.__name__ = "json"
with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    Path(folder, "extra-openai-models.yaml").write_text(MODELS)
    run([chat, chat_async, stream, tools, json_, errors, usage])
