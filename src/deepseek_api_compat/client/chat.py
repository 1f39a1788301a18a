"""The chat resource of the `openai` package's clients, with batches, and chunks that answer `.get()`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import cached_property
from os import PathLike
from typing import Any

import openai
from openai.resources import chat as resources
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import Choice, ChoiceDelta

from deepseek_api_compat.client.batch import Batch

PATH = "/chat/completions"


class Delta(ChoiceDelta):
    """A delta that can be read as the dictionary that it was in openai 0.28."""

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is missing or null."""
        value = getattr(self, name, None)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        if (value := getattr(self, name, None)) is None:
            raise KeyError(name)
        return value


class ChunkChoice(Choice):
    delta: Delta


class Chunk(ChatCompletionChunk):
    choices: list[ChunkChoice]  # type: ignore[assignment]


class ChunkStream(openai.Stream[Chunk]):
    """Chunks as the client's plugins leave them."""

    def __stream__(self) -> Iterator[Chunk]:
        plugins = self._client.plugins  # type: ignore[attr-defined]
        chunks = super().__stream__()
        return map(plugins.answer, chunks) if plugins.after else chunks


class AsyncChunkStream(openai.AsyncStream[Chunk]):
    """Chunks as the client's plugins leave them."""

    async def __stream__(self) -> AsyncIterator[Chunk]:
        plugins = self._client.plugins  # type: ignore[attr-defined]
        async for chunk in super().__stream__():
            yield await plugins.answer_async(chunk) if plugins.after else chunk


class Completions(resources.Completions):
    """As `openai`'s, and in batches."""

    def create_batch(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 8,
        checkpoint: str | PathLike[str] | None = None,
        progress: bool | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """The answers to many requests, each as `create` takes it, in their order; `batch_size` at a time.

        checkpoint: a file of answers, which a later call with the same requests does not ask for again.
        progress: whether to show a bar; None: on a terminal. return_exceptions: errors are in the list in the
        places of answers; else the first one is raised when the requests that were being made have ended.
        """
        batch = Batch(requests, batch_size, checkpoint, _shown(progress), ChatCompletion.model_validate)
        return batch.run(self.create, return_exceptions=return_exceptions)


class AsyncCompletions(resources.AsyncCompletions):
    """As `openai`'s, and in batches."""

    async def create_batch(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 8,
        checkpoint: str | PathLike[str] | None = None,
        progress: bool | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """As `Completions.create_batch`."""
        batch = Batch(requests, batch_size, checkpoint, _shown(progress), ChatCompletion.model_validate)
        return await batch.run_async(self.create, return_exceptions=return_exceptions)


class Chat(resources.Chat):
    @cached_property
    def completions(self) -> Completions:
        return Completions(self._client)


class AsyncChat(resources.AsyncChat):
    @cached_property
    def completions(self) -> AsyncCompletions:
        return AsyncCompletions(self._client)


def _shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress
