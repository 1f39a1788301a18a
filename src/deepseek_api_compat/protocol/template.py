"""A model's own chat template: what it is given, and what its prompt means. Rendering is done elsewhere.

    template = ModelTemplate(info.chat_template, ...)
    draft = template.draft(request, functions)
    for variables in draft.attempts():          # until the template accepts one
        rendered = ...                          # template_process
    prompt = draft.prompt(rendered)

Prompts are those of transformers' `apply_chat_template`, except that no text of a request becomes a
control token (see `spellings`), and that a template without tools gets them as text (see `tool_text`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import ChatRequest, Message, text_of
from deepseek_api_compat.protocol.prompt import normalise, plain
from deepseek_api_compat.protocol.segment import Prompt, Segment
from deepseek_api_compat.protocol.spellings import Spellings, free_mark, marked_value, spelled_in, texts_of
from deepseek_api_compat.protocol.tool_text import ChatMessage, native_tools, with_tool_text

THINK = "<think>"
THINK_END = "</think>"

# What a request may not set: these are its messages and tools, or ours to say.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    }
)


class ModelTemplate:
    """What one model's template is like; made once per model.

    source: Jinja source. A model without one gets its prompts from `plain_prompt`.
    controls: spellings of its control tokens; if unknown (empty), what the source shows of them counts.
    """

    def __init__(self, source: str, *, bos: str, eos: str, controls: Collection[str]) -> None:
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        known = set(controls) or spelled_in(self.source)
        self.spellings = Spellings(known | {bos, eos}, self.source)
        self.native_tools = native_tools(self.source)
        self.thinks = THINK in self.source or THINK_END in self.source

    def draft(self, request: ChatRequest, functions: Sequence[dict[str, Any]] | None = None) -> Draft:
        """The request, ready to be rendered. `functions` are the declared ones, as the client wrote them.

        Raises InvalidRequest for content that isn't text, a `prefix` that can't be continued, and for
        variables that aren't the client's to set.
        """
        try:
            return self._draft(request, functions)
        except RecursionError:
            raise InvalidRequest("The request has values that are nested too deeply.") from None

    def _draft(self, request: ChatRequest, functions: Sequence[dict[str, Any]] | None) -> Draft:
        messages, functions = self._content(request, functions)
        variables = self._variables(request)
        mark = self._mark(messages, functions, variables)
        if mark:
            if THINK_END in self.spellings and THINK_END in self.source:
                messages = [_without_think(message, self.source) for message in messages]
            messages = marked_value(self.spellings, messages, mark)
            functions = marked_value(self.spellings, functions, mark)
            variables = marked_value(self.spellings, variables, mark)
        if self.native_tools:
            tools = [{"type": "function", "function": function} for function in functions]
            variables["tools"] = tools or None
        else:
            variables["tools"] = None
            messages = with_tool_text(messages, functions, request)
        return Draft(self, messages, variables | self._tokens, mark, request.messages[-1])

    def _content(
        self, request: ChatRequest, functions: Sequence[dict[str, Any]] | None
    ) -> tuple[list[ChatMessage], list[dict[str, Any]]]:
        """What the template shall tell the model: messages (but one that is continued) and functions."""
        messages = normalise(request.messages)
        if request.messages[-1].prefix:
            messages.pop()
        if self.native_tools:
            # Templates write arguments with `tojson`, which would quote the string that OpenAI sends again.
            messages = [_with_parsed_arguments(message) for message in messages]
        if request.tool_choice == "none":
            return messages, []
        if functions is None:
            functions = [msgspec.to_builtins(tool.function) for tool in request.tools or ()]
        return messages, list(functions)

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        variables = dict(request.chat_template_kwargs or {})
        for name in variables:
            if name in RESERVED:
                param = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"`{param}` can't be set: it is for the service to say.", param=param)
        if request.thinks is not None:
            variables["thinking"] = variables["enable_thinking"] = request.thinks
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        return variables | {"add_generation_prompt": True}

    def _mark(self, *values: Any) -> str:
        """The mark that these need, or "" if they can't spell any control token, or a part of one."""
        if not any(self.spellings.threaten(text) for text in texts_of(values)):
            return ""
        return free_mark([self.source, *texts_of(values)])


class Draft(NamedTuple):
    """One request for one template.

    `mark` is in its texts where they spell control tokens; "" if nowhere. `last` is the request's last
    message; `messages` are all that the template sees: not `last` where the answer continues it.
    """

    template: ModelTemplate
    messages: list[ChatMessage]
    variables: dict[str, Any]
    mark: str
    last: Message

    def attempts(self) -> Iterator[bytes]:
        """The template's variables, as JSON: first as the request says it.

        Then, for a template that refuses that: system messages joined in front and neighbours of the same
        role joined; and the system text in front of the first user message.
        """
        yield self._variables_with(self.messages)
        joined = _joined(self.messages)
        if joined != self.messages:
            yield self._variables_with(joined)
        if joined and joined[0]["role"] == "system":
            yield self._variables_with(_without_system(joined))

    def _variables_with(self, messages: list[ChatMessage]) -> bytes:
        try:
            return msgspec.json.encode({"messages": messages, **self.variables})
        except RecursionError:
            raise InvalidRequest("The request has values that are nested too deeply.") from None

    def prompt(self, rendered: str) -> Prompt:
        """The prompt, from what the template made of one of the attempts."""
        segments = self.template.spellings.split(rendered, self.mark)
        ending = "".join(segment.text for segment in segments[-2:]).rstrip()
        if self.last.prefix:
            return self._continued(segments, ending)
        if ending.endswith(THINK):
            return Prompt(segments, "reasoning")
        may_think = self.template.thinks and not ending.endswith(THINK_END)
        return Prompt(segments, "either" if may_think else "content")

    def _continued(self, segments: list[Segment], ending: str) -> Prompt:
        """The prompt with the last message appended, for the answer to go on with."""
        content = text_of(self.last.content, "messages")
        reasoning = self.last.reasoning_content or ""
        opened = ending.endswith(THINK)  # by the template
        closed = not self.template.thinks or ending.endswith(THINK_END)
        if not opened and (closed or not reasoning):
            return Prompt([*segments, *_text(content)], "content_continuation")
        if not opened:
            segments = [*segments, self._tag(THINK), *_text("\n")]
        if not content:
            return Prompt([*segments, *_text(reasoning)], "reasoning_continuation")
        thought = reasoning.rstrip("\n") + "\n"
        return Prompt(
            [*segments, *_text(thought), self._tag(THINK_END), *_text(f"\n\n{content}")],
            "content_continuation",
        )

    def _tag(self, spelling: str) -> Segment:
        return Segment(spelling, spelling in self.template.spellings)


def plain_prompt(request: ChatRequest, functions: Sequence[dict[str, Any]] | None = None) -> Prompt:
    """The prompt for a model without a template: `User: ...` and so on. Raises as `ModelTemplate.draft`."""
    draft = ModelTemplate("", bos="", eos="", controls=()).draft(request, functions)
    text = plain(draft.messages)
    if not draft.last.prefix:
        return Prompt([Segment(text, False)])
    content = text_of(draft.last.content, "messages")
    return Prompt([Segment(f"{text} {content}", False)], "content_continuation")


def _text(text: str) -> list[Segment]:
    return [Segment(text, False)] if text else []


def _with_parsed_arguments(message: ChatMessage) -> ChatMessage:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_parsed(call) for call in message["tool_calls"]]}


def _with_parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"], type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _without_think(message: ChatMessage, source: str) -> ChatMessage:
    """An assistant's message whose text has its reasoning in it, taken apart as templates do that.

    They look for `</think>`, and would not find it with a mark in it.
    """
    content = message["content"]
    if message["role"] != "assistant" or THINK_END not in content:
        return message
    answer = content.split(THINK_END)[-1]
    if "reasoning_content" not in source:
        return {**message, "content": answer}
    reasoning = content.split(THINK_END)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return {"reasoning_content": reasoning, **message, "content": answer.lstrip("\n")}


def _joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """System messages as one in front; messages of the same role in a row as one, if they are only text."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    joined: list[ChatMessage] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    for message in messages:
        if message["role"] == "system":
            continue
        if joined and _is_same_turn(joined[-1], message):
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _is_same_turn(one: ChatMessage, next_: ChatMessage) -> bool:
    return one["role"] == next_["role"] and one.keys() == next_.keys() == {"role", "content"}


def _without_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The system message in front put at the start of the first user message; made if there is none there."""
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        content = f"{system['content']}\n\n{rest[0]['content']}"
        return [{**rest[0], "content": content}, *rest[1:]]
    return [{"role": "user", "content": system["content"]}, *rest]
