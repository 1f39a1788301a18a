"""Every cell with openai 0.28, which has functions on a module and answers that are dictionaries."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from cells import (
    ASK_PERSON,
    KEY,
    MODEL,
    PARIS,
    PERSON,
    SAY_JSON,
    SUNNY,
    TOOL,
    URL,
    WEATHER,
    run,
    thrown,
    tokens,
)

openai.api_base = URL
openai.api_key = KEY


def ask(content: str, **more: Any) -> Any:
    request = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    return openai.ChatCompletion.create(**{**request, **more})


def chat() -> Any:
    answer = ask(PARIS, max_tokens=24)
    (choice,) = answer["choices"]
    return {"text": choice["message"]["content"], "finish": choice["finish_reason"], "model": answer["model"]}


def chat_async() -> Any:
    async def text() -> str:
        messages = [{"role": "user", "content": PARIS}]
        request = {"model": MODEL, "temperature": 0, "max_tokens": 8, "messages": messages}
        chunks = await openai.ChatCompletion.acreate(**request, stream=True)
        return "".join([chunk.choices[0].delta.get("content", "") async for chunk in chunks])

    return asyncio.run(text())


def stream() -> Any:
    chunks = [*ask(PARIS, max_tokens=24, stream=True)]
    parts = [chunk.choices[0].delta.get("content", "") for chunk in chunks]
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    return {"parts": len(parts), "text": "".join(parts), "finishes": finishes}


def tools() -> Any:
    forced = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tools": [{"type": "function", "function": TOOL}], "max_tokens": 48}
    (choice,) = ask(WEATHER, tool_choice=forced, **options)["choices"]
    (call,) = choice.message.tool_calls
    question = {"role": "user", "content": WEATHER}
    messages = [question, choice.message, {"role": "tool", "tool_call_id": call.id, "content": SUNNY}]
    second = ask("", messages=messages, tool_choice="none", **options)
    deltas = [chunk.choices[0].delta for chunk in ask(WEATHER, tool_choice=forced, stream=True, **options)]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    return {
        "name": call.function.name,
        "args": json.loads(call.function.arguments),
        "id": call.id,
        "finish": choice.finish_reason,
        "answer": second.choices[0].message.content,
        "streamed": json.loads("".join(call["function"].get("arguments", "") for call in calls)),
    }


def json_() -> Any:
    object_ = ask(SAY_JSON, max_tokens=40, response_format={"type": "json_object"})
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    person = ask(ASK_PERSON, max_tokens=60, response_format=schema)
    return {
        "object": json.loads(object_.choices[0].message.content),
        "schema": json.loads(person.choices[0].message.content),
    }


def errors() -> Any:
    return {
        "key": thrown(lambda: ask(PARIS, api_key="sk-wrong")),
        "model": thrown(lambda: ask(PARIS, model="gpt-nothing")),
        "parameter": thrown(lambda: ask(PARIS, temperature=3)),
        "stream": thrown(lambda: ask(PARIS, top_p=2, stream=True)),
    }


def usage() -> Any:
    whole = ask(PARIS, max_tokens=4)["usage"]
    chunks = ask(PARIS, max_tokens=4, stream=True, stream_options={"include_usage": True})
    (streamed,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    cached = streamed["prompt_tokens_details"]["cached_tokens"]
    return {"whole": tokens(whole), "streamed": tokens(streamed), "cached": cached}


def models() -> Any:
    return {
        "ids": [model.id for model in openai.Model.list()["data"]],
        "one": openai.Model.retrieve(MODEL)["id"],
    }


json_.__name__ = "json"
run([chat, chat_async, stream, tools, json_, errors, usage, models])
