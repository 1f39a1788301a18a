"""Events become OpenAI responses: a stream of server-sent events, or one JSON object.

`ChatStream` and `CompletionStream` encode events as they come; `ChatCollector` and `CompletionCollector`
add them up. The same events give the same answer either way.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from deepseek_api_compat.errors import ApiError
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.protocol.job import TokenLogprob

Profile = Literal["openai", "deepseek"]
DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON can't say

_encode = msgspec.json.Encoder().encode


class _Stream:
    """What both kinds of stream share: the envelope of a chunk, and where usage goes.

    profile "openai": usage in a last chunk without choices, if `include_usage`.
    profile "deepseek": usage always, on the chunk that finishes the last choice; so that one waits for it.
    """

    kind: str

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        choices: int,
        include_usage: bool,
        profile: Profile,
        fingerprint: str | None,
    ) -> None:
        envelope = _envelope(id, self.kind, created, model, fingerprint)
        self._head = b"data: " + _encode(envelope)[:-1] + b',"choices":['
        self._waits_for_usage = profile == "deepseek"
        self._sends_usage = include_usage and profile == "openai"
        # OpenAI: with include_usage every other chunk has a null there.
        self._tail = b'],"usage":null}\n\n' if self._sends_usage else b"]}\n\n"
        self._unfinished = choices
        self._last = b""  # the finishing chunk that waits for usage

    def done(self) -> bytes:
        """The end of a complete stream."""
        return self._release(b"") + DONE

    def error(self, error: ApiError) -> bytes:
        """The end of a broken stream: no `[DONE]` follows."""
        return error_event(error)

    def _finish(self, choice: bytes) -> bytes:
        self._unfinished -= 1
        if self._waits_for_usage and self._unfinished == 0:
            self._last = choice
            return b""
        return self._head + choice + self._tail

    def _usage(self, usage: Usage) -> bytes:
        encoded = b',"usage":' + _encode(usage_object(usage))
        if self._waits_for_usage:
            return self._release(encoded)
        return self._head + b"]" + encoded + b"}\n\n" if self._sends_usage else b""

    def _release(self, usage: bytes) -> bytes:
        if not self._last:
            return b""
        choice, self._last = self._last, b""
        return self._head + choice + b"]" + usage + b"}\n\n"


class ChatStream(_Stream):
    """Events as `chat.completion.chunk` objects. The first of a choice carries the role."""

    kind = "chat.completion.chunk"

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        include_usage: bool = False,
        n: int = 1,
        profile: Profile = "openai",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            id,
            created,
            model,
            choices=n,
            include_usage=include_usage,
            profile=profile,
            fingerprint=fingerprint,
        )
        self._heads: dict[int, bytes] = {}  # by choice, from `data:` to the delta; a choice in here has begun
        self._plain_tail = b',"logprobs":null,"finish_reason":null}' + self._tail

    def feed(self, events: Iterable[Event]) -> bytes:
        """Server-sent events for all of `events`, for one write."""
        out: list[bytes] = []
        for event in events:
            if isinstance(event, Usage):
                out.append(self._usage(event))
                continue
            head = self._heads.get(event.index) or self._begin(event.index, out)
            if isinstance(event, Text):
                if event.logprobs is None:
                    out += (head, b'{"content":', _encode(event.text), b"}", self._plain_tail)
                else:
                    logprobs = _encode(chat_logprobs(event.logprobs))
                    delta = b'{"content":%b},"logprobs":%b' % (_encode(event.text), logprobs)
                    out += (head, delta, b',"finish_reason":null}', self._tail)
            elif isinstance(event, Reasoning):
                out += (head, b'{"reasoning_content":', _encode(event.text), b"}", self._plain_tail)
            elif isinstance(event, ToolCall):
                out += (head, _encode({"tool_calls": [_call_delta(event)]}), self._plain_tail)
            else:
                # OpenAI's delta is empty here; with an empty content `print(delta.content)` prints no "None".
                choice = b'%b{"content":""},"logprobs":null,"finish_reason":%b}' % (
                    head[len(self._head) :],
                    _encode(event.reason),
                )
                out.append(self._finish(choice))
        return b"".join(out)

    def _begin(self, index: int, out: list[bytes]) -> bytes:
        # Those before it first: OpenAI's library adds up the choices in a list, in the order they begin.
        for each in range(len(self._heads), index + 1):
            head = self._heads[each] = b'%b{"index":%d,"delta":' % (self._head, each)
            out += (head, b'{"role":"assistant","content":""}', self._plain_tail)
        return head


class CompletionStream(_Stream):
    """Events as legacy `text_completion` objects; choice index = prompt number * n + choice.

    echo: the prompts' texts, each sent before the answers to it. Logprobs are those of the answer alone.
    """

    kind = "text_completion"

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        include_usage: bool = False,
        prompts: int = 1,
        n: int = 1,
        echo: Sequence[str] | None = None,
        profile: Profile = "openai",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            id,
            created,
            model,
            choices=prompts * n,
            include_usage=include_usage,
            profile=profile,
            fingerprint=fingerprint,
        )
        self._n = n
        self._echo = echo
        self._offsets: dict[int, int] = {}  # characters sent, by choice; a choice in here has begun

    def feed(self, events: Iterable[Event]) -> bytes:
        """Server-sent events for all of `events`, for one write."""
        out: list[bytes] = []
        for event in events:
            if isinstance(event, Usage):
                out.append(self._usage(event))
            elif isinstance(event, Text):
                offset = self._begin(event.index, out)
                self._offsets[event.index] = offset + len(event.text)
                logprobs = b"null"
                if event.logprobs is not None:
                    logprobs = _encode(legacy_logprobs(event.logprobs, offset))
                out.append(
                    self._head + _legacy_choice(event.index, event.text, logprobs, b"null") + self._tail
                )
            elif isinstance(event, Finish):
                self._begin(event.index, out)
                out.append(self._finish(_legacy_choice(event.index, "", b"null", _encode(event.reason))))
        return b"".join(out)

    def _begin(self, index: int, out: list[bytes]) -> int:
        """How many characters of the choice have been sent; the echo counts."""
        if index not in self._offsets:
            prompt = self._echo[index // self._n] if self._echo is not None else ""
            self._offsets[index] = len(prompt)
            if prompt:
                out.append(self._head + _legacy_choice(index, prompt, b"null", b"null") + self._tail)
        return self._offsets[index]


class ChatCollector:
    """Events added up to one `chat.completion` object."""

    def __init__(
        self, id: str, created: int, model: str, *, n: int = 1, fingerprint: str | None = None
    ) -> None:
        self._envelope = _envelope(id, "chat.completion", created, model, fingerprint)
        self._choices = [_ChatChoice() for _ in range(n)]
        self._usage: Usage | None = None

    def feed(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Usage):
                self._usage = event
            else:
                self._choices[event.index].feed(event)

    def response(self) -> bytes:
        """The object as JSON. Without a Usage event it has no `usage`."""
        choices = [choice.object(index) for index, choice in enumerate(self._choices)]
        return _encode(_complete(self._envelope, choices, self._usage))


class _ChatChoice:
    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[TokenLogprob] | None = None
        self._finish: str | None = None

    def feed(self, event: Text | Reasoning | ToolCall | Finish) -> None:
        if isinstance(event, Text):
            self._text.append(event.text)
            if event.logprobs is not None:
                self._logprobs = self._logprobs or []
                self._logprobs += event.logprobs
        elif isinstance(event, Reasoning):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCall):
            self._add_call(event)
        else:
            self._finish = event.reason

    def _add_call(self, event: ToolCall) -> None:
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self._calls.setdefault(event.call_index, empty)
        call["id"] += event.id or ""
        call["function"]["name"] += event.name or ""
        call["function"]["arguments"] += event.arguments

    def object(self, index: int) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not text else text}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [self._calls[number] for number in sorted(self._calls)]
        return {
            "index": index,
            "message": message,
            "logprobs": None if self._logprobs is None else chat_logprobs(self._logprobs),
            "finish_reason": self._finish,
        }


class CompletionCollector:
    """Events added up to one legacy `text_completion` object; see CompletionStream."""

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        prompts: int = 1,
        n: int = 1,
        echo: Sequence[str] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._envelope = _envelope(id, "text_completion", created, model, fingerprint)
        self._choices = [
            _CompletionChoice(echo[number // n] if echo is not None else "") for number in range(prompts * n)
        ]
        self._usage: Usage | None = None

    def feed(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Usage):
                self._usage = event
            else:
                self._choices[event.index].feed(event)

    def response(self) -> bytes:
        """The object as JSON. Without a Usage event it has no `usage`."""
        choices = [choice.object(index) for index, choice in enumerate(self._choices)]
        return _encode(_complete(self._envelope, choices, self._usage))


class _CompletionChoice:
    def __init__(self, echo: str) -> None:
        self._text = [echo]
        self._length = len(echo)
        self._logprobs: dict[str, list[Any]] | None = None
        self._finish: str | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Text):
            if event.logprobs is not None:
                self._add_logprobs(legacy_logprobs(event.logprobs, self._length))
            self._text.append(event.text)
            self._length += len(event.text)
        elif isinstance(event, Finish):
            self._finish = event.reason

    def _add_logprobs(self, more: dict[str, list[Any]]) -> None:
        if self._logprobs is None:
            self._logprobs = more
        else:
            for name, values in more.items():
                self._logprobs[name] += values

    def object(self, index: int) -> dict[str, Any]:
        return {
            "text": "".join(self._text),
            "index": index,
            "logprobs": self._logprobs,
            "finish_reason": self._finish,
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts under OpenAI's names and under DeepSeek's."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in logprobs
        ]
    }


def legacy_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, list[Any]]:
    """The parallel lists of `/completions`; `offset` is where the first token begins, in characters."""
    offsets = []
    for token in logprobs:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in logprobs],
        "token_logprobs": [_finite(token.logprob) for token in logprobs],
        "top_logprobs": [
            {other.token: _finite(other.logprob) for other in (*token.top, token)} for token in logprobs
        ],
        "text_offset": offsets,
    }


def error_event(error: ApiError) -> bytes:
    """A server-sent event with OpenAI's error object."""
    return b"data: " + _encode(error.body()) + b"\n\n"


def model_object(id: str, created: int, owned_by: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": created, "owned_by": owned_by, **more}


def model_list(models: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(models)}


def embedding_response(
    model: str, vectors: Iterable[Sequence[float]], prompt_tokens: int, *, encoding: str | None = None
) -> dict[str, Any]:
    """The answer of `/embeddings`; encoding "base64" packs each vector as little-endian float32."""
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _packed(vector) if encoding == "base64" else vector,
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats).decode("ascii")


def _envelope(id: str, kind: str, created: int, model: str, fingerprint: str | None) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": created, "model": model, "system_fingerprint": fingerprint}


def _complete(envelope: dict[str, Any], choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
    whole = {**envelope, "choices": choices}
    if usage is not None:
        whole["usage"] = usage_object(usage)
    return whole


def _call_delta(event: ToolCall) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": event.arguments}
    delta: dict[str, Any] = {"index": event.call_index, "function": function}
    if event.id is not None:
        delta |= {"id": event.id, "type": "function"}
    if event.name is not None:
        function["name"] = event.name
    return delta


def _legacy_choice(index: int, text: str, logprobs: bytes, finish: bytes) -> bytes:
    return b'{"text":%b,"index":%d,"logprobs":%b,"finish_reason":%b}' % (
        _encode(text),
        index,
        logprobs,
        finish,
    )


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": token.bytes_}


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)
