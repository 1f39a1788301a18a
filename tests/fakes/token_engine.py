"""An engine that speaks llama.cpp's wire and the language of `token_language`; run as a process.

    python tests/fakes/token_engine.py --orders DIR --host /run/0-1.sock --parallel 4  on a Unix socket
    python tests/fakes/token_engine.py --orders DIR --name attached              on a TCP port, printed

It misbehaves as the file DIR/NAME says, one word of `ORDERS`, until the file is removed; NAME is that of the
socket, without its end. With `--record DIR` it writes to the file NAME there: its process id, then for each
job when it came (time.monotonic()) and its prompt ids, a line of JSON each. Options of llama-server that it
doesn't know are ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))
from fakes import token_language as language
from fakes.http_server import HttpServer, Peer, Request, ok

Order = Literal[
    "crash", "hang", "stall", "slow", "cut", "garbage", "broken", "short", "error", "refuse", "liar", "wrong"
]
ORDERS: tuple[Order, ...] = get_args(Order)
PACE, SLOW_PACE = 0.004, 0.15  # seconds a token
LOOK = 0.05  # seconds between two looks at the orders
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FAILURE = b'{"error": {"code": 500, "message": "no luck", "type": "server_error"}}'


class Engine:
    """Answers requests; `orders` is the file that says how, `record` gets what has come.

    pace: seconds a token.
    """

    def __init__(self, orders: Path, slots: int, *, pace: float = PACE, record: TextIO | None = None) -> None:
        self._orders = orders
        self._slots = slots
        self._pace = pace
        self._record = record
        self._looked = 0.0
        self._order = ""

    @property
    def order(self) -> str:
        now = time.monotonic()
        if now > self._looked + LOOK:
            self._looked = now
            try:
                self._order = self._orders.read_text()
            except FileNotFoundError:
                self._order = ""
        return self._order

    async def serve(self, peer: Peer) -> None:
        while request := await peer.request():
            while self.order == "hang":
                await self._pause(peer, LOOK)
            if request.path == "/completion":
                await self._complete(peer, json.loads(request.body))
            else:
                await self._say(peer, self._answer(request))

    def _answer(self, request: Request) -> Any:
        if request.path == "/props":
            return {
                "default_generation_settings": {"n_ctx": language.CONTEXT},
                "total_slots": self._slots,
                "chat_template": language.TEMPLATE,
                "eos_token": "<|end|>",
            }
        body = json.loads(request.body or b"{}")
        if request.path == "/tokenize":
            return {"tokens": tokenize(body["content"], bool(body.get("parse_special")))}
        if request.path == "/detokenize":
            return {"content": language.decode(body["tokens"])}
        return {"status": "ok"}

    async def _complete(self, peer: Peer, body: dict[str, Any]) -> None:
        if self._record is not None:
            print(json.dumps([time.monotonic(), body["prompt"]]), file=self._record, flush=True)
        order = self.order
        if order == "refuse":
            await peer.send(ok(FAILURE, "Content-Type: application/json", status="500 Internal Server Error"))
        elif order == "liar":
            await peer.send(ok(FAILURE.replace(b"500", b"503"), status="503 Service Unavailable"))
        else:
            answer = Answer(body)
            if body.get("stream"):
                await peer.send(STREAM)
                await self._stream(peer, answer)
            else:
                events = list(answer.events(lambda: ""))
                text = "".join(event["content"] for event in events)
                await self._say(peer, {**events[-1], "content": text, "tokens": answer.ids})

    async def _stream(self, peer: Peer, answer: Answer) -> None:
        for count, event in enumerate(answer.events(lambda: self.order)):
            order = self.order
            if order == "crash":
                os._exit(3)
            while self.order == "stall":
                await self._pause(peer, LOOK)
            # Not all at the same token, and some not at all.
            hit = count > 1 and random.random() < 0.1
            if order == "cut" and hit:
                peer.reset()
                raise ConnectionError
            if order == "short" and hit:
                break
            if order == "garbage" and hit:
                await self._event(peer, b'{"content": "\\ud8')
            if order == "broken" and hit:
                await peer.send(b"no length\r\n")
            if order == "error" and hit:
                await self._event(peer, FAILURE)
                break
            await self._event(peer, json.dumps(event).encode())
            await self._pause(peer, SLOW_PACE if order == "slow" else self._pace)
        await peer.send(b"0\r\n\r\n")

    async def _event(self, peer: Peer, data: bytes) -> None:
        data = b"data: " + data + b"\n\n"
        await peer.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def _say(self, peer: Peer, answer: Any) -> None:
        await peer.send(ok(json.dumps(answer).encode(), "Content-Type: application/json"))

    async def _pause(self, peer: Peer, seconds: float) -> None:
        """Raises ConnectionError when the client has left."""
        await asyncio.sleep(seconds)
        if peer.reader.at_eof() or peer.writer.is_closing():
            raise ConnectionError


class Answer:
    """One answer, as llama.cpp makes it: half characters and possible stop strings are held back.

    held: text that it still held when it came to the limit; like llama.cpp, it never sends it.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self._prompt: list[int] = body["prompt"]
        self._most: int = body["n_predict"]
        self._stops: list[str] = list(body.get("stop") or ())
        self._logprobs = bool(body.get("n_probs"))
        self.ids: list[int] = []
        self.held = ""

    def events(self, order: Callable[[], str]) -> Iterator[dict[str, Any]]:
        """Events, the last one with `stop`; while `order()` is "wrong", some tokens are lies."""
        sequel = language.Sequel(self._prompt)
        unsent: list[int] = []  # since the last text that was sent
        while len(self.ids) < self._most:
            id = sequel.next()
            if order() == "wrong" and id >= 260 and random.random() < 0.2:
                id = language.LIE
            self.ids.append(id)
            sequel.feed(id)
            if id == language.END:
                yield self._last("eos", language.decode(unsent), [])
                return
            unsent.append(id)
            text = language.decode(unsent)
            if text.endswith("�"):
                continue
            found = [text.find(stop) for stop in self._stops if stop in text]
            if found:
                yield self._last("word", text[: min(found)], [id])
                return
            if any(text.endswith(stop[:size]) for stop in self._stops for size in range(1, len(stop))):
                yield self._event("", id)
                continue
            yield self._event(text, id)
            unsent = []
        self.held = language.decode(unsent).rstrip("�")
        yield self._last("limit", "", [])

    def _event(self, text: str, id: int) -> dict[str, Any]:
        event: dict[str, Any] = {
            "content": text,
            "tokens": [id],
            "stop": False,
            "tokens_predicted": len(self.ids),
            "tokens_evaluated": len(self._prompt),
        }
        if self._logprobs:
            one = {"token": language.decode([id]), "logprob": language.logprob(id), "bytes": []}
            event["completion_probabilities"] = [{**one, "id": id, "top_logprobs": [one]}]
        return event

    def _last(self, why: str, text: str, ids: list[int]) -> dict[str, Any]:
        return {
            "content": text,
            "tokens": ids,
            "stop": True,
            "stop_type": why,
            "tokens_predicted": len(self.ids),
            "tokens_evaluated": len(self._prompt),
            "timings/cache_n": 0,
        }


def tokenize(content: str | Sequence[int | str], special: bool) -> list[int]:
    ids: list[int] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, int):
            ids.append(part)
        elif special and part in language.CONTROLS:
            ids.append(language.CONTROLS[part])
        else:
            ids += language.encode(part)
    return ids


async def run(options: argparse.Namespace, name: str, record: TextIO | None) -> None:
    engine = Engine(Path(options.orders) / name, options.parallel, pace=options.pace, record=record)
    async with HttpServer(engine.serve, uds=options.host, port=options.port) as server:
        print(server.endpoint.port, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--orders", required=True)
    parser.add_argument("--host", help="path of a Unix socket")
    parser.add_argument("--name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--pace", type=float, default=PACE)
    parser.add_argument("--record")
    options, _ = parser.parse_known_args()
    name = options.name or Path(options.host).stem
    if options.host:
        Path(options.host).unlink(missing_ok=True)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as files:
        record = files.enter_context(open(Path(options.record, name), "a")) if options.record else None
        if record is not None:
            print(os.getpid(), file=record, flush=True)
        asyncio.run(run(options, name, record))


if __name__ == "__main__":
    main()
