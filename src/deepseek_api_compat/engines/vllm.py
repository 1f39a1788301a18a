"""vLLM's OpenAI server as a token engine: /v1/completions with token ids down and up.

Text and ids do not come together here: see `pieces`. Nor do prompts and control tokens: see `prompt_ids`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

import msgspec

from deepseek_api_compat.engines import llguidance
from deepseek_api_compat.engines import vllm_wire as wire
from deepseek_api_compat.engines.base import Capabilities, Endpoint, ModelInfo
from deepseek_api_compat.engines.pieces import PieceMaker, WholeCharacters
from deepseek_api_compat.engines.prompt_ids import PromptIds
from deepseek_api_compat.engines.sse import SseReader
from deepseek_api_compat.engines.upstream import Lost, Response, Upstream
from deepseek_api_compat.errors import ContextTooLong, EngineFailed, EngineUnavailable, InvalidRequest
from deepseek_api_compat.protocol.grammar import Grammar
from deepseek_api_compat.protocol.job import Job, Piece
from deepseek_api_compat.protocol.segment import Segment

T = TypeVar("T")

DONE = b"[DONE]"
FINISHES = frozenset({"stop", "length"})


class Vllm:
    """A `TokenEngine` over one vLLM server.

    slots: requests that it takes at the same time, which it doesn't tell. model: its name there; None for the
    first. known: what is known of its model, from its files.

    Errors, beyond what `TokenEngine` promises: what the server refuses is InvalidRequest with its words, a
    prompt beyond the context ContextTooLong. A grammar is InvalidRequest where the server was started with
    another backend for them than guidance (`Capabilities.grammar`).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        slots: int = 1,
        model: str | None = None,
        known: ModelInfo | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        stall_timeout: float = 120.0,
    ) -> None:
        self._upstream = Upstream(endpoint, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._stall_timeout = stall_timeout
        self._slots = slots
        self._model = model
        self._known = known or ModelInfo(context=0, slots=slots)
        self._prompts = PromptIds(self._known.controls, self._tokenize)
        self._whole = WholeCharacters(self.detokenize)

    async def info(self) -> ModelInfo:
        model = await self._served()
        if not model.max_model_len:
            raise EngineFailed("The engine doesn't say how long its context is; is it vLLM?")
        can = Capabilities(penalties_see_prompt=False)
        return ModelInfo(context=model.max_model_len, slots=self._slots, can=can)

    async def model_source(self) -> str | None:
        """The path or the repository that the model was loaded from."""
        return (await self._served()).root

    async def _served(self) -> wire.Model:
        status, body = await self._upstream.fetch("GET", "/v1/models")
        if status != 200:
            raise wire.refusal(status, body)
        for model in wire.decode(body, wire.Models).data:
            if self._model in (None, model.id):
                return model
        raise EngineFailed(f"The engine serves no model {self._model or 'at all'}.")

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        return await (self._tokenize(text) if special else self._prompts.text(text))

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        return await self._prompts.encode(segments)

    async def detokenize(self, ids: list[int]) -> str:
        return (await self._post("/detokenize", {"tokens": ids}, wire.Text)).prompt

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        answer = await self._post("/v1/embeddings", {"input": inputs}, wire.Embeddings)
        return [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]

    async def close(self) -> None:
        await self._upstream.close()

    async def stream(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        if self._known.context and len(job.prompt_ids) >= self._known.context:
            raise ContextTooLong(len(job.prompt_ids), self._known.context)
        grammar = None if job.grammar is None else self._lark(job.grammar)
        body = self._named(wire.completion_body(job, grammar))
        response = await self._upstream.request("POST", "/v1/completions", msgspec.json.encode(body))
        try:
            if response.status != 200:
                raise before_the_first_piece(wire.refusal(response.status, await response.read()))
            async for pieces in self._answer(job, response):
                yield pieces
        finally:
            response.close()

    async def _answer(self, job: Job, response: Response) -> AsyncGenerator[list[Piece], None]:
        events, maker, heard = SseReader(), PieceMaker(job.stop, self._hidden(job)), False
        finish: str | None = None
        usage = wire.Usage(prompt_tokens=len(job.prompt_ids))
        while data := await self._more(response, finish):
            pieces: list[Piece] = []
            for event in events.feed(data):
                if event == DONE:
                    continue
                chunk = wire.decode(event, wire.Chunk)
                if chunk.error is not None:
                    error = wire.failure(chunk.error)
                    raise error if heard else before_the_first_piece(error)
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if piece := await self._piece(job, maker, choice):
                        pieces.append(piece)
                    finish = choice.finish_reason or finish
            if pieces:
                if not heard:
                    heard = True
                    response.expect_within(self._stall_timeout)
                yield pieces
        if finish not in FINISHES:
            raise Lost(f"The engine ended its answer before it was complete ({finish or 'without a word'}).")
        yield [_last(maker, finish, usage)]

    async def _more(self, response: Response, finish: str | None) -> bytes:
        try:
            return await response.chunk()
        except Lost:
            if finish is None:
                raise
            return b""  # only the counts are missing, and they are known here

    async def _piece(self, job: Job, maker: PieceMaker, choice: wire.Choice) -> Piece | None:
        if choice.token_ids is None:
            raise EngineFailed("The engine gives no token ids: it needs vLLM 0.10.2 or later.")
        logprobs = wire.logprobs_of(choice.logprobs, job.top_logprobs)
        whole = await self._whole.at_end(choice.token_ids)
        return maker.feed(choice.token_ids, choice.text, logprobs, whole=whole)

    def _hidden(self, job: Job) -> dict[int, str]:
        """Control tokens that come spelled out, because `markers` have to, and are no part of the text."""
        if not job.markers:
            return {}
        controls = self._known.controls
        return {id: text for text, id in controls.items() if text not in job.markers}

    def _lark(self, grammar: Grammar) -> str:
        if not self._known.can.grammar:
            raise InvalidRequest(
                "This engine can't be held to a format: start vLLM with "
                """--structured-outputs-config '{"backend": "guidance"}'."""
            )
        return llguidance.lark(grammar, self._known.controls)

    async def _tokenize(self, text: str) -> list[int]:
        body = self._named({"prompt": text, "add_special_tokens": False})
        return (await self._post("/tokenize", body, wire.Tokens)).tokens if text else []

    def _named(self, body: dict[str, object]) -> dict[str, object]:
        return body if self._model is None else {"model": self._model, **body}

    async def _post(self, path: str, body: object, answer: type[T]) -> T:
        status, data = await self._upstream.fetch("POST", path, msgspec.json.encode(body))
        if status == 404:
            raise InvalidRequest(f"The engine has no {path}, at least not for this model.")
        if status != 200:
            raise wire.refusal(status, data)
        return wire.decode(data, answer)


def before_the_first_piece(error: Exception) -> Exception:
    """An engine that dies before it gave anything is unavailable, whatever it could still say."""
    if isinstance(error, Lost):
        return EngineUnavailable(error.message, retry_after=1.0)
    return error


def _last(maker: PieceMaker, finish: str | None, usage: wire.Usage) -> Piece:
    rest = maker.end() or Piece()
    details = usage.prompt_tokens_details
    return msgspec.structs.replace(
        rest,
        finish=finish,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else None) or 0,
        completion_tokens=maker.made if usage.completion_tokens is None else usage.completion_tokens,
    )
