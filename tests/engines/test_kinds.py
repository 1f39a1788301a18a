"""Command lines and places of each kind of engine, and what is seen of an engine before it is used."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import EngineSettings, ModelSettings, load
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.kv_events import KVSource
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess, Unfit
from deepseek_api_compat.engines.readiness import check_record
from deepseek_api_compat.engines.vllm import Vllm
from deepseek_api_compat.errors import ConfigError, EngineUnavailable
from fakes.token_servers import BEGIN, SONG, FakeVllm, singing, write_folder

PLACE = Endpoint(uds="/run/e.sock")


def started(
    settings: EngineSettings, model: str, endpoint: Endpoint = PLACE, kv: KVSource | None = None
) -> list[str]:
    """The command line behind the guard's own."""
    lifeline = Lifeline()
    try:
        process = kinds.managed(
            settings, model=model, endpoint=endpoint, log=Path("e.log"), lifeline=lifeline, kv=kv
        )
    finally:
        lifeline.close()
    return process.argv[process.argv.index("--") + 1 :] if "--" in process.argv else process.argv


def test_vllm_is_started_by_our_python_or_by_a_command() -> None:
    settings = EngineSettings(kind="vllm", path="org/model", batch_size=64, context=4096, tensor_parallel=8)
    argv = started(settings, "org/model")
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"]
    pairs = dict(pairwise(argv))
    assert (pairs["--uds"], pairs["--max-num-seqs"], pairs["--max-model-len"]) == (
        "/run/e.sock",
        "64",
        "4096",
    )
    assert pairs["--tensor-parallel-size"] == "8"
    assert json.loads(pairs["--structured-outputs-config"]) == {"backend": "guidance"}
    own = EngineSettings(kind="vllm", path="m", command=["/srv/vllm", "serve"], args=["--seed", "1"])
    argv = started(own, "m")
    assert argv[:3] == ["/srv/vllm", "serve", "m"]
    assert argv[-2:] == ["--seed", "1"]
    assert "--max-model-len" not in argv


def test_sglang_listens_on_a_port() -> None:
    settings = EngineSettings(kind="sglang", path="org/model", tensor_parallel=2)
    endpoint = kinds.listening_place(settings, Path("unused"))
    assert endpoint.uds is None
    argv = started(settings, "org/model", endpoint)
    pairs = dict(pairwise(argv))
    assert (pairs["--model-path"], pairs["--port"], pairs["--tp-size"]) == (
        "org/model",
        str(endpoint.port),
        "2",
    )


@pytest.mark.parametrize(("kind", "switch"), [("vllm", {"enable_kv_cache_events": True}), ("sglang", {})])
def test_an_engine_is_told_where_to_publish(kind: Any, switch: dict[str, bool]) -> None:
    places = {"endpoint": "ipc:///run/e.kv", "replay_endpoint": "ipc:///run/e.kvr"}
    settings = EngineSettings(kind=kind, path="m")
    argv = started(settings, "m", kv=KVSource(*places.values()))
    config = dict(pairwise(argv))["--kv-events-config"]
    assert json.loads(config) == {"publisher": "zmq", **places, **switch}
    assert "--kv-events-config" not in started(settings, "m")


PAGES = ["--page-size", "64"]


@pytest.mark.parametrize(
    ("engine", "model", "told"),
    [
        ({"kind": "vllm"}, {}, True),
        ({"kind": "vllm", "replicas": 1}, {}, False),
        ({"kind": "vllm"}, {"routing": "least-load"}, False),
        ({"kind": "vllm", "kv_events": "off"}, {}, False),
        ({"kind": "vllm"}, {"isolate_cache": True}, True),
        ({"kind": "vllm", "args": ["--data_parallel_size=2"]}, {}, False),
        ({"kind": "vllm", "args": ["--kv-events-config", "{}"]}, {}, False),
        ({"kind": "vllm", "args": ["--no-enable-prefix-caching"]}, {}, False),
        ({"kind": "sglang"}, {}, False),
        ({"kind": "sglang", "args": PAGES}, {}, True),
        ({"kind": "sglang", "args": PAGES}, {"isolate_cache": True}, False),
        ({"kind": "sglang", "args": [*PAGES, "--dp-size", "2"]}, {}, False),
        ({"kind": "llamacpp"}, {}, False),
    ],
)
def test_who_is_asked_to_publish(
    engine: dict[str, Any], model: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    settings = EngineSettings(**{"path": "m", "replicas": 2, **engine})
    socket = Path("/tmp") / tmp_path.name / "0-1.sock"
    source = kinds.kv_source(ModelSettings(name="m", engines=[settings], **model), settings, socket)
    places = KVSource(f"ipc://{socket.parent}/0-1.kv", f"ipc://{socket.parent}/0-1.kvr")
    assert source == (places if told else None)


def test_nobody_is_asked_to_publish_where_nobody_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    managed = EngineSettings(kind="vllm", path="m", replicas=2)
    attached = EngineSettings(kind="vllm", base_url="http://h:1", kv_events="tcp://h:2")
    model = ModelSettings(name="m", engines=[managed, attached])
    assert kinds.kv_source(model, managed, Path("e.sock")) is None
    with pytest.raises(ConfigError, match=r"pip install 'deepseek-api-compat\[kv-events\]'"):
        kinds.kv_source(model, attached, Path("e.sock"))


def test_nobody_is_asked_to_publish_on_a_path_that_is_too_long(tmp_path: Path) -> None:
    engine = EngineSettings(kind="vllm", path="m", replicas=2)
    model = ModelSettings(name="m", engines=[engine])
    assert kinds.kv_source(model, engine, tmp_path / ("x" * 100) / "e.sock") is None


def test_an_engine_that_is_there_is_read_where_it_publishes() -> None:
    engines = [
        EngineSettings(kind="vllm", base_url="http://h:1", kv_events="tcp://h:2", kv_replay="tcp://h:3"),
        EngineSettings(kind="vllm", base_url="http://i:1"),
    ]
    model = ModelSettings(name="m", engines=engines)
    assert kinds.kv_source(model, engines[0], Path("e.sock")) == KVSource("tcp://h:2", "tcp://h:3")
    assert kinds.kv_source(model, engines[1], Path("e.sock")) is None


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ('base_url = "http://h:1"\nkv_events = "h:5557"', "'h:5557' is no ZeroMQ endpoint"),
        ('base_url = "http://h:1"\nkv_events = "tcp://*:5557"', "is no ZeroMQ endpoint"),
        ('base_url = "http://h:1"\nkv_replay = "tcp://h:5557"', "kv_replay is of no use"),
        ('path = "m"\nkv_events = "tcp://h:5557"', "with a base_url only"),
    ],
)
def test_wrong_settings_of_events_are_named(engine: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[[models]]\nname = "m"\n[[models.engines]]\nkind = "vllm"\n{engine}\n')
    with pytest.raises(ConfigError, match=rf"models\.m: .*{re.escape(problem)}"):
        load(str(file), environ={})


def test_llama_server_takes_its_own_options() -> None:
    settings = EngineSettings(
        kind="llamacpp",
        path="m.gguf",
        command=["llama-server"],
        batch_size=4,
        context=512,
        threads=2,
        gpu_layers=0,
    )
    expected = "llama-server --model m.gguf --host /run/e.sock --parallel 4 --ctx-size 2048 --threads 2"
    assert started(settings, "m.gguf") == [*expected.split(), "--n-gpu-layers", "0"]


def test_secrets_are_not_shown() -> None:
    argv = [
        "vllm",
        "serve",
        "--api-key",
        "hush",
        "--hf-token=hush",
        "--max-num-batched-tokens",
        "8",
        "--seed",
    ]
    assert kinds.shown(argv) == [
        *("vllm", "serve", "--api-key", "***", "--hf-token=***", "--max-num-batched-tokens", "8", "--seed")
    ]


def test_where_attached_engines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", "hush")
    settings = EngineSettings(kind="vllm", base_url="https://host:9/api/v1/", api_key_env="THEIR_KEY")
    endpoint = kinds.endpoint_of(settings)
    assert (endpoint.host, endpoint.port, endpoint.base, endpoint.tls) == ("host", 9, "/api", True)
    assert endpoint.headers == {"authorization": "Bearer hush"}
    assert kinds.endpoint_of(EngineSettings(kind="openai", base_url="http://h/v1")).base == "/v1"
    with pytest.raises(ConfigError, match="not an http"):
        kinds.endpoint_of(EngineSettings(kind="sglang", base_url="h:8000"))


def record(folder: Path, wanted: list[int], prompt: list[int]) -> Path:
    (folder / "greedy.json").write_text(json.dumps([{"prompt": prompt, "answer": wanted}]))
    return folder


async def test_the_record_is_kept_or_the_engine_is_unfit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    async with singing(FakeVllm(folder)) as endpoint:
        engine = Vllm(endpoint)
        await check_record(engine, folder, 100)  # none there
        right = list(SONG[1:9])
        await check_record(engine, record(folder, right, [BEGIN]), 100)
        with pytest.raises(Unfit, match=r"answer 0 of .* differs at token 3: \[230\] instead of \[7\]"):
            await check_record(engine, record(folder, [*right[:3], 7, 7], [BEGIN]), 100)
        await check_record(engine, record(folder, [7] * 90, [BEGIN] * 20), 100)  # too long for this engine
        (folder / "greedy.json").write_text("{")
        with pytest.raises(Unfit, match="Can't make sense of"):
            await check_record(engine, folder, 100)
        await engine.close()


async def test_an_engine_whose_model_is_not_known_here_is_unfit(tmp_path: Path) -> None:
    settings = EngineSettings(kind="vllm", base_url="http://unused")
    async with singing(FakeVllm(tmp_path / "elsewhere")) as endpoint:
        with pytest.raises(Unfit, match="`path` must name a folder"):
            await kinds.examine(settings, endpoint, None)
        with_path = await kinds.examine(settings, endpoint, str(write_folder(tmp_path / "here")))
    assert with_path.controls
    with pytest.raises(EngineUnavailable):
        await kinds.examine(settings, Endpoint(uds=str(tmp_path / "nobody.sock")), None)


async def test_an_unfit_engine_is_given_up_at_once_and_memory_is_known(tmp_path: Path) -> None:
    states: list[str] = []

    async def ready() -> Any:
        raise Unfit("It computes wrongly.")

    process = ManagedProcess(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        log=tmp_path / "e.log",
        ready=ready,
        on_change=lambda process: states.append(process.state),
    )
    assert process.memory() == 0
    process.start()
    await process.until("failed")
    assert states == ["starting", "failed"]
    assert process.detail.startswith("It computes wrongly.")
    assert process.started > 0
    await process.stop()


def test_models_are_found_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert kinds.hf_files.folder_of("org/model") is None
    place = tmp_path / "hub" / "models--org--model"
    write_folder(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc\n")
    assert kinds.hf_files.folder_of("org/model") == place / "snapshots" / "abc"
