"""llama.cpp's HTTP server as a token engine, and the command lines that start it.

A control token can't be spelled by accident: prompts go to the server as ids and texts, and where it would
make a token of a text all the same, the text is cut (`plain_text`). SentencePiece models get a space in
front of each text, behind control tokens and cuts too; that is llama.cpp's way with them.

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
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines import llamacpp_wire as wire
from deepseek_api_compat.engines import llguidance
from deepseek_api_compat.engines.base import Capabilities, Endpoint, ModelInfo
from deepseek_api_compat.engines.plain_text import PlainText
from deepseek_api_compat.engines.upstream import Lost, Upstream
from deepseek_api_compat.errors import EngineFailed, InvalidRequest, ModelError
from deepseek_api_compat.models import checkpoint
from deepseek_api_compat.protocol.grammar import Grammar
from deepseek_api_compat.protocol.job import Job, Piece
from deepseek_api_compat.protocol.segment import Segment

T = TypeVar("T")

REMEMBERED = 4096  # spellings and grammars kept


class LlamaCpp:
    """A `TokenEngine` over one llama.cpp server.

    known: what is known of its model. The server doesn't tell which control tokens there are, and it can't
    be asked about those that it makes of plain text too.

    Errors, beyond what `TokenEngine` promises: what the server refuses is InvalidRequest with its words,
    a prompt beyond the context ContextTooLong, "still loading" EngineUnavailable.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        known: ModelInfo | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        stall_timeout: float = 120.0,
    ) -> None:
        self._stall_timeout = stall_timeout
        self._upstream = Upstream(endpoint, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._known = known is not None and bool(known.controls)  # all control tokens are
        self._controls: dict[str, int | None] = dict(known.controls) if known else {}
        self._plain = PlainText(known.eager if known else ())
        self._spellings: dict[str, list[int]] = {}
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
            can=Capabilities(penalties_see_prompt=True, embeddings=True),
        )

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        return await self._ids([text] if special else self._plain.parts(text), special=special)

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        parts: list[int | str] = []
        texts: list[str] = []
        for segment in segments:
            id = await self._control(segment.text) if segment.special else None
            if id is None:
                texts.append(segment.text)
            else:
                parts += self._plain.parts("".join(texts))
                parts.append(id)
                texts = []
        parts += self._plain.parts("".join(texts))
        return await self._ids(parts, special=False)

    async def _ids(self, parts: Sequence[int | str], *, special: bool) -> list[int]:
        # One call for all: the server takes ids and texts mixed.
        body = {"content": parts, "parse_special": special, "add_special": False}
        return (await self._post("/tokenize", body, wire.Tokens)).tokens if parts else []

    async def _control(self, spelling: str) -> int | None:
        """The id of a control token, or None if the model has none of that spelling."""
        if spelling not in self._controls and not self._known:
            ids = await self.tokenize(spelling, special=True)
            one = len(ids) == 1 and ids != await self.tokenize(spelling, special=False)
            self._controls[spelling] = ids[0] if one else None
        return self._controls.get(spelling)

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
            top, made, heard = job.top_logprobs, 0, False
            held = wire.Held()
            while data := await response.chunk():
                pieces = []
                for event in events.feed(data):
                    if not event.tokens_predicted and not event.stop:
                        continue  # a step through the prompt
                    if held.keeps(event):
                        continue
                    hidden = event.tokens_predicted - made - len(event.tokens)
                    made = event.tokens_predicted
                    if hidden > 0 and event.content:
                        event.tokens = await self._spell(event.content, hidden + len(event.tokens))
                    if event.stop_type == "limit" and event.tokens and not event.content:
                        # It still held this back when it came to the limit, and never sends it.
                        event.content = await self.detokenize(event.tokens)
                    pieces.append(wire.piece(event, top))
                    if event.stop:
                        yield pieces
                        return
                if pieces:
                    if not heard:
                        heard = True
                        response.expect_within(self._stall_timeout)
                    yield pieces
            raise Lost("The engine ended its answer before it was complete.")
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
        found = {spelling: await self._control(spelling) for spelling in llguidance.spellings(grammar)}
        return {spelling: id for spelling, id in found.items() if id is not None}

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


def with_files(info: ModelInfo, model: Path) -> ModelInfo:
    """`info`, and what the engine doesn't tell but the model's files do. Raises EngineFailed.

    The template too, because where a model has none the engine tells one of its own.
    """
    try:
        files = checkpoint.read(model)
    except ModelError as error:
        raise EngineFailed(str(error)) from None
    return msgspec.structs.replace(
        info,
        chat_template=files.chat_template,
        controls=files.controls,
        eager=files.eager,
        format=files.format,
    )


def embedded(settings: EngineSettings, model: Path, socket: Path, lifeline: int) -> list[str]:
    """The command line of the embedded engine."""
    options = {
        "--model": model,
        "--socket": socket,
        "--slots": settings.batch_size,
        "--context": settings.context,
        "--threads": settings.threads,
        "--gpu-layers": settings.gpu_layers,
        "--lifeline": lifeline,
    }
    argv = [sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server"]
    argv += [f"{option}={value}" for option, value in options.items()]
    return argv + ["--embedding"] * settings.embedding


def llama_server(settings: EngineSettings, model: Path, socket: Path) -> list[str]:
    """The command line of llama.cpp's own `llama-server`, which is `settings.command`."""
    options: dict[str, object] = {"--model": model, "--host": socket, "--parallel": settings.batch_size}
    # Its context is that of all slots together; 0 is the model's own.
    options["--ctx-size"] = settings.context * settings.batch_size
    if settings.threads:
        options["--threads"] = settings.threads
    if settings.gpu_layers >= 0:
        options["--n-gpu-layers"] = settings.gpu_layers
    if settings.embedding:
        options["--pooling"] = "mean"
    written = [part for option, value in options.items() for part in (option, str(value))]
    return [*settings.command, *written, *["--embedding"] * settings.embedding, *settings.args]
