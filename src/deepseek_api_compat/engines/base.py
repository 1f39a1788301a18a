"""The seam between the gateway and whatever computes tokens.

Two kinds of engine stand behind it. A *token engine* takes prompt ids and gives ids and text; a
*chat upstream* takes an OpenAI request and gives an OpenAI response, which the gateway relays.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import msgspec

from deepseek_api_compat.engines.kv_events import KVSource
from deepseek_api_compat.protocol.job import Job, Piece
from deepseek_api_compat.protocol.segment import Segment


class Endpoint(msgspec.Struct, frozen=True):
    """Where an engine listens: `uds` (a Unix socket path) or `host` and `port`, TLS if `tls`.

    `base` is the path in front of every request path ("" or like "/v1"); `headers` go with every request.
    """

    host: str = "127.0.0.1"
    port: int = 80
    uds: str | None = None
    tls: bool = False
    base: str = ""
    headers: dict[str, str] = {}


class Capabilities(msgspec.Struct, frozen=True):
    """What a token engine can do.

    resume: a prompt and the ids of half an answer are a job like any other.
    grammar: `Job.grammar` is enforced. logprobs, logit_bias: those of `Job` are honoured.
    penalties_see_prompt: presence and frequency penalties count the ids of the prompt too (else `Job.sent`
        says how many of them are the answer's, and what they owe is made up for).
    embeddings: `embed` works. prefix_cache: `Piece.cached_tokens` is told.
    """

    resume: bool = True
    grammar: bool = True
    logprobs: bool = True
    logit_bias: bool = True
    penalties_see_prompt: bool = False
    embeddings: bool = False
    prefix_cache: bool = True


class ModelInfo(msgspec.Struct, frozen=True):
    """What a loaded token engine says about its model.

    context: tokens that one request may use, prompt and answer together.
    slots: requests that it generates for at the same time.
    chat_template: Jinja source, or None. bos/eos: the text of those tokens ("" if none).
    controls: ids of the control tokens, by spelling. eager: those that the engine's tokenizer makes of their
    spelling even in plain text. format: how the model's prompts are written, as its files say ("v3.1", ...,
    or "template"). can: what the engine can do with it.
    """

    context: int
    slots: int
    chat_template: str | None = None
    bos: str = ""
    eos: str = ""
    controls: dict[str, int] = {}
    eager: list[str] = []
    format: str = "template"
    can: Capabilities = Capabilities()


class TokenEngine(Protocol):
    """`prompt ids -> ids and text`. One object serves many concurrent jobs.

    Every call raises `EngineUnavailable` when the engine can't be reached or dies before the
    first piece, and `EngineFailed` when it breaks afterwards or answers nonsense.
    """

    async def info(self) -> ModelInfo: ...

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`, no BOS added; `special`: spellings of control tokens become those tokens."""
        ...

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of a prompt: special segments as their control tokens, all other text as text.

        Text between two control tokens is encoded as one. A control token that the model doesn't have is
        text, as it is for the model's own tokenizer.
        """
        ...

    async def detokenize(self, ids: list[int]) -> str: ...

    def stream(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """The answer, one list for all that one read brought; the last piece of the last list has `finish`.

        Closing the generator (`aclose`, or cancelling a read) frees the engine's slot.
        """
        ...

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        """One vector for each input. Raises InvalidRequest where the engine can't."""
        ...

    async def close(self) -> None: ...


class EngineState(msgspec.Struct, frozen=True):
    """A replica as the supervisor sees it; pushed to workers, printed by `engines list`.

    state: starting (also after a death) | ready | doubtful (it failed a request, and is looked at) | drained
    (out of service, as an operator wished) | failed | stopping | stopped. kv: where it tells of its KV cache.
    """

    model: str
    replica: int
    kind: str
    state: str
    endpoint: Endpoint
    pid: int | None = None
    detail: str = ""
    info: ModelInfo | None = None
    argv: list[str] = []
    memory: int = 0
    started: float = 0.0
    kv: KVSource | None = None


JsonObject = dict[str, Any]
