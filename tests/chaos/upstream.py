"""The chat upstream of the model `relay`: it counts, unless it is told to cut, to lie or to say nothing."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Literal, get_args

from chaos.fates import RELAYED, relayed
from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame
from fakes.http_server import Peer, Request, ok

Order = Literal["", "cut", "short", "error", "refuse", "slow", "hang", "babble"]
ORDERS = tuple(order for order in get_args(Order) if order)
PROMPT = 7
FAILURE = b'{"error": {"message": "no luck", "type": "server_error", "param": null, "code": null}}'


class Upstream:
    """`order`: how it answers from now on."""

    def __init__(self) -> None:
        self.order: Order = ""
        self._upstream = ChatUpstream()
        self._upstream.play(self._play)
        self.url = self._upstream.url

    def close(self) -> None:
        self._upstream.close()

    async def _play(self, peer: Peer, request: Request) -> None:
        self._upstream.request(0)  # nobody else asks for what was recorded
        body = json.loads(request.body)
        # What is refused, or silent, is so now and then only: else no other order would ever be seen.
        order = self.order if random.random() < 0.5 else ""
        while order == "hang" and self.order == "hang":
            await asyncio.sleep(0.05)
            if peer.reader.at_eof():
                return
        if order == "refuse":
            await peer.send(ok(FAILURE, status="500 Internal Server Error"))
        elif body.get("stream"):
            await self._stream(peer, body["max_tokens"], order)
        else:
            await self._whole(peer, body["max_tokens"], order)

    async def _whole(self, peer: Peer, count: int, order: str) -> None:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": relayed(count)},
            "finish_reason": "stop",
        }
        answer = ok(json.dumps({"id": "x", "choices": [choice], "usage": usage(count)}).encode())
        if order == "babble":
            answer = ok(b"<html>")
        if order in ("cut", "short"):
            await peer.send(answer[:-20])
            peer.reset()
            return
        await peer.send(answer)

    async def _stream(self, peer: Peer, count: int, order: str) -> None:
        await peer.send(STREAM_HEAD)
        for number in range(count):
            if number == 3 and order == "cut":
                peer.reset()
                return
            if number == 3 and order == "short":
                await peer.send(b"0\r\n\r\n")
                return
            if number == 3 and order == "error":
                await peer.send(frame(b"data: " + FAILURE + b"\n\n") + b"0\r\n\r\n")
                return
            await peer.send(frame(event(f"{RELAYED}{number} ")))
            await asyncio.sleep(0.1 if order == "slow" else 0.005)
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        told = b'{"usage": {"prompt_tokens": "?"}}' if order == "babble" else None
        counts = told or json.dumps({"id": "x", "choices": [], "usage": usage(count)}).encode()
        end = (
            b"data: " + json.dumps({"id": "x", "choices": [last]}).encode() + b"\n\ndata: " + counts + b"\n\n"
        )
        await peer.send(frame(end + DONE) + b"0\r\n\r\n")


def usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": PROMPT, "completion_tokens": count, "total_tokens": PROMPT + count}
