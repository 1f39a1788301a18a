"""Command lines and places of each kind of engine, and what is seen of an engine before it is used."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess, Unfit
from deepseek_api_compat.engines.readiness import check_record
from deepseek_api_compat.engines.vllm import Vllm
from deepseek_api_compat.errors import ConfigError, EngineUnavailable
from fakes.token_servers import BEGIN, SONG, FakeVllm, singing, write_folder

PLACE = Endpoint(uds="/run/e.sock")


def started(settings: EngineSettings, model: str, endpoint: Endpoint = PLACE) -> list[str]:
    """The command line behind the guard's own."""
    lifeline = Lifeline()
    try:
        process = kinds.managed(
            settings, model=model, endpoint=endpoint, log=Path("e.log"), lifeline=lifeline
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
