"""`serve --engine` in front of servers that run already, and `--llama-server`: nothing is configured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.models.prepared import default_model
from fakes.configs import TINY, chat
from fakes.engines import over_tcp, served
from fakes.observe import alive
from fakes.running import Running
from fakes.service import BIN, Service, eventually
from fakes.token_servers import SONG, FakeSglang, FakeVllm, SongServer, write_folder
from fakes.wire import Wire, request, sse, text_of

FAKES: dict[str, Callable[..., SongServer]] = {"vllm": FakeVllm, "sglang": FakeSglang}


@pytest.fixture(params=["vllm", "sglang"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engines(kind: str, tmp_path: Path) -> Iterator[tuple[list[SongServer], list[Running]]]:
    """Two servers of one model, slow enough to be killed in mid-answer."""
    folder = write_folder(tmp_path / "song")
    songs = [FAKES[kind](folder, pace=0.05) for _ in range(2)]
    running = [Running(song) for song in songs]
    yield songs, running
    for server in running:
        server.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def start(*args: str) -> Service:
        made.append(Service(tmp_path / "data", *args))
        return made[-1]

    yield start
    for service in made:
        if service.process.poll() is None:
            service.kill()


def test_answers_survive_the_death_of_one_of_two_servers(
    kind: str, engines: tuple[list[SongServer], list[Running]], serve: Callable[..., Service]
) -> None:
    songs, running = engines
    flags = [flag for one in running for flag in ("--engine", f"{kind}=http://127.0.0.1:{one.port}/v1")]
    service = serve(*flags)
    states = service.engines()
    assert [(state["kind"], state["pid"], state["argv"]) for state in states] == [(kind, None, [])] * 2
    eventually(lambda: {one["state"] for one in service.engines()} == {"ready"}, what="both ready")
    with service.client() as client:
        models = client.get("/v1/models").json()["data"]
        assert "song" in [model["id"] for model in models]

    body = chat("song", "Sing!", stream=True, max_tokens=80, stream_options={"include_usage": True})
    stream = Wire(service.port).send(request("POST", "/v1/chat/completions", body, service.key))
    busy = eventually(lambda: [i for i in (0, 1) if songs[i].open], what="one of them sings")
    stream.head()
    answer = b"".join(stream.chunk() for _ in range(5))
    running[busy[0]].close()
    answer += b"".join(iter(stream.chunk, b""))
    sung = prompt(songs[busy[0]])
    whole = (SONG * 9)[len(sung) : len(sung) + 80].decode(errors="ignore")
    assert text_of(answer).startswith(whole[:-2])
    usage = next(found for event in sse(answer)[:-1] if (found := json.loads(event).get("usage")))
    assert usage["completion_tokens"] == 80
    assert len(prompt(songs[1 - busy[0]])) > len(sung)
    eventually(
        lambda: "starting" in {one["state"] for one in service.engines()}, what="the dead one is noticed"
    )


def prompt(song: SongServer) -> list[int]:
    """The ids that it was asked to go on with last; what is asked of it besides has none."""
    bodies = [body for _, body in song.requests if body]
    prompts = [body.get("prompt") or body.get("input_ids") for body in bodies]
    return next((ids for ids in reversed(prompts) if ids), [])


def test_engine_flags_that_make_no_sense(tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        argv = [str(BIN / "deepseek-api"), "serve", "--port", "0", "--data-dir", str(tmp_path / "d"), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        return done.stderr

    assert "with KIND one of" in refused("--engine", "ollama=http://127.0.0.1:1")
    assert "is not an http or https address" in refused("--engine", "vllm=127.0.0.1:8000")
    assert "two kinds" in refused(
        "--engine", "vllm=http://127.0.0.1:1", "--engine", "sglang=http://127.0.0.1:1"
    )
    assert "Can't reach the engine" in refused("--engine", "vllm=http://127.0.0.1:1")
    assert "no such program" in refused("--llama-server", str(tmp_path / "missing"))


@pytest.mark.embedded
def test_a_llama_server_of_ones_own(tmp_path: Path, serve: Callable[..., Service]) -> None:
    """A stand-in with llama-server's options, which then is the embedded one: the wire is the same."""
    program = tmp_path / "llama-server"
    program.write_text(f"""#!{sys.executable}
import os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert set(given) == {{"--model", "--host", "--parallel", "--ctx-size"}}, given
slots = int(given["--parallel"])
os.execv(sys.executable, [sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server",
    "--model", given["--model"], "--socket", given["--host"], "--slots", str(slots), "--context", "256"])
""")
    program.chmod(0o755)
    service = serve("--llama-server", str(program), "--model-path", TINY)
    [state] = service.engines()
    assert (state["kind"], state["state"]) == ("llamacpp", "ready")
    assert str(program) in state["argv"]
    with service.client() as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        answer = client.post("/v1/chat/completions", json=chat(model, max_tokens=3)).json()
    assert answer["usage"]["completion_tokens"] == 3
    service.kill()
    eventually(lambda: not alive(state["pid"]), timeout=30, what="no orphan")


@pytest.mark.embedded
def test_the_cache_of_an_engine_of_its_own_outlives_the_gateway(serve: Callable[..., Service]) -> None:
    question = chat("deepseek-v3", "A word. " * 100, max_tokens=2)
    with served(default_model(), slots=2, context=1024) as endpoint, over_tcp(str(endpoint.uds)) as port:
        told, key = [], None
        for _ in range(2):
            service = serve("--engine", f"llamacpp=http://127.0.0.1:{port}")
            key = key or service.key
            with service.client(key) as client:
                told.append(client.post("/v1/chat/completions", json=question).json()["usage"])
            service.stop()
    first, again = told
    assert first["prompt_cache_hit_tokens"] == 0
    assert again["prompt_cache_hit_tokens"] >= again["prompt_tokens"] - 2
