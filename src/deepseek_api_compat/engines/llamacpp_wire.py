"""llama.cpp's wire format: what is sent for a job, and what comes back. No I/O.

Source: llama.cpp `tools/server/README.md`, POST /completion. Its defaults are not OpenAI's, so every
parameter that shapes the answer is sent. What differs from OpenAI all the same:

Penalties see the whole text, prompt included (OpenAI's wording is "the text so far"; vLLM counts only
the answer). presence_penalty is left so. frequency_penalty grows with each occurrence, and a long prompt
would forbid its own common words: the prompt's share is given back through logit_bias.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.engines.sse import unfinished
from deepseek_api_compat.errors import (
    ApiError,
    ContextTooLong,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.protocol.job import Job, Piece, TokenLogprob

T = TypeVar("T")

_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp takes this seed for "choose one"
# The last event would otherwise repeat the whole prompt.
_FINAL_FIELDS = ["content", "tokens", "stop", "stop_type", "tokens_predicted", "tokens_evaluated"]
_FINAL_FIELDS += ["timings/cache_n"]


def completion_body(job: Job) -> dict[str, Any]:
    """The request for a job, short of its grammar: everything explicit, and neutral where OpenAI has no such
    parameter.
    """
    sampling = job.sampling
    penalties = bool(sampling.presence_penalty or sampling.frequency_penalty)
    body: dict[str, Any] = {
        "prompt": job.prompt_ids,
        "n_predict": job.max_tokens,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": not job.cache_salt,  # the server knows no salt: no cache, then
        # An event after each step through the prompt: only a failed write tells it that the client has left.
        "return_progress": True,
        "response_fields": _FINAL_FIELDS,
        # OpenAI's order: the temperature is in the distribution that top_p cuts.
        "samplers": ["penalties", "temperature", "top_p"],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": len(job.prompt_ids) + job.max_tokens if penalties else 0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": -1 if sampling.seed is None else sampling.seed % _RANDOM_SEED,
        "stop": job.stop,
    }
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty:
        # The server counts the prompt too. What of it is the answer's counts rightly.
        for token, times in Counter(job.prompt_ids[: len(job.prompt_ids) - job.sent]).items():
            bias[token] = bias.get(token, 0.0) + times * sampling.frequency_penalty
    body["logit_bias"] = list(bias.items())
    if job.markers:
        body["preserved_tokens"] = job.markers
    if job.top_logprobs is not None:
        body["n_probs"] = max(1, job.top_logprobs)  # 0 means no logprobs at all
    return body


# What the server sends. Unknown fields are skipped while decoding.


class Error(msgspec.Struct):
    message: str = "no reason given"
    code: int = 500
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class ErrorBody(msgspec.Struct):
    error: Error


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] = []


class Probability(Alternative):
    top_logprobs: list[Alternative] = []


class Event(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[Probability] | None = None
    stop_type: str = ""
    cached: int = msgspec.field(default=0, name="timings/cache_n")
    error: Error | None = None


class GenerationSettings(msgspec.Struct):
    n_ctx: int


class Props(msgspec.Struct):
    default_generation_settings: GenerationSettings
    total_slots: int
    chat_template: str = ""
    bos_token: str = ""
    eos_token: str = ""


class Tokens(msgspec.Struct):
    tokens: list[int]


class Content(msgspec.Struct):
    content: str


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class Embeddings(msgspec.Struct):
    data: list[Embedding]


_EVENT = msgspec.json.Decoder(Event)


def decode(data: bytes, answer: type[T]) -> T:
    """`data` as JSON of that type. Raises EngineFailed."""
    try:
        return msgspec.json.decode(data, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _nonsense(error) from None


class EventReader:
    """llama.cpp's server-sent events out of bytes cut anywhere. Raises EngineFailed or InvalidRequest."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        blocks = (self._rest + data).split(b"\n\n")
        self._rest = unfinished(blocks.pop())
        events = []
        for block in blocks:
            if block.startswith(b"data: "):
                try:
                    event = _EVENT.decode(block[6:])
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise _nonsense(error) from None
                if event.error is not None:
                    raise _error(event.error)
                events.append(event)
        return events


class Held:
    """Tokens whose text the server holds back, because it may be the beginning of a stop string.

    It sends their ids at once and their text with a later event. An answer goes on at another engine behind
    the ids that were passed on: so they wait for their text, or it would be missing there.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._probabilities: list[Probability] = []

    def keeps(self, event: Event) -> bool:
        """Whether its text is yet to come; else what was kept is given to it."""
        self._tokens += event.tokens
        self._probabilities += event.completion_probabilities or ()
        if not event.content and not event.stop:
            return True
        event.tokens, self._tokens = self._tokens, []
        if event.stop_type != "word":  # else they are those of the stop string
            event.completion_probabilities = self._probabilities
        self._probabilities = []
        return False


def piece(event: Event, top: int | None) -> Piece:
    if not event.stop and top is None:
        return Piece(event.tokens, event.content)
    logprobs = None
    if top is not None:
        logprobs = [
            TokenLogprob(p.token, p.logprob, p.bytes, [_alternative(a) for a in p.top_logprobs[:top]])
            for p in event.completion_probabilities or []
        ]
    if not event.stop:
        return Piece(event.tokens, event.content, logprobs)
    return Piece(
        ids=event.tokens,
        text=event.content,
        logprobs=logprobs,
        finish="length" if event.stop_type == "limit" else "stop",
        prompt_tokens=event.tokens_evaluated,
        cached_tokens=event.cached,
        completion_tokens=event.tokens_predicted,
    )


def _alternative(found: Alternative) -> TokenLogprob:
    return TokenLogprob(found.token, found.logprob, found.bytes)


def refusal(status: int, body: bytes) -> ApiError:
    """The error for an answer that is not 200."""
    try:
        error = msgspec.json.decode(body, type=ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = Error(body[:200].decode(errors="replace"))
    error.code = status
    return _error(error)


def _error(error: Error) -> ApiError:
    if error.type == "exceed_context_size_error":
        return ContextTooLong(error.n_prompt_tokens, error.n_ctx)
    if error.code == 503:
        return EngineUnavailable(f"The engine can't answer yet: {error.message}", retry_after=1.0)
    if error.code in (400, 501):  # 501: not with this model, or not as it was started
        return InvalidRequest(f"The engine refuses the request: {error.message}")
    return EngineFailed(f"The engine failed: {error.message}")


def _nonsense(error: Exception) -> EngineFailed:
    return EngineFailed(f"The engine's answer can't be understood: {error}.")
