"""SGLang's server as a token engine: /generate with token ids down and up.

Source: SGLang 0.5 (`managers/tokenizer_manager.py`, `sampling/sampling_params.py` and
`entrypoints/openai/serving_tokenize.py`). Each event of a stream has all ids and all text so far, unless the
server was started to send only what is new; versions before 0.5.6 send new ids beside all text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.engines import llguidance
from deepseek_api_compat.engines.base import Capabilities, Endpoint, ModelInfo
from deepseek_api_compat.engines.pieces import PieceMaker, WholeCharacters
from deepseek_api_compat.engines.prompt_ids import PromptIds
from deepseek_api_compat.engines.sse import SseReader
from deepseek_api_compat.engines.upstream import Lost, Response, Upstream
from deepseek_api_compat.engines.vllm_wire import Embeddings, Models, Tokens, bias_of, decode, refusal
from deepseek_api_compat.errors import (
    ApiError,
    ContextTooLong,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.protocol.grammar import Grammar
from deepseek_api_compat.protocol.job import Job, Piece, TokenLogprob
from deepseek_api_compat.protocol.segment import Segment

T = TypeVar("T")

DONE = b"[DONE]"

# [logprob, id, text]; text as asked for.
LogprobTuple = tuple[float | None, int, str | None]


class FinishReason(msgspec.Struct):
    type: str
    message: str = ""
    status_code: int | None = None


class Meta(msgspec.Struct):
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    output_token_logprobs: list[LogprobTuple] = []
    output_top_logprobs: list[list[LogprobTuple] | None] = []


class ErrorObject(msgspec.Struct):
    message: str = "no reason given"
    code: int | str | None = None


class Event(msgspec.Struct):
    text: str = ""
    output_ids: list[int] = []
    meta_info: Meta = msgspec.field(default_factory=Meta)
    error: ErrorObject | None = None


class Text(msgspec.Struct):
    text: str


class ServedModel(msgspec.Struct):
    model_path: str


class ServerInfo(msgspec.Struct):
    """Which of the two it has depends on the version."""

    incremental_streaming_output: bool = False
    stream_output: bool = False


class SgLang:
    """A `TokenEngine` over one SGLang server.

    slots: requests that it takes at the same time. known: what is known of its model, from its files.

    Errors, beyond what `TokenEngine` promises: what the server refuses is InvalidRequest with its words, a
    prompt beyond the context ContextTooLong. Grammars need a server with `--grammar-backend llguidance`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        slots: int = 1,
        known: ModelInfo | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        stall_timeout: float = 120.0,
    ) -> None:
        self._upstream = Upstream(endpoint, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._stall_timeout = stall_timeout
        self._slots = slots
        self._known = known or ModelInfo(context=0, slots=slots)
        self._prompts = PromptIds(self._known.controls, self._tokenize)
        self._whole = WholeCharacters(self.detokenize)
        self._sends_new_text: bool | None = None  # not known yet

    async def info(self) -> ModelInfo:
        models = (await self._get("/v1/models", Models)).data
        context = models[0].max_model_len if models else None
        if not context:
            raise EngineFailed("The engine doesn't say how long its context is; is it SGLang?")
        return ModelInfo(context=context, slots=self._slots, can=Capabilities(penalties_see_prompt=False))

    async def model_source(self) -> str | None:
        """The path or the repository that the model was loaded from."""
        return (await self._get("/get_model_info", ServedModel)).model_path

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        return await (self._tokenize(text) if special else self._prompts.text(text))

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        return await self._prompts.encode(segments)

    async def detokenize(self, ids: list[int]) -> str:
        body = {"tokens": ids, "skip_special_tokens": False}
        return (await self._post("/detokenize", body, Text)).text

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        answer = await self._post("/v1/embeddings", {"input": inputs}, Embeddings)
        return [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]

    async def close(self) -> None:
        await self._upstream.close()

    async def stream(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        if self._known.context and len(job.prompt_ids) >= self._known.context:
            raise ContextTooLong(len(job.prompt_ids), self._known.context)
        body = generate_body(job, None if job.grammar is None else self._lark(job.grammar))
        response = await self._upstream.request("POST", "/generate", msgspec.json.encode(body))
        try:
            if response.status != 200:
                raise refusal(response.status, await response.read())
            async for pieces in self._answer(job, response):
                yield pieces
        finally:
            response.close()

    async def _answer(self, job: Job, response: Response) -> AsyncGenerator[list[Piece], None]:
        events, answer = SseReader(), _Answer(job, self._known)
        heard = False
        while data := await response.chunk():
            pieces: list[Piece] = []
            for event in events.feed(data):
                if event == DONE:
                    continue
                step = decode(event, Event)
                if problem := _problem(step):
                    raise problem
                if answer.new_ids_only(step) and self._sends_new_text is None:
                    self._sends_new_text = await self._new_text_only()
                ids, text, logprobs = answer.new(step, bool(self._sends_new_text))
                whole = await self._whole.at_end(ids)
                if piece := answer.maker.feed(ids, text, logprobs, whole=whole):
                    pieces.append(piece)
                if step.meta_info.finish_reason is not None:
                    yield [*pieces, _last(answer.maker, step.meta_info)]
                    return
            if pieces:
                if not heard:
                    heard = True
                    response.expect_within(self._stall_timeout)
                yield pieces
        raise Lost("The engine ended its answer before it was complete.")

    async def _new_text_only(self) -> bool:
        info = await self._get("/get_server_info", ServerInfo)
        return info.incremental_streaming_output or info.stream_output

    def _lark(self, grammar: Grammar) -> str:
        if not self._known.can.grammar:
            raise InvalidRequest(
                "This engine can't be held to a format: start SGLang with --grammar-backend llguidance."
            )
        return llguidance.lark(grammar, self._known.controls)

    async def _tokenize(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return (await self._post("/tokenize", body, Tokens)).tokens if text else []

    async def _get(self, path: str, answer: type[T]) -> T:
        status, data = await self._upstream.fetch("GET", path)
        if status != 200:
            raise refusal(status, data)
        return decode(data, answer)

    async def _post(self, path: str, body: object, answer: type[T]) -> T:
        status, data = await self._upstream.fetch("POST", path, msgspec.json.encode(body))
        if status == 404:
            raise InvalidRequest(f"The engine has no {path}, at least not for this model.")
        if status != 200:
            raise refusal(status, data)
        return decode(data, answer)


def generate_body(job: Job, grammar: str | None = None) -> dict[str, Any]:
    """The request for a job; `grammar` is `job.grammar` in llguidance's words."""
    sampling = job.sampling
    parameters: dict[str, Any] = {
        "max_new_tokens": job.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "skip_special_tokens": not job.markers,
        "spaces_between_special_tokens": False,
    }
    if bias := bias_of(job):
        parameters["logit_bias"] = {str(id): value for id, value in bias.items()}
    if sampling.seed is not None:
        parameters["sampling_seed"] = sampling.seed
    if job.stop:
        parameters |= {"stop": job.stop, "no_stop_trim": True}
    if grammar is not None:
        parameters["ebnf"] = grammar
    body: dict[str, Any] = {"input_ids": job.prompt_ids, "sampling_params": parameters, "stream": True}
    if job.cache_salt:
        body["extra_key"] = job.cache_salt
    if job.top_logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": job.top_logprobs}
        body["return_text_in_logprobs"] = True
    return body


class _Answer:
    """What has come of one answer, to tell what is new in the next event."""

    def __init__(self, job: Job, known: ModelInfo) -> None:
        hidden = {id: text for text, id in known.controls.items() if text not in job.markers}
        self.maker = PieceMaker(job.stop, hidden if job.markers else {})
        self._top = job.top_logprobs
        self._text = 0  # characters so far
        self._logprobs = 0

    def new_ids_only(self, step: Event) -> bool:
        return len(step.output_ids) < step.meta_info.completion_tokens

    def new(self, step: Event, new_text: bool) -> tuple[list[int], str, list[TokenLogprob] | None]:
        """Ids, text and logprobs of this step. `new_text`: the server sends only what is new of the text.

        Raises EngineFailed if the event continues nothing that was there.
        """
        made, total = self.maker.made, step.meta_info.completion_tokens
        if len(step.output_ids) >= total:  # all; they may be ahead of the count, which was made before
            ids, text = step.output_ids[made:], step.text[self._text :]
        elif made + len(step.output_ids) == total:
            ids, text = step.output_ids, step.text if new_text else step.text[self._text :]
        else:
            raise EngineFailed(
                f"The engine's ids don't add up: {made} and {len(step.output_ids)} are not {total}."
            )
        self._text += len(text)
        return ids, text, self._new_logprobs(step.meta_info, len(ids))

    def _new_logprobs(self, meta: Meta, count: int) -> list[TokenLogprob] | None:
        if self._top is None:
            return None
        # All so far, or the new ones: the last ones are those of the new ids either way.
        found = meta.output_token_logprobs[-count:] if count else []
        tops = (meta.output_top_logprobs[-count:] if count else []) or [None] * len(found)
        return [
            _logprob(one, [_logprob(other, []) for other in (top or [])[: self._top]])
            for one, top in zip(found, tops, strict=False)
        ]


def _logprob(found: LogprobTuple, top: list[TokenLogprob]) -> TokenLogprob:
    logprob, _, text = found
    known = "" if text is None else text
    return TokenLogprob(known, -9999.0 if logprob is None else logprob, list(known.encode()), top)


def _problem(step: Event) -> ApiError | None:
    if step.error is not None:
        return EngineFailed(f"The engine failed: {step.error.message}")
    finish = step.meta_info.finish_reason
    if finish is None or finish.type != "abort":
        return None
    if finish.status_code == 400:
        return InvalidRequest(f"The engine refuses the request: {finish.message}")
    if finish.status_code == 503:
        return EngineUnavailable(f"The engine can't answer now: {finish.message}", retry_after=1.0)
    return Lost(f"The engine gave the answer up: {finish.message or 'without a reason'}")


def _last(maker: PieceMaker, meta: Meta) -> Piece:
    assert meta.finish_reason is not None
    return msgspec.structs.replace(
        maker.end() or Piece(),
        finish="length" if meta.finish_reason.type == "length" else "stop",
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        completion_tokens=meta.completion_tokens,
    )
