"""From a validated request to a stream of events: the path every answer of a token engine takes.

render -> encode -> jobs -> slots -> engine -> parser -> events. One request may have several
choices (`n`, several prompts); each is a job of its own, and their events come interleaved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec

from deepseek_api_compat.engines.base import ModelInfo, TokenEngine
from deepseek_api_compat.errors import ContextTooLong, InvalidRequest
from deepseek_api_compat.gateway.account import Account
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.templates import Templates
from deepseek_api_compat.protocol import formats, prompt
from deepseek_api_compat.protocol.events import Event, Usage
from deepseek_api_compat.protocol.grammar import constraint
from deepseek_api_compat.protocol.job import Job, Sampling
from deepseek_api_compat.protocol.openai import ChatRequest, CompletionRequest, Message
from deepseek_api_compat.protocol.output import OutputParser, Parser
from deepseek_api_compat.protocol.pairing import paired
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.stops import Stops

LONGEST_TOKEN = 256  # characters; twice the longest that known vocabularies have (128 spaces)

Events = AsyncGenerator[list[Event], None]


class Choice(NamedTuple):
    """One answer to generate: its job, who reads it, and stop strings that the engine can't look for."""

    job: Job
    parser: Parser
    stops: Stops | None = None


class ChatService:
    """Runs requests on a model's token engines. Every method may raise any ApiError."""

    def __init__(self, templates: Templates, *, max_choices: int) -> None:
        self._templates = templates
        self._max_choices = max_choices

    async def chat(
        self, pool: ModelPool, request: ChatRequest, functions: list[dict[str, Any]] | None, account: Account
    ) -> Events:
        """Events of all choices; one Usage event comes last. `functions`: see `prompt_ids`."""
        info = await pool.info()
        format = pool.format(info)
        ids, start = await self.prompt_ids(pool, request, functions)
        limit = account.limit(request.limit)
        # A stop string ends the answer, not the reasoning or a call; the engine couldn't tell them apart.
        plain = start.startswith("content") and not formats.declared_tools(request)
        job = Job(
            prompt_ids=ids,
            max_tokens=answer_limit(len(ids), info.context, limit),
            sampling=sampling_of(pool, request),
            stop=request.stops if plain else (),
            grammar=constraint(request, formats.call_syntax(format), start),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            markers=formats.markers(info.controls),
            cache_salt=cache_salt(pool, account),
        )
        made = [
            Choice(
                one,
                formats.parser(format, request, start, index),
                Stops(request.stops) if request.stops and not plain else None,
            )
            for index, one in enumerate(choices(job, request.choices))
        ]
        await account.reserve(pool, len(ids), limit, len(made))
        async with aclosing(self._generate(pool, made, 1, account)) as stream:
            async for events in stream:
                yield events

    async def prompt_ids(
        self, pool: ModelPool, request: ChatRequest, functions: list[dict[str, Any]] | None
    ) -> tuple[list[int], str]:
        """The prompt as the model's own token ids, and where it leaves the answer (see `Prompt`).

        `functions` are the declared functions as the client wrote them, with the order of their keys.
        """
        info = await pool.info()
        check_length(info, sum(characters(message) for message in request.messages))
        request = msgspec.structs.replace(request, messages=paired(request.messages))
        format = pool.format(info)
        if format == formats.TEMPLATE:
            rendered = await self._templates.prompt(info, request, functions)
        else:
            rendered = formats.prompt(format, request, functions)
        check_length(info, sum(len(segment.text) for segment in rendered.segments))  # tools are long too
        return await pool.ask(lambda engine: engine.encode(rendered.segments)), rendered.start

    async def complete(
        self, pool: ModelPool, request: CompletionRequest, prompts: Sequence[list[int]], account: Account
    ) -> Events:
        """As `chat`, for prompts given as token ids; choice index = prompt number x n + choice."""
        info = await pool.info()
        limit = account.limit(request.limit)
        made: list[Choice] = []
        for ids in prompts:
            if not ids:
                raise InvalidRequest("The prompt is empty.", param="prompt")
            job = Job(
                prompt_ids=ids,
                max_tokens=answer_limit(len(ids), info.context, limit),
                sampling=sampling_of(pool, request),
                stop=request.stops,
                top_logprobs=request.logprobs,
                cache_salt=cache_salt(pool, account),
            )
            made += [
                Choice(one, OutputParser(index))
                for index, one in enumerate(choices(job, request.choices), start=len(made))
            ]
        await account.reserve(pool, sum(map(len, prompts)), limit, len(made))
        async with aclosing(self._generate(pool, made, len(prompts), account)) as stream:
            async for events in stream:
                yield events

    def check_choices(self, count: int) -> None:
        """Raises InvalidRequest if one request asks for more answers than are allowed."""
        if count > self._max_choices:
            raise InvalidRequest(
                f"Prompts times n are {count} choices; at most {self._max_choices} are allowed.", param="n"
            )

    async def _generate(self, pool: ModelPool, made: list[Choice], prompts: int, account: Account) -> Events:
        # The prompt counts once however many choices are made from it, as OpenAI counts.
        per_prompt = len(made) // prompts
        streams = [run_job(pool, one, index % per_prompt == 0, account) for index, one in enumerate(made)]
        # Closed here, not by the garbage collector: a client that left frees its slot now.
        async with aclosing(streams[0] if len(streams) == 1 else merge(streams)) as stream:
            async for events in stream:
                yield events
        tally = account.tally
        yield [
            Usage(tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens, tally.reasoning_tokens)
        ]


async def run_job(pool: ModelPool, choice: Choice, counts_prompt: bool, account: Account) -> Events:
    """Events of one choice. Its tokens count as they come; at the end, what the engine counted."""
    job, parser, stops = choice
    tally = account.tally
    received = prompt = 0
    stopped = False

    async def on_lease(replica: int) -> None:
        nonlocal prompt
        if counts_prompt and not prompt:
            prompt = len(job.prompt_ids)
            tally.prompt_tokens += prompt
        await account.dispatch(replica)

    stream = pool.stream(job, account.principal.index, on_lease)
    try:
        async for group in stream:
            if not tally.first:
                tally.first = time.monotonic()
            events: list[Event] = []
            for piece in group:
                made = len(piece.ids)
                if parser.thinking:
                    tally.reasoning_tokens += made
                if piece.finish is not None:
                    made = piece.completion_tokens - received
                    if counts_prompt:
                        tally.prompt_tokens += piece.prompt_tokens - prompt
                        tally.cached_tokens += piece.cached_tokens
                received += made
                tally.completion_tokens += made
                events += parser.feed(piece)
            account.progress()
            if stops is not None:
                events, stopped = stops.feed(events)
            if events:
                yield events
            if stopped:
                return
        if events := parser.close():
            yield events
    finally:
        await stream.aclose()


async def merge(streams: Sequence[Events]) -> Events:
    """Events of several streams as they come. The first error ends all of them."""
    queue: asyncio.Queue[list[Event] | BaseException | None] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(stream: Events) -> None:
        try:
            async for events in stream:
                await queue.put(events)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sampling_of(pool: ModelPool, request: ChatRequest | CompletionRequest) -> Sampling:
    """The request's sampling, filled up with the model's defaults."""
    model = pool.settings
    return prompt.sampling_of(
        request,
        default=Sampling(temperature=model.temperature, top_p=model.top_p),
        temperature_mapping=model.temperature_mapping,
    )


def cache_salt(pool: ModelPool, account: Account) -> str:
    """Who may share what the prefix cache holds of this prompt: one key's prompts, or everybody's."""
    return account.principal.id if pool.settings.isolate_cache else ""


def choices(job: Job, n: int) -> list[Job]:
    """`n` jobs from one; a given seed is varied, or all answers would be the same."""
    if n == 1:
        return [job]
    seed = job.sampling.seed
    if seed is None:
        return [job] * n
    seeded = (msgspec.structs.replace(job.sampling, seed=(seed + index) % 2**63) for index in range(n))
    return [msgspec.structs.replace(job, sampling=sampling) for sampling in seeded]


def answer_limit(prompt_tokens: int, context: int, wanted: int | None) -> int:
    """Tokens that the answer may have. Raises ContextTooLong when the prompt leaves no room for one."""
    room = context - prompt_tokens
    if room < 1:
        raise ContextTooLong(prompt_tokens, context)
    return room if wanted is None else min(wanted, room)


def characters(message: Message) -> int:
    """At least so many does a message add to its prompt."""
    content = message.content or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part if isinstance(part, str) else getattr(part, "text", "")) for part in content)


def check_length(info: ModelInfo, characters: int) -> None:
    """Raises ContextTooLong, at no cost, for a prompt that is far too long.

    Tokenising costs the engine some 250 bytes of memory for each byte of text.
    """
    least = characters // LONGEST_TOKEN
    if least > info.context:
        raise ContextTooLong(least, info.context, at_least=True)


async def token_ids(engine: TokenEngine, info: ModelInfo, text: str, *, special: bool) -> list[int]:
    """A text as token ids. Raises ContextTooLong."""
    check_length(info, len(text))
    return await engine.tokenize(text, special=special)


async def infill_ids(engine: TokenEngine, info: ModelInfo, request: CompletionRequest) -> list[list[int]]:
    """The prompts of a completion with a `suffix`: the answer belongs between prompt and suffix."""
    prompts: list[list[Segment]] = []
    for text in request.prompts:
        if not isinstance(text, str):
            raise InvalidRequest("With a `suffix` the `prompt` must be text, not token ids.", param="prompt")
        prompts.append(formats.fill_in(text, request.suffix or "", info.controls))
        check_length(info, len(text) + len(request.suffix or ""))
    return [await engine.encode(segments) for segments in prompts]
