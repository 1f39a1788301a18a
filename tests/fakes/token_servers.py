"""vLLM, SGLang and a chat server as their protocols show them, around a model that knows one song by heart.

Its tokens are bytes (ids 0 to 255) and three control tokens. The token at place n of any text is the n-th of
the song, so what follows a prompt is known, and a half-finished answer has one right continuation.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deepseek_api_compat.engines.base import Endpoint
from fakes.http_server import HttpServer, Peer, Request, Script, ok

SONG = "Ein 漢字 im Lied, 😀 und ein Käse. ".encode()
BEGIN, END, USER = 256, 257, 258
CONTROLS = {"<｜begin▁of▁sentence｜>": BEGIN, "<｜end▁of▁sentence｜>": END, "<｜User｜>": USER}
SPELLED = {id: text for text, id in CONTROLS.items()}
CONTEXT = 4096
TEMPLATE = "{{ bos_token }}{% for message in messages %}<｜User｜>{{ message.content }}{% endfor %}"

Event = dict[str, Any]


def write_folder(folder: Path) -> Path:
    """The model's folder, as far as engines' clients read it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "song", "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [{"id": id, "content": text, "special": True} for text, id in CONTROLS.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    settings = {
        "bos_token": SPELLED[BEGIN],
        "eos_token": {"content": SPELLED[END]},
        "chat_template": "{{ x }}",
    }
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids_of(text: str) -> list[int]:
    """As a Hugging Face tokenizer does it: spelled control tokens become those tokens."""
    parts = re.split("(" + "|".join(map(re.escape, CONTROLS)) + ")", text)
    return [id for part in parts for id in ([CONTROLS[part]] if part in CONTROLS else part.encode())]


def text_of(ids: list[int], *, special: bool = True) -> str:
    data = b"".join(bytes([id]) if id < 256 else SPELLED[id].encode() * special for id in ids)
    return data.decode(errors="replace")


def sung(length: int, bias: dict[str, float]) -> int:
    """The token behind `length` others; a large bias wins."""
    strong = [int(id) for id, value in bias.items() if value > 50]
    return strong[0] if strong else SONG[length % len(SONG)]


class Singing:
    """One answer of the model, token by token: ids, and the text that is whole by then."""

    def __init__(self, prompt: list[int], most: int, stops: list[str], bias: dict[str, float]) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self._most = most
        self._stops = stops
        self._bias = bias

    def step(self) -> None:
        self.ids.append(sung(len(self.prompt) + len(self.ids), self._bias))
        whole = text_of(self.ids)
        if not whole.endswith("\ufffd"):
            self.text = whole
        ends = [self.text.index(stop) + len(stop) for stop in self._stops if stop in self.text]
        if ends:
            self.finish, self.text = "stop", self.text[: min(ends)]
        elif len(self.ids) == self._most:
            self.finish = "length"


class SongServer:
    """A server of either protocol. `requests` has what it was asked; `open` is how many streams it is at."""

    def __init__(self, folder: Path, *, step: int = 1, pace: float = 0.0) -> None:
        """step: tokens in one event. pace: seconds between events."""
        self.folder = folder
        self.requests: list[tuple[str, Any]] = []
        self.open = 0
        self._step = step
        self._pace = pace

    async def __call__(self, peer: Peer) -> None:
        while request := await peer.request():
            body = json.loads(request.body) if request.body else None
            self.requests.append((request.path, body))
            if request.path == self.generating:
                await self._stream(peer, request, body)
            else:
                await peer.send(self.answer(request.path, body))

    generating = ""

    def answer(self, path: str, body: Any) -> bytes:
        raise NotImplementedError

    def refused(self, body: Any) -> bytes | None:
        raise NotImplementedError

    def begin(self, body: Any) -> Singing:
        raise NotImplementedError

    def events(self, song: Singing, body: Any, sent: int, shown: int) -> list[Event]:
        """What is sent when the song has gone on from `sent` ids and `shown` characters."""
        raise NotImplementedError

    async def _stream(self, peer: Peer, request: Request, body: Any) -> None:
        if refused := self.refused(body):
            await peer.send(refused)
            return
        song = self.begin(body)
        self.open += 1
        gone = asyncio.ensure_future(peer.reader.read(1))
        try:
            await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while song.finish is None and not gone.done():
                sent, shown = len(song.ids), len(song.text)
                for _ in range(self._step):
                    if song.finish is None:
                        song.step()
                for event in self.events(song, body, sent, shown):
                    await peer.send(_chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
                await asyncio.sleep(self._pace)
            await peer.send(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        finally:
            self.open -= 1
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


class FakeVllm(SongServer):
    """vLLM 0.32's /v1/completions."""

    generating = "/v1/completions"

    def answer(self, path: str, body: Any) -> bytes:
        if path == "/v1/models":
            model = {"id": "song", "root": str(self.folder), "max_model_len": CONTEXT}
            return ok(json.dumps({"object": "list", "data": [model]}).encode())
        if path == "/tokenize":
            ids = ids_of(body["prompt"])
            return ok(json.dumps({"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}).encode())
        if path == "/detokenize":
            return ok(json.dumps({"prompt": text_of(body["tokens"])}).encode())
        return ok(b'{"detail": "Not Found"}', status="404 Not Found")

    def refused(self, body: Any) -> bytes | None:
        problem = None
        if body.get("structured_outputs", {}).get("grammar", "").startswith("%llguidance") is False:
            problem = "Grammar error" if "structured_outputs" in body else None
        if any(id > USER for id in body["prompt"]):
            problem = f"Token id {max(body['prompt'])} is out of vocabulary"
        if problem is None:
            return None
        error = {"message": problem, "type": "BadRequestError", "param": None, "code": 400}
        return ok(json.dumps({"error": error}).encode(), status="400 Bad Request")

    def begin(self, body: Any) -> Singing:
        stops = list(body.get("stop") or [])
        assert not stops or body["include_stop_str_in_output"], "text would be held back"
        grammar = body.get("structured_outputs")
        bias = {str(b"["[0]): 100.0} if grammar else body.get("logit_bias") or {}
        return Singing(body["prompt"], body["max_tokens"], stops, bias)

    def events(self, song: Singing, body: Any, sent: int, shown: int) -> list[Event]:
        choice: Event = {
            "index": 0,
            "text": song.text[shown:],
            "logprobs": None,
            "finish_reason": song.finish,
            "stop_reason": None,
            "token_ids": song.ids[sent:],
        }
        if body.get("logprobs") is not None:
            tokens = [text_of([id]) for id in song.ids[sent:]]
            top = {"x": -3.0, "y": -4.0, "z": -5.0}
            choice["logprobs"] = {
                "text_offset": [0] * len(tokens),
                "tokens": tokens,
                "token_logprobs": [-0.5] * len(tokens),
                "top_logprobs": [{token: -0.5} | dict(itertools.islice(top.items(), 3)) for token in tokens],
            }
        events: list[Event] = [{"id": "cmpl-1", "object": "text_completion", "choices": [choice]}]
        if song.finish is not None:
            usage = {"prompt_tokens": len(song.prompt), "completion_tokens": len(song.ids)}
            usage["prompt_tokens_details"] = {"cached_tokens": 2}  # type: ignore[assignment]
            events.append({"id": "cmpl-1", "choices": [], "usage": usage})
        return events


class FakeSglang(SongServer):
    """SGLang 0.5's /generate.

    incremental: as with --incremental-streaming-output; "ids": versions before 0.5.6, which send new ids
    beside all text.
    """

    generating = "/generate"

    def __init__(self, folder: Path, *, incremental: bool | str = False, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self._incremental = incremental

    def answer(self, path: str, body: Any) -> bytes:
        answers: dict[str, Callable[[], Any]] = {
            "/v1/models": lambda: {"data": [{"id": "song", "root": "song", "max_model_len": CONTEXT}]},
            "/get_model_info": lambda: {"model_path": str(self.folder), "is_generation": True},
            "/get_server_info": lambda: {"incremental_streaming_output": self._incremental is True},
            "/tokenize": lambda: {"tokens": ids_of(body["prompt"]), "count": 1, "max_model_len": 1},
            "/detokenize": lambda: {"text": text_of(body["tokens"])},
        }
        if path not in answers:
            return ok(b'{"detail": "Not Found"}', status="404 Not Found")
        return ok(json.dumps(answers[path]()).encode())

    def refused(self, body: Any) -> bytes | None:
        if any(id > USER for id in body["input_ids"]):
            message = "The input_ids contains values greater than the vocab size (259)."
            return ok(json.dumps({"error": {"message": message}}).encode(), status="400 Bad Request")
        return None

    def begin(self, body: Any) -> Singing:
        parameters = body["sampling_params"]
        stops = list(parameters.get("stop") or [])
        assert not stops or parameters["no_stop_trim"]
        bias = {str(b"["[0]): 100.0} if "ebnf" in parameters else parameters.get("logit_bias") or {}
        return Singing(body["input_ids"], parameters["max_new_tokens"], stops, bias)

    def events(self, song: Singing, body: Any, sent: int, shown: int) -> list[Event]:
        meta: Event = {
            "id": "1",
            "finish_reason": {"type": song.finish} if song.finish else None,
            "prompt_tokens": len(song.prompt),
            "completion_tokens": len(song.ids),
            "cached_tokens": 2,
        }
        if body.get("return_logprob"):
            tokens = [[-0.5, id, text_of([id])] for id in song.ids]
            meta["output_token_logprobs"] = tokens[sent:] if self._incremental is True else tokens
            meta["output_top_logprobs"] = [
                [[-0.5, 1, "x"], [-3.0, 2, "y"], [-4.0, 3, "z"]] for _ in meta["output_token_logprobs"]
            ]
        return [
            {
                "text": song.text[shown:] if self._incremental is True else song.text,
                "output_ids": song.ids[sent:] if self._incremental else song.ids,
                "meta_info": meta,
            }
        ]


class FakeLlamaCpp(SongServer):
    """Where llama.cpp's server answers; it says only what a test has it say. The real one is at hand."""

    generating = "/completion"


class FakeChat(SongServer):
    """Any OpenAI-compatible server: it renders prompts itself, and tells texts."""

    generating = "/v1/chat/completions"

    def answer(self, path: str, body: Any) -> bytes:
        if path == "/v1/models":
            return ok(json.dumps({"object": "list", "data": [{"id": "song"}]}).encode())
        return ok(b'{"error": {"message": "Not Found"}}', status="404 Not Found")

    def refused(self, body: Any) -> bytes | None:
        return None

    def begin(self, body: Any) -> Singing:
        assert body["stream"], "only streams are sung"
        prompt = [BEGIN]
        for message in body["messages"]:
            prompt += [USER, *ids_of(message["content"])]
        return Singing(prompt, body["max_tokens"], list(body.get("stop") or []), body.get("logit_bias") or {})

    def events(self, song: Singing, body: Any, sent: int, shown: int) -> list[Event]:
        choice = {"index": 0, "delta": {"content": song.text[shown:]}, "finish_reason": song.finish}
        events: list[Event] = [{"id": "1", "object": "chat.completion.chunk", "choices": [choice]}]
        if song.finish is not None and body["stream_options"]["include_usage"]:
            usage = {"prompt_tokens": len(song.prompt), "completion_tokens": len(song.ids)}
            usage["prompt_tokens_details"] = {"cached_tokens": 2}  # type: ignore[assignment]
            events.append({"id": "1", "choices": [], "usage": usage})
        return events


@asynccontextmanager
async def singing(server: SongServer) -> AsyncIterator[Endpoint]:
    async with HttpServer(server) as running:
        yield running.endpoint


def saying(path: str, answer: bytes, otherwise: Script, *, stays: bool = False) -> Script:
    """A server that answers one path so, and the others as `otherwise` does.

    stays: it closes no connection before its client does.
    """

    async def script(peer: Peer) -> None:
        while request := await peer.request():
            if request.path == path:
                await peer.send(answer)
                if stays:
                    await peer.closed()
                return
            assert isinstance(otherwise, SongServer)
            body = json.loads(request.body) if request.body else None
            await peer.send(otherwise.answer(request.path, body))

    return script


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
