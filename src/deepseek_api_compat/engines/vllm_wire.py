"""vLLM's wire format: what is sent for a job, and what comes back. No I/O.

Source: vLLM 0.32, `vllm/entrypoints/openai/completion/protocol.py`, POST /v1/completions. A model's
generation_config.json changes vLLM's defaults, so every parameter that shapes the answer is sent.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.engines.upstream import Lost
from deepseek_api_compat.errors import ApiError, EngineFailed, EngineUnavailable, InvalidRequest
from deepseek_api_compat.protocol.job import Job, Sampling, TokenLogprob

T = TypeVar("T")


def completion_body(job: Job, grammar: str | None = None) -> dict[str, Any]:
    """The request for a job; `grammar` is `job.grammar` in llguidance's words."""
    sampling = job.sampling
    body: dict[str, Any] = {
        "prompt": job.prompt_ids,
        "max_tokens": job.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "add_special_tokens": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(id): bias for id, bias in bias_of(job).items()},
        "skip_special_tokens": not job.markers,
        "spaces_between_special_tokens": False,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if job.stop:
        # Else it would hold text back, but not the ids of that text.
        body |= {"stop": job.stop, "include_stop_str_in_output": True}
    if job.top_logprobs is not None:
        body["logprobs"] = job.top_logprobs
    if job.cache_salt:
        body["cache_salt"] = job.cache_salt
    if grammar is not None:
        body["structured_outputs"] = {"grammar": grammar}
    return body


def bias_of(job: Job) -> dict[int, float]:
    """The job's logit bias, with what penalties owe to the ids that another engine made of the answer.

    For engines whose penalties count only what they made themselves. Frequency is exact so. A token that was
    there and comes again pays its presence twice: nobody but the engine could tell.
    """
    sampling = job.sampling
    bias = dict(sampling.logit_bias)
    if job.sent and has_penalty(sampling):
        for id, times in Counter(job.prompt_ids[-job.sent :]).items():
            owed = sampling.presence_penalty + times * sampling.frequency_penalty
            bias[id] = bias.get(id, 0.0) - owed
    return bias


def has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty)


# What the server sends. Unknown fields are skipped while decoding.


class Error(msgspec.Struct):
    message: str = "no reason given"
    code: int | str | None = None


class ErrorBody(msgspec.Struct):
    error: Error | None = None
    message: str = ""  # older versions


class Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Error | None = None


class Model(msgspec.Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[Model]


class Tokens(msgspec.Struct):
    tokens: list[int]


class Text(msgspec.Struct):
    prompt: str


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class Embeddings(msgspec.Struct):
    data: list[Embedding]


def decode(data: bytes, answer: type[T]) -> T:
    """`data` as JSON of that type. Raises EngineFailed."""
    try:
        return msgspec.json.decode(data, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineFailed(f"The engine's answer can't be understood: {error}.") from None


def logprobs_of(found: Logprobs | None, top: int | None) -> list[TokenLogprob] | None:
    """One for each token of a chunk. vLLM gives no bytes: they are those of the text."""
    if found is None or top is None:
        return None
    tops = found.top_logprobs or [None] * len(found.tokens)
    return [
        _logprob(token, -9999.0 if logprob is None else logprob, alternatives or {}, top)
        for token, logprob, alternatives in zip(found.tokens, found.token_logprobs, tops, strict=False)
    ]


def _logprob(token: str, logprob: float, alternatives: dict[str, float], top: int) -> TokenLogprob:
    best = sorted(alternatives.items(), key=lambda item: -item[1])[:top]
    return TokenLogprob(
        token,
        logprob,
        list(token.encode()),
        [TokenLogprob(text, value, list(text.encode())) for text, value in best],
    )


def refusal(status: int, body: bytes) -> ApiError:
    """The error for an answer that is not 200."""
    try:
        found = msgspec.json.decode(body, type=ErrorBody)
        error = found.error or Error(found.message or "no reason given")
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = Error(body[:200].decode(errors="replace"))
    if status in (400, 422):
        return InvalidRequest(f"The engine refuses the request: {error.message}")
    if status == 503:
        return EngineUnavailable(f"The engine can't answer yet: {error.message}", retry_after=1.0)
    return failure(error)


def failure(error: Error) -> ApiError:
    """The error for one that the engine reports, maybe in mid-answer."""
    if error.code in (400, 422):
        return InvalidRequest(f"The engine refuses the request: {error.message}")
    # The server outlives the process that computes, and says so until it ends itself.
    dead = "EngineCore" in error.message or "EngineDead" in error.message
    return (Lost if dead else EngineFailed)(f"The engine failed: {error.message}")
