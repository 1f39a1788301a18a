"""From a validated request to a stream of events: the path every answer of a token engine takes.

render -> tokenize -> jobs -> slots -> engine -> parser -> events. One request may have several
choices (`n`, several prompts); each is a job of its own, and their events come interleaved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from deepseek_api_compat.engines.base import ModelInfo, TokenEngine
from deepseek_api_compat.errors import ContextTooLong, InvalidRequest
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.protocol import prompt
from deepseek_api_compat.protocol.events import Event, Usage
from deepseek_api_compat.protocol.job import Job, Sampling
from deepseek_api_compat.protocol.openai import ChatRequest, CompletionRequest, Message
from deepseek_api_compat.protocol.output import OutputParser

LONGEST_TOKEN = 256  # characters; twice the longest that known vocabularies have (128 spaces)

Events = AsyncGenerator[list[Event], None]


class ChatService:
    """Runs requests on a model's token engines. Every method may raise any ApiError."""

    def __init__(self, *, max_choices: int) -> None:
        self._max_choices = max_choices

    async def chat(self, pool: ModelPool, request: ChatRequest, tally: Tally) -> Events:
        """Events of all choices; one Usage event comes last."""
        if request.tool_choice not in (None, "auto", "none"):
            # Not yet enforced by a grammar, and a forced call that does not come is worse than a refusal.
            raise InvalidRequest(f"{pool.name} can't be forced to call a tool yet.", param="tool_choice")
        info = await pool.info()
        engine = await pool.engine()
        ids = await prompt_ids(engine, info, request.messages, request.tools)
        job = Job(
            prompt_ids=ids,
            max_tokens=answer_limit(len(ids), info.context, request.limit),
            sampling=sampling_of(pool, request),
            stop=request.stops,
            grammar=prompt.grammar_of(request),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        async with aclosing(self._generate(pool, choices(job, request.choices), 1, tally)) as stream:
            async for events in stream:
                yield events

    async def complete(
        self, pool: ModelPool, request: CompletionRequest, prompts: Sequence[list[int]], tally: Tally
    ) -> Events:
        """As `chat`, for prompts given as token ids; choice index = prompt number x n + choice."""
        info = await pool.info()
        jobs = []
        for ids in prompts:
            if not ids:
                raise InvalidRequest("The prompt is empty.", param="prompt")
            job = Job(
                prompt_ids=ids,
                max_tokens=answer_limit(len(ids), info.context, request.limit),
                sampling=sampling_of(pool, request),
                stop=request.stops,
                top_logprobs=request.logprobs,
            )
            jobs += choices(job, request.choices)
        async with aclosing(self._generate(pool, jobs, len(prompts), tally)) as stream:
            async for events in stream:
                yield events

    def check_choices(self, count: int) -> None:
        """Raises InvalidRequest if one request asks for more answers than are allowed."""
        if count > self._max_choices:
            raise InvalidRequest(
                f"Prompts times n are {count} choices; at most {self._max_choices} are allowed.", param="n"
            )

    async def _generate(self, pool: ModelPool, jobs: list[Job], prompts: int, tally: Tally) -> Events:
        # The prompt counts once however many choices are made from it, as OpenAI counts.
        per_prompt = len(jobs) // prompts
        streams = [
            run_job(pool, index, job, index % per_prompt == 0, tally) for index, job in enumerate(jobs)
        ]
        # Closed here, not by the garbage collector: a client that left frees its slot now.
        async with aclosing(streams[0] if len(streams) == 1 else merge(streams)) as stream:
            async for events in stream:
                yield events
        yield [Usage(tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens, 0)]


async def run_job(pool: ModelPool, index: int, job: Job, counts_prompt: bool, tally: Tally) -> Events:
    """Events of one choice. What the engine counted goes into `tally`; until it has, what was received."""
    parser = OutputParser(index)
    received = 0
    counted = False
    stream = pool.stream(job)
    try:
        async for group in stream:
            if not tally.first:
                tally.first = time.monotonic()
            events: list[Event] = []
            for piece in group:
                received += len(piece.ids)
                if piece.finish is not None:
                    counted = True
                    tally.completion_tokens += piece.completion_tokens
                    if counts_prompt:
                        tally.prompt_tokens += piece.prompt_tokens
                        tally.cached_tokens += piece.cached_tokens
                events += parser.feed(piece)
            if events:
                yield events
        if events := parser.close():
            yield events
    finally:
        if not counted:
            tally.completion_tokens += received
            if counts_prompt:
                tally.prompt_tokens += len(job.prompt_ids)
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


def choices(job: Job, n: int) -> list[Job]:
    """`n` jobs from one; a given seed is varied, or all answers would be the same."""
    if n == 1:
        return [job]
    made = []
    for index in range(n):
        sampling = job.sampling
        if sampling.seed is not None:
            sampling = Sampling(
                sampling.temperature,
                sampling.top_p,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                (sampling.seed + index) % 2**63,
                sampling.logit_bias,
            )
        made.append(Job(job.prompt_ids, job.max_tokens, sampling, job.stop, job.grammar, job.top_logprobs))
    return made


def answer_limit(prompt_tokens: int, context: int, wanted: int | None) -> int:
    """Tokens that the answer may have. Raises ContextTooLong when the prompt leaves no room for one."""
    room = context - prompt_tokens
    if room < 1:
        raise ContextTooLong(prompt_tokens, context)
    return room if wanted is None else min(wanted, room)


async def prompt_ids(
    engine: TokenEngine, info: ModelInfo, messages: Sequence[Message], tools: Any
) -> list[int]:
    """Messages as the model's own token ids."""
    text = prompt.render_template(
        info.chat_template, prompt.normalise(messages), bos=info.bos, eos=info.eos, tools=tools
    )
    return await token_ids(engine, info, text, special=True)


async def token_ids(engine: TokenEngine, info: ModelInfo, text: str, *, special: bool) -> list[int]:
    """A text as token ids. Raises ContextTooLong, at no cost, for one that is far too long.

    Tokenising costs the engine some 250 bytes of memory for each byte of text.
    """
    least = len(text) // LONGEST_TOKEN
    if least > info.context:
        raise ContextTooLong(least, info.context, at_least=True)
    return await engine.tokenize(text, special=special)
