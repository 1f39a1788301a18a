"""A real vLLM on the CPU, managed by the service's own code: it serves the tiny DeepSeek-V3, exactly.

Needs an environment with vLLM: `make vllm-venv`, or DEEPSEEK_VLLM_PYTHON names its Python. Skipped without.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines import guard, kinds
from deepseek_api_compat.engines.base import Endpoint, ModelInfo
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess
from deepseek_api_compat.models import catalogue, prepared, tiny_v3
from deepseek_api_compat.protocol.job import Job, Sampling
from engines.contract import GREEDY, Contract, Subject, ids_of, run
from fakes.configs import chat
from fakes.observe import alive
from fakes.service import Service, eventually

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("DEEPSEEK_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: make vllm-venv")

COMMAND = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
# Exactness is a matter of float32, which only the plain MLA kernel has; eager saves a compilation.
ARGS = ["--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA"]
ARGS += ["--compilation-config", '{"custom_ops": ["none"]}']
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = prepared.pull(catalogue.find("deepseek-v3-tokenizer"))
    return tiny_v3.build(tmp_path_factory.mktemp("tiny") / "v3", tokenizer)


class Running(NamedTuple):
    endpoint: Endpoint
    info: ModelInfo
    settings: EngineSettings
    pid: int
    log: Path


class Keeper:
    """A managed engine in an event loop of its own, so that many tests share it."""

    def __init__(self, folder: Path, model: Path, *more: str) -> None:
        self.settings = EngineSettings(
            kind="vllm",
            path=str(model),
            command=COMMAND,
            args=[*ARGS, *more],
            env=ENV,
            batch_size=4,
            context=512,
        )
        self.endpoint = kinds.listening_place(self.settings, folder / "v.sock")
        self.log = folder / "vllm.log"
        self._lifeline = Lifeline()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.process = self._do(self._start())

    def settled(self) -> ManagedProcess:
        """Wait until it is ready, or given up."""
        self._do(self.process.until("ready", "failed"))
        return self.process

    def close(self) -> None:
        self._do(self.process.stop(grace=30.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._lifeline.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(600)

    async def _start(self) -> ManagedProcess:
        process = kinds.managed(
            self.settings,
            model=self.settings.path or "",
            endpoint=self.endpoint,
            log=self.log,
            lifeline=self._lifeline,
        )
        process.start()
        return process


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keeper = Keeper(tmp_path_factory.mktemp("vllm"), model)
    process = keeper.settled()
    try:
        assert process.state == "ready", process.detail
        assert process.info is not None
        assert process.pid is not None
        assert process.memory() > 100_000_000
        yield Running(keeper.endpoint, process.info, keeper.settings, process.pid, keeper.log)
    finally:
        children = guard.descendants(process.pid) if process.pid else []
        keeper.close()
        assert not any(map(alive, children)), "something outlived the engine"


class TestVllm(Contract):
    @pytest.fixture
    async def subject(self, running: Running) -> AsyncIterator[Subject]:
        engine = kinds.connect(running.settings, running.endpoint, running.info)
        record = tiny_v3.recorded(Path(running.settings.path or ""))
        yield Subject(engine, running.info, record[0].prompt, "<｜User｜>")
        await engine.close()

    async def test_token_exact(self, subject: Subject, model: Path) -> None:
        record = tiny_v3.recorded(model)
        assert len(record) >= 3
        for one in record:
            made = await run(subject.engine, Job(one.prompt, len(one.answer), GREEDY))
            assert ids_of(made) == one.answer

    async def test_penalties_count_the_answer_only(self, subject: Subject) -> None:
        """What `Capabilities.penalties_see_prompt` says, and what an answer that goes on is made up for."""
        token = 500

        async def third(prompt: list[int], sent: int = 0) -> int:
            sampling = Sampling(temperature=0.0, presence_penalty=2.0, logit_bias={token: 1.0})
            return ids_of(await run(subject.engine, Job(prompt, 1, sampling, sent=sent)))[0]

        bare = Sampling(temperature=0.0, logit_bias={token: 1.0})
        prompt = [*subject.prompt, token, token]
        unpenalised = ids_of(await run(subject.engine, Job(prompt, 1, bare)))[0]
        assert await third(prompt) == unpenalised

    async def test_what_it_knows_of_its_model(self, running: Running) -> None:
        assert (running.info.format, running.info.context, running.info.slots) == ("v3", 512, 4)
        assert running.info.bos == "<｜begin▁of▁sentence｜>"
        assert running.info.controls["<｜User｜>"] == 128803
        assert running.info.can.grammar


def test_a_wrong_launch_is_caught(model: Path, tmp_path: Path) -> None:
    """It is healthy, gives tokens, and they are wrong: this one scales the routed experts differently."""
    keeper = Keeper(tmp_path, model, "--hf-overrides", '{"routed_scaling_factor": 1.0}')
    try:
        process = keeper.settled()
        assert process.state == "failed"
        assert "The engine computes wrongly: answer 0 of" in process.detail
        assert "differs at token" in process.detail
    finally:
        keeper.close()


def test_a_service_with_a_managed_vllm(model: Path, start: Any) -> None:
    """Chat by DeepSeek-V3's own format; and when the service is killed with -9, nothing of vLLM is left."""
    config = f"""
[[models]]
name = "tiny-v3"
temperature = 0.0
[[models.engines]]
kind = "vllm"
path = "{model}"
command = {json.dumps(COMMAND)}
args = {json.dumps(ARGS)}
context = 512
batch_size = 2
[models.engines.env]
VLLM_CPU_KVCACHE_SPACE = "1"
HF_HUB_OFFLINE = "1"
"""
    service: Service = start(config)
    [state] = service.engines()
    assert (state["kind"], state["state"]) == ("vllm", "ready")
    assert "--max-model-len" in state["argv"]
    assert state["started"] > 0
    eventually(lambda: service.engines()[0]["memory"] > 10**8, timeout=60, what="its memory is known")
    with service.client() as client:
        body = chat("tiny-v3", "Hello", max_tokens=8)
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["message"]["content"]
    family = [state["pid"], *guard.descendants(state["pid"])]
    assert len(family) > 2
    service.process.send_signal(signal.SIGKILL)
    service.process.wait(60)
    eventually(lambda: not any(map(alive, family)), timeout=60, what="no orphan")
