"""python langchain_models.py openai|deepseek: every cell with `ChatOpenAI` or `ChatDeepSeek`."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any, Literal

from cells import ASK_PERSON, KEY, MODEL, PARIS, SAY_JSON, SUNNY, URL, WEATHER, run, thrown
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

DEEPSEEK = sys.argv[1] == "deepseek"


def model(key: str = KEY, **options: Any) -> Any:
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24, "max_retries": 0, **options}
    kind, address = (ChatDeepSeek, "api_base") if DEEPSEEK else (ChatOpenAI, "base_url")
    return kind(**{address: URL}, api_key=key, **options)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Today's weather"""
    return f"{city}: {SUNNY}"


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=1, le=99)]


class Capital(BaseModel):
    """A capital."""

    capital: str


def whole(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


def chat() -> Any:
    answer = model().invoke(PARIS)
    about = answer.response_metadata
    return {"text": answer.content, "finish": about["finish_reason"], "model": about["model_name"]}


def chat_async() -> Any:
    return asyncio.run(model(max_tokens=8).ainvoke(PARIS)).content


def stream() -> Any:
    chunks = [*model().stream(PARIS)]
    finishes = [chunk.response_metadata.get("finish_reason") for chunk in chunks]
    return {
        "parts": len(chunks),
        "text": "".join(chunk.content for chunk in chunks),
        "finishes": [finish for finish in finishes if finish],
    }


def tools() -> Any:
    forced = model(max_tokens=48).bind_tools([get_weather], tool_choice="get_weather")
    answer = forced.invoke(WEATHER)
    (call,) = answer.tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    second = model(max_tokens=8).bind_tools([get_weather], tool_choice="none")
    streamed = whole(forced.stream(WEATHER))
    return {
        "name": call["name"],
        "args": call["args"],
        "id": call["id"],
        "finish": answer.response_metadata["finish_reason"],
        "answer": second.invoke([HumanMessage(WEATHER), answer, result]).content,
        "streamed": streamed.tool_calls[0]["args"],
    }


def json_() -> Any:
    patient = model(max_tokens=60)
    object_ = patient.with_structured_output(Capital, method="json_mode").invoke(SAY_JSON)
    person = patient.with_structured_output(Person).invoke(ASK_PERSON)
    called = patient.with_structured_output(Person, method="function_calling").invoke(ASK_PERSON)
    return {
        "object": object_.model_dump(),
        "schema": person.model_dump(),
        "called": called.model_dump(),
        "typed": isinstance(person, Person),
    }


def errors() -> Any:
    return {
        "key": thrown(lambda: model("sk-wrong").invoke(PARIS)),
        "model": thrown(lambda: model(model="gpt-nothing").invoke(PARIS)),
        "parameter": thrown(lambda: model(temperature=3).invoke(PARIS)),
        "stream": thrown(lambda: [*model(top_p=2).stream(PARIS)]),
    }


def usage() -> Any:
    short = model(max_tokens=4, stream_usage=True)
    answers = {"whole": short.invoke(PARIS), "streamed": whole(short.stream(PARIS))}
    used = {name: answer.usage_metadata for name, answer in answers.items()}
    counts = {
        name: [of[kind] for kind in ("input_tokens", "output_tokens", "total_tokens")]
        for name, of in used.items()
    }
    return {**counts, "cached": used["streamed"]["input_token_details"]["cache_read"]}


json_.__name__ = "json"
run([chat, chat_async, stream, tools, json_, errors, usage])
