"""What goes down to a token engine and what comes back up: `Job` and `Piece`.

A `Job` is a frozen value: the prompt as token ids and everything that shapes the answer. An engine
turns it into a stream of `Piece`s. A job plus the ids already emitted is a new job; that is what
lets an answer go on at another engine.
"""

from __future__ import annotations

import msgspec

from deepseek_api_compat.protocol.grammar import Grammar


class Sampling(msgspec.Struct, frozen=True):
    """Sampling parameters as OpenAI names them; every value is already checked for range."""

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)


class Job(msgspec.Struct, frozen=True):
    """One answer to generate.

    prompt_ids: the whole prompt, as the engine's own token ids.
    sent: how many of the last of them belong to the answer already (it goes on at another engine): penalties
        count them as such, usage does not count them as made.
    max_tokens: upper bound on generated tokens, already clamped to the context that is left.
    stop: strings that end the answer and are not part of it.
    grammar: what the whole answer must look like; None for any text.
    markers: control tokens, spelled out, that must show in the text of the answer; others are left out.
    top_logprobs: None for no logprobs, else how many alternatives per token (0 to 20).
    cache_salt: whose prefixes in the engine's cache may be used, and may be added to: those of jobs with the
        same salt; "": of all without one.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    top_logprobs: int | None = None
    markers: tuple[str, ...] = ()
    sent: int = 0
    cache_salt: str = ""


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's natural-log probability, with alternatives; `bytes_` are UTF-8."""

    token: str
    logprob: float
    bytes_: list[int]
    top: list[TokenLogprob] = []


class Piece(msgspec.Struct, frozen=True):
    """What an engine made in one step: usually one token.

    ids:    the new token ids (may be empty on the last piece)
    text:   their text, in whole UTF-8 characters: an engine keeps the ids of half a character back until
            it has all of it
    finish: None while generating; "stop" or "length" on the last piece
    prompt_tokens, cached_tokens, completion_tokens: the engine's own counts, on the last piece
    """

    ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
