"""python llama_index_models.py openai-like|deepseek: every cell with `OpenAILike` or `DeepSeek`."""

import asyncio
import json
import sys
from typing import Annotated, Any, Literal

from cells import ASK_PERSON, KEY, MODEL, PARIS, SAY_JSON, SUNNY, URL, WEATHER, run, thrown, tokens
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.deepseek import DeepSeek
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

KIND = DeepSeek if sys.argv[1] == "deepseek" else OpenAILike
QUESTION = [ChatMessage(PARIS)]


def model(key: str = KEY, **options: Any) -> Any:
    capable = {"is_chat_model": True, "is_function_calling_model": True}
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24, "max_retries": 0, **capable, **options}
    return KIND(api_base=URL, api_key=key, **options)


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Today's weather"""
    return f"{city}: {SUNNY}"


WEATHER_TOOL = FunctionTool.from_defaults(get_weather)


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=1, le=99)]


def chat() -> Any:
    answer = model().chat(QUESTION)
    completed = model().complete(PARIS)
    (choice,) = answer.raw.choices
    return {
        "text": answer.message.content,
        "complete": completed.text,
        "finish": choice.finish_reason,
        "model": answer.raw.model,
    }


def chat_async() -> Any:
    return asyncio.run(model(max_tokens=8).achat(QUESTION)).message.content


def stream() -> Any:
    chunks = [*model().stream_chat(QUESTION)]
    finishes = [chunk.raw.choices[0].finish_reason for chunk in chunks]
    return {
        "parts": len(chunks),
        "text": "".join(chunk.delta for chunk in chunks),
        "finishes": [finish for finish in finishes if finish],
        "helper": chunks[-1].message.content,
    }


def tools() -> Any:
    patient = model(max_tokens=48)
    forced = {"tools": [WEATHER_TOOL], "tool_required": True}
    answer = patient.chat_with_tools(user_msg=WEATHER, **forced)
    (call,) = patient.get_tool_calls_from_response(answer)
    result = ChatMessage(
        role="tool",
        content=str(WEATHER_TOOL(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id},
    )
    history = [ChatMessage(WEATHER), answer.message, result]
    second = model(max_tokens=8).chat_with_tools([WEATHER_TOOL], chat_history=history, tool_choice="none")
    *_, last = patient.stream_chat_with_tools(user_msg=WEATHER, **forced)
    (streamed,) = patient.get_tool_calls_from_response(last)
    return {
        "name": call.tool_name,
        "args": call.tool_kwargs,
        "id": call.tool_id,
        "finish": answer.raw.choices[0].finish_reason,
        "answer": second.message.content,
        "streamed": streamed.tool_kwargs,
    }


def json_() -> Any:
    object_ = model(max_tokens=40, additional_kwargs={"response_format": {"type": "json_object"}})
    patient = model(max_tokens=60, should_use_structured_outputs=True)
    person = patient.as_structured_llm(Person).complete(ASK_PERSON).raw
    called = model(max_tokens=60).as_structured_llm(Person).complete(ASK_PERSON).raw
    return {
        "object": json.loads(object_.complete(SAY_JSON).text),
        "schema": person.model_dump(),
        "called": called.model_dump(),
        "typed": isinstance(person, Person),
    }


def errors() -> Any:
    return {
        "key": thrown(lambda: model("sk-wrong").chat(QUESTION)),
        "model": thrown(lambda: model(model="gpt-nothing").chat(QUESTION)),
        "parameter": thrown(lambda: model(additional_kwargs={"temperature": 3}).chat(QUESTION)),
        "stream": thrown(lambda: [*model(additional_kwargs={"top_p": 2}).stream_chat(QUESTION)]),
    }


def usage() -> Any:
    whole = model(max_tokens=4).chat(QUESTION)
    counted = {"stream_options": {"include_usage": True}}
    *_, last = model(max_tokens=4, additional_kwargs=counted).stream_chat(QUESTION)
    return {
        "whole": tokens(whole.additional_kwargs),
        "streamed": tokens(last.additional_kwargs),
        "cached": last.raw.usage.prompt_tokens_details.cached_tokens,
    }


json_.__name__ = "json"
run([chat, chat_async, stream, tools, json_, errors, usage])
