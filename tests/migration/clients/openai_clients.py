"""python openai_clients.py openai|ours: every cell with the clients of openai 1, 2 or 3, or with ours."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import openai
from cells import ASK_PERSON, KEY, MODEL, PARIS, SAY_JSON, SUNNY, TOOL, URL, WEATHER, run, thrown, tokens
from pydantic import BaseModel, ConfigDict, Field

OURS = sys.argv[1] == "ours"
if OURS:
    import deepseek_api_compat as package
else:
    package = openai

client = package.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
completions = client.chat.completions
TOOLS = [{"type": "function", "function": TOOL}]
FORCED = {"type": "function", "function": {"name": "get_weather"}}


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=1, le=99)]


def asked(content: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": content}], **more}


def piece(delta: Any) -> str:
    return delta.get("content", "") if OURS else delta.content or ""


def chat() -> Any:
    answer = completions.create(**asked(PARIS, max_tokens=24))
    (choice,) = answer.choices
    return {"text": choice.message.content, "finish": choice.finish_reason, "model": answer.model}


def chat_async() -> Any:
    async def ask() -> str:
        async with package.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
            stream = await client.chat.completions.create(**asked(PARIS, max_tokens=8, stream=True))
            return "".join([piece(chunk.choices[0].delta) async for chunk in stream])

    return asyncio.run(ask())


def stream() -> Any:
    parts, finishes = [], []
    for chunk in completions.create(**asked(PARIS, max_tokens=24, stream=True)):
        parts.append(piece(chunk.choices[0].delta))
        if chunk.choices[0].finish_reason:
            finishes.append(chunk.choices[0].finish_reason)
    got = {"parts": len(parts), "text": "".join(parts), "finishes": finishes}
    with helper()(**asked(PARIS, max_tokens=24)) as events:
        return {**got, "helper": events.get_final_completion().choices[0].message.content}


def helper() -> Any:
    """The helper for streams, which openai before 1.92 has in beta only."""
    return getattr(completions, "stream", None) or client.beta.chat.completions.stream


def tools() -> Any:
    forced = asked(WEATHER, tools=TOOLS, tool_choice=FORCED, max_tokens=48)
    (choice,) = completions.create(**forced).choices
    (call,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": SUNNY}
    messages = [*forced["messages"], choice.message, result]
    second = completions.create(
        **{**forced, "messages": messages, "tool_choice": "none", "max_tokens": 8},
    )
    with helper()(**forced) as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls
    return {
        "name": call.function.name,
        "args": json.loads(call.function.arguments),
        "id": call.id,
        "finish": choice.finish_reason,
        "answer": second.choices[0].message.content,
        "streamed": json.loads(streamed[0].function.arguments),
    }


def json_() -> Any:
    object_ = completions.create(**asked(SAY_JSON, max_tokens=40, response_format={"type": "json_object"}))
    parse = getattr(completions, "parse", None) or client.beta.chat.completions.parse
    person = parse(**asked(ASK_PERSON, max_tokens=60, response_format=Person)).choices[0].message.parsed
    return {
        "object": json.loads(object_.choices[0].message.content),
        "schema": person.model_dump(),
        "typed": isinstance(person, Person),
    }


def errors() -> Any:
    stranger = package.OpenAI(base_url=URL, api_key="sk-wrong", max_retries=0).chat.completions
    return {
        "key": thrown(lambda: stranger.create(**asked(PARIS))),
        "model": thrown(lambda: completions.create(**{**asked(PARIS), "model": "gpt-nothing"})),
        "parameter": thrown(lambda: completions.create(**{**asked(PARIS), "temperature": 3})),
        "stream": thrown(lambda: completions.create(**asked(PARIS, top_p=2, stream=True))),
    }


def usage() -> Any:
    request = asked(PARIS, max_tokens=4)
    whole = completions.create(**request).usage.model_dump()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    (streamed,) = [chunk.usage for chunk in completions.create(**request, **options) if chunk.usage]
    return {
        "whole": tokens(whole),
        "streamed": tokens(streamed.model_dump()),
        "cached": streamed.prompt_tokens_details.cached_tokens,
    }


def models() -> Any:
    return {"ids": [model.id for model in client.models.list()], "one": client.models.retrieve(MODEL).id}


def token() -> Any:
    """A client whose keys are temporary tokens, by a manager with the key's secret."""
    auth = package.AuthManager(os.environ["TOKEN_KEY"], os.environ["TOKEN_SECRET"], expires_in=60)
    with package.OpenAI(auth=auth, base_url=URL, max_retries=0) as client:
        answer = client.chat.completions.create(**asked(PARIS, max_tokens=24))
        forged = package.AuthManager(os.environ["TOKEN_KEY"], "0" * 64)
        stranger = package.OpenAI(auth=forged, base_url=URL, max_retries=0).chat.completions
        return {
            "text": answer.choices[0].message.content,
            "jwt": client.api_key.count("."),
            "forged": thrown(lambda: stranger.create(**asked(PARIS))),
        }


class Loud:
    def pre_process(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": PARIS} for _ in messages]

    def post_process(self, answer: Any) -> Any:
        for choice in answer.choices:
            said = choice.message if hasattr(choice, "message") else choice.delta
            said.content = (said.content or "").upper()
        return answer


def plugin() -> Any:
    with package.OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
        client.register_plugin(Loud())
        answer = client.chat.completions.create(**asked("Hello", max_tokens=24))
        chunks = client.chat.completions.create(**asked("Hello", max_tokens=24, stream=True))
        streamed = "".join(chunk.choices[0].delta.get("content", "") for chunk in chunks)
        return {"text": answer.choices[0].message.content, "streamed": streamed}


def batch() -> Any:
    requests = [asked(f"Say {number}.", max_tokens=4) for number in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "answers.jsonl")
        first = completions.create_batch(requests, batch_size=2, checkpoint=checkpoint)
        again = completions.create_batch(requests, checkpoint=checkpoint)
        single = completions.create(**requests[3])
    texts, kept = ([answer.choices[0].message.content for answer in answers] for answers in (first, again))
    return {"texts": texts, "kept": kept, "single": single.choices[0].message.content}


json_.__name__ = "json"
extras = [token, plugin, batch] if OURS else []
run([chat, chat_async, stream, tools, json_, errors, usage, models, *extras])
