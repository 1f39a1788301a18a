"""Streams of a service, read as a client reads them, with the time of each part."""

from __future__ import annotations

import asyncio
import json
import time

from bench.service import Service
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.upstream import Upstream

END = 2  # the token of the embedded model that would end an answer early


def client(service: Service) -> Upstream:
    """For any number of streams at the same time."""
    endpoint = Endpoint(port=service.port, headers={"Authorization": f"Bearer {service.key}"})
    return Upstream(endpoint, read_timeout=600.0)


class Stream:
    """One answer, and when its parts came."""

    def __init__(
        self, model: str, prompt: str | list[dict[str, str]], tokens: int, *, end: int = END
    ) -> None:
        """`prompt`: a user's message, or all messages. `end`: a token that the answer does not have."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        self._body = json.dumps(
            {
                "model": model,
                "messages": messages,
                "max_tokens": tokens,
                "logit_bias": {str(end): -100},
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        self.sent = 0.0
        self.began = asyncio.Event()
        self.times: list[float] = []
        self.text = ""
        self.usage: dict[str, int] = {}
        self.complete = False
        self.error = ""  # why it is not

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    async def read(self, upstream: Upstream) -> None:
        """Read the answer to its end. Raises RuntimeError for an answer that is none."""
        self.sent = time.perf_counter()
        response = await upstream.request("POST", "/v1/chat/completions", self._body)
        rest = b""
        try:
            while data := await response.chunk():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    self._take(event)
        finally:
            response.close()
            self.began.set()  # also if it never did
        if response.status != 200:
            raise RuntimeError(f"the service answered {response.status}")

    def _take(self, event: bytes) -> None:
        if event == b"data: [DONE]":
            self.complete = True
        elif event.startswith(b"data: "):
            chunk = json.loads(event[6:])
            if "error" in chunk:
                self.error = chunk["error"]["message"]
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", []):
                if text := choice["delta"].get("content"):
                    self.text += text
                    self.times.append(time.perf_counter())
                    self.began.set()

    def pause(self, at: float) -> float:
        """Seconds between the last part before a moment and the first one after it."""
        before = [one for one in self.times if one <= at]
        after = [one for one in self.times if one > at]
        return after[0] - before[-1] if before and after else 0.0
