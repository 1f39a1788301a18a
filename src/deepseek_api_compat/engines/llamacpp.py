"""llama.cpp's HTTP server as a token engine, and as a managed process.

Three things that llama.cpp keeps to itself are found out here:

- The bytes of a character that spans several tokens come with the last of them, and only that one is
  named; the others' ids are found by tokenising the text (their logprobs stay unknown).
- A grammar that its compiler (llguidance) refuses is only logged, and the answer is then not constrained
  at all. So each new grammar is tried once: see `_try`.
- It takes text that a grammar prescribes as control tokens where it spells them, and is then not constrained
  any more: see `_lark`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import msgspec

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines import llamacpp_wire as wire
from deepseek_api_compat.engines import llguidance
from deepseek_api_compat.engines.base import Endpoint, ModelInfo, TokenEngine
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.errors import ConfigError, EngineFailed, InvalidRequest, ModelError
from deepseek_api_compat.protocol.grammar import Grammar
from deepseek_api_compat.protocol.job import Job, Piece
from deepseek_api_compat.protocol.segment import Segment

T = TypeVar("T")

SOCKET_PATH_MAX = 103  # bytes; Linux takes 107, macOS and BSD 103
READY_TIMEOUT = 600.0  # seconds for loading; hundreds of GB from a disk take minutes
REMEMBERED = 4096  # spellings and grammars kept


class LlamaCpp:
    """A `TokenEngine` over one llama.cpp server.

    Errors, beyond what `TokenEngine` promises: what the server refuses is InvalidRequest with its words,
    a prompt beyond the context ContextTooLong, "still loading" EngineUnavailable.
    """

    def __init__(
        self, endpoint: Endpoint, *, connect_timeout: float = 5.0, read_timeout: float = 600.0
    ) -> None:
        self._upstream = Upstream(endpoint, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._controls: dict[str, int] = {}
        self._spellings: dict[str, list[int]] = {}
        self._lacking: set[str] = set()  # control tokens that the model has not
        self._forcing: dict[bytes, bool] = {}  # by grammar

    async def info(self) -> ModelInfo:
        status, body = await self._upstream.fetch("GET", "/props")
        if status != 200:
            raise wire.refusal(status, body)
        props = wire.decode(body, wire.Props)
        return ModelInfo(
            context=props.default_generation_settings.n_ctx,
            slots=props.total_slots,
            chat_template=props.chat_template or None,
            bos=props.bos_token,
            eos=props.eos_token,
        )

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "parse_special": special, "add_special": False}
        return (await self._post("/tokenize", body, wire.Tokens)).tokens

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        # One call for all: the server takes ids and texts mixed.
        parts: list[int | str] = []
        for special, run in groupby(segments, key=lambda segment: segment.special):
            if special:
                parts += [await self._control(segment.text) for segment in run]
            else:
                parts.append("".join(segment.text for segment in run))
        body = {"content": parts, "parse_special": False, "add_special": False}
        return (await self._post("/tokenize", body, wire.Tokens)).tokens if parts else []

    async def _control(self, spelling: str) -> int:
        """The id of a control token. Raises ModelError if the model has none of that spelling."""
        id = self._controls.get(spelling)
        if id is None:
            ids = await self.tokenize(spelling, special=True)
            if len(ids) != 1 or ids == await self.tokenize(spelling, special=False):
                raise ModelError(f"The model has no control token {spelling}; is its format another one?")
            id = self._controls[spelling] = ids[0]
        return id

    async def detokenize(self, ids: list[int]) -> str:
        return (await self._post("/detokenize", {"tokens": ids}, wire.Content)).content

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        answer = await self._post("/v1/embeddings", {"input": inputs}, wire.Embeddings)
        return [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]

    async def close(self) -> None:
        await self._upstream.close()

    async def stream(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        body = wire.completion_body(job)
        if job.grammar is not None:
            body["grammar"] = await self._lark(job, job.grammar)
        response = await self._upstream.request("POST", "/completion", msgspec.json.encode(body))
        try:
            if response.status != 200:
                raise wire.refusal(response.status, await response.read())
            events = wire.EventReader()
            top, made = job.top_logprobs, 0
            while data := await response.chunk():
                pieces = []
                for event in events.feed(data):
                    if not event.tokens_predicted and not event.stop:
                        continue  # a step through the prompt
                    hidden = event.tokens_predicted - made - len(event.tokens)
                    made = event.tokens_predicted
                    if hidden > 0 and event.content:
                        event.tokens = await self._spell(event.content, hidden + len(event.tokens))
                    pieces.append(wire.piece(event, top))
                    if event.stop:
                        yield pieces
                        return
                if pieces:
                    yield pieces
            raise EngineFailed("The engine ended its answer before it was complete.")
        finally:
            response.close()

    async def _spell(self, text: str, count: int) -> list[int]:
        """The `count` ids behind `text`. (SentencePiece puts a space in front, which is dropped here.)"""
        ids = self._spellings.get(text)
        if ids is None:
            if len(self._spellings) >= REMEMBERED:
                self._spellings.clear()
            ids = self._spellings[text] = await self.tokenize(text, special=False)
        return ids[-count:]

    async def _lark(self, job: Job, grammar: Grammar) -> str:
        """The grammar in the engine's words. Raises InvalidRequest unless the engine enforces it."""
        controls = await self._grammar_controls(grammar)
        text = llguidance.lark(grammar, controls)
        key = hashlib.sha256(text.encode()).digest()
        forcing = self._forcing.get(key)
        if forcing is None:
            forcing = not await self._spells_controls(llguidance.literals(grammar, controls))
            await self._try(llguidance.lark(grammar, controls, lead="["), job.prompt_ids[:1])
            if len(self._forcing) >= REMEMBERED:
                self._forcing.clear()
            self._forcing[key] = forcing
        return text if forcing else llguidance.lark(grammar, controls, forcing=False)

    async def _grammar_controls(self, grammar: Grammar) -> dict[str, int]:
        """The ids of those control tokens of the grammar that the model has."""
        found = {}
        for spelling in llguidance.spellings(grammar) - self._lacking:
            try:
                found[spelling] = await self._control(spelling)
            except ModelError:
                self._lacking.add(spelling)
        return found

    async def _spells_controls(self, text: str) -> bool:
        return await self.tokenize(text, special=True) != await self.tokenize(text, special=False)

    async def _try(self, lark: str, prompt_ids: list[int]) -> None:
        """Raises InvalidRequest unless the engine enforces a grammar, which must begin with `[`.

        It is asked for one token, with a bias towards another: a compiled grammar can't be talked into it.
        """
        bait = (await self.tokenize(")", special=False))[-1]
        body = wire.completion_body(Job(prompt_ids=prompt_ids, max_tokens=1))
        body |= {"stream": False, "cache_prompt": False, "temperature": 0.0}
        body |= {"grammar": lark, "logit_bias": [[bait, 100.0]]}
        if (await self._post("/completion", body, wire.Tokens)).tokens == [bait]:
            raise InvalidRequest(
                "The JSON schema of `response_format` or of a tool can't be enforced: no value matches it, "
                "or it has a `pattern` that the engine doesn't know."
            )

    async def _post(self, path: str, body: object, answer: type[T]) -> T:
        status, data = await self._upstream.fetch("POST", path, msgspec.json.encode(body))
        if status != 200:
            raise wire.refusal(status, data)
        return wire.decode(data, answer)


async def ready(engine: TokenEngine) -> ModelInfo:
    """What the engine serves, after one real token from it. Raises ApiError while it can't."""
    info = await engine.info()
    job = Job(prompt_ids=await engine.tokenize("Hello", special=False), max_tokens=1)
    made = [piece async for pieces in engine.stream(job) for piece in pieces]
    if not any(piece.ids for piece in made):
        raise EngineFailed("The engine says that it is ready, but generates nothing.")
    return info


def managed(
    settings: EngineSettings,
    *,
    model_path: Path,
    socket: Path,
    log: Path,
    lifeline: Lifeline,
    on_change: Callable[[ManagedProcess], None] | None = None,
) -> ManagedProcess:
    """The process that serves `model_path` on `socket` as `settings` say; not started yet.

    The socket's directory is made, for this user only. Raises ConfigError if its path is too long.
    """
    if len(str(socket).encode()) > SOCKET_PATH_MAX:
        raise ConfigError(f"The path {socket} is too long for a socket: choose a shorter data directory.")
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket.parent.chmod(0o700)
    options = {
        "--model": model_path,
        "--socket": socket,
        "--slots": settings.batch_size,
        "--context": settings.context,
        "--threads": settings.threads,
        "--gpu-layers": settings.gpu_layers,
        "--lifeline": lifeline.fd,
    }
    argv = [sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server"]
    argv += [f"{option}={value}" for option, value in options.items()]
    if settings.embedding:
        argv.append("--embedding")

    async def is_ready() -> ModelInfo:
        engine = LlamaCpp(Endpoint(uds=str(socket)))
        try:
            return await ready(engine)
        finally:
            await engine.close()

    return ManagedProcess(
        argv,
        log=log,
        ready=is_ready,
        pass_fds=(lifeline.fd,),
        start_timeout=READY_TIMEOUT,
        on_change=on_change,
    )
