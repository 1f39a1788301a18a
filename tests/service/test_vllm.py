"""A real vLLM on the CPU, managed by the service's own code: it serves the tiny DeepSeek-V3, exactly.

Needs an environment with vLLM: `make vllm-venv`, or DEEPSEEK_VLLM_PYTHON names its Python. Skipped without.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from deepseek_api_compat.config import EngineSettings, ModelSettings
from deepseek_api_compat.engines import guard, kinds
from deepseek_api_compat.engines.base import Endpoint, ModelInfo
from deepseek_api_compat.engines.kv_events import Cleared, KVEvent
from deepseek_api_compat.engines.kv_reader import KVReader
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.gateway.prefix import PrefixIndex, chain
from deepseek_api_compat.models import catalogue, prepared, tiny_v3
from deepseek_api_compat.protocol.continuation import Continuation
from deepseek_api_compat.protocol.grammar import Json
from deepseek_api_compat.protocol.job import Job, Sampling
from deepseek_api_compat.protocol.json_schema import enforceable
from engines.contract import GREEDY, Contract, Subject, ids_of, run, text_of
from fakes.configs import chat
from fakes.json_validator import mismatches
from fakes.observe import alive
from fakes.service import Service, eventually

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("DEEPSEEK_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: make vllm-venv")

COMMAND = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
# Exactness is a matter of float32, which only the plain MLA kernel has; eager saves a compilation.
ARGS = ["--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA"]
ARGS += ["--compilation-config", '{"custom_ops": ["none"]}']
CONFIG = """
[[models]]
name = "tiny-v3"
temperature = 0.0
[[models.engines]]
kind = "vllm"
path = "{settings.path}"
command = {command}
args = {args}
context = {settings.context}
batch_size = {settings.batch_size}
[models.engines.env]
VLLM_CPU_KVCACHE_SPACE = "1"
HF_HUB_OFFLINE = "1"
"""
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = prepared.pull(catalogue.find("deepseek-v3-tokenizer"))
    return tiny_v3.build(tmp_path_factory.mktemp("tiny") / "v3", tokenizer)


class Running(NamedTuple):
    """A service, and its engine as a client of its own sees it."""

    service: Service
    settings: EngineSettings
    endpoint: Endpoint
    info: ModelInfo


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with a managed vLLM; when it is killed with -9, nothing of vLLM is left."""
    settings = EngineSettings(
        kind="vllm", path=str(model), command=COMMAND, args=ARGS, env=ENV, batch_size=4, context=512
    )
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "config.toml").write_text(
        CONFIG.format(settings=settings, args=json.dumps(ARGS), command=json.dumps(COMMAND))
    )
    service = Service(folder / "data", "--config", str(folder / "config.toml"), patience=600.0)
    endpoint = Endpoint(uds=str(folder / "data" / "run" / "engines" / "0-0.sock"))
    yield Running(service, settings, endpoint, asyncio.run(kinds.examine(settings, endpoint, str(model))))
    [state] = service.engines()
    family = [state["pid"], *guard.descendants(state["pid"])]
    service.process.send_signal(signal.SIGKILL)
    service.kill()
    assert len(family) > 2
    eventually(lambda: not any(map(alive, family)), timeout=60, what="no orphan")


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
        """What `Capabilities.penalties_see_prompt` says, and what an answer that goes on is made up for.

        A bias lifts a token of the prompt to just above all others; a penalty that counts it brings it down.
        """
        token = 500
        prompt = [*subject.prompt, token, token]

        async def wins(bias: float, presence: float = 0.0, sent: int = 0) -> bool:
            sampling = Sampling(temperature=0.0, presence_penalty=presence, logit_bias={token: bias})
            return ids_of(await run(subject.engine, Job(prompt, 1, sampling, sent=sent))) == [token]

        low, high = 0.0, 90.0
        assert await wins(high)
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (low, middle) if await wins(middle) else (middle, high)
        assert await wins(high, presence=2.0)
        assert not await wins(high, presence=2.0, sent=2)

    async def test_the_rest_of_a_grammar(self, subject: Subject) -> None:
        """An answer that was cut goes on with what is still missing of its JSON text."""
        word = {"type": "string", "pattern": "^[a-z]{3,9}$"}
        properties = {
            "a": word,
            "n": {"type": "integer", "minimum": 5, "maximum": 1234},
            "b": {"enum": ["x", "y"]},
        }
        schema = {"type": "object", "properties": properties, "required": [*properties]}
        job = Job(subject.prompt, 100, GREEDY, grammar=Json(enforceable(schema, "schema")))
        whole = await run(subject.engine, job)
        assert [*mismatches(json.loads(text_of(whole)), schema, schema)] == []
        for cut in range(2, len(whole), 5):
            answer = Continuation(job)
            made = answer.take(whole[:cut])
            assert answer.can_continue(subject.info.controls)
            if answer.ended() is None:
                made += await run(subject.engine, answer.rest())
            assert [*mismatches(json.loads(text_of(made)), schema, schema)] == []

    async def test_what_it_knows_of_its_model(self, running: Running) -> None:
        assert (running.info.format, running.info.context, running.info.slots) == ("v3", 512, 4)
        assert running.info.bos == "<｜begin▁of▁sentence｜>"
        assert running.info.controls["<｜User｜>"] == 128803
        assert running.info.can.grammar


def test_the_service_in_front_of_it(running: Running) -> None:
    """Chat by DeepSeek-V3's own format, and what operators see of the engine."""
    [state] = running.service.engines()
    assert (state["kind"], state["state"]) == ("vllm", "ready")
    assert "--max-model-len" in state["argv"]
    assert state["started"] > 0
    eventually(lambda: running.service.engines()[0]["memory"] > 10**8, timeout=60, what="its memory is known")
    with running.service.client() as client:
        body = chat("tiny-v3", "Hello", max_tokens=8)
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["content"]


async def test_a_wrong_launch_is_caught(model: Path, tmp_path: Path) -> None:
    """It is healthy, gives tokens, and they are wrong: this one scales the routed experts differently."""
    wrong = ["--hf-overrides", '{"routed_scaling_factor": 1.0}']
    settings = EngineSettings(kind="vllm", command=COMMAND, args=[*ARGS, *wrong], env=ENV, context=512)
    lifeline = Lifeline()
    process = kinds.managed(
        settings,
        model=str(model),
        endpoint=kinds.listening_place(settings, Path(tempfile.mkdtemp(prefix="vllm-")) / "v.sock"),
        log=tmp_path / "vllm.log",
        lifeline=lifeline,
    )
    process.start()
    try:
        assert await process.until("ready", "failed") == "failed"
        assert "The engine computes wrongly: answer 0 of" in process.detail
        assert "differs at token" in process.detail
    finally:
        await process.stop(grace=30.0)
        lifeline.close()


# MLA has no prefix cache on the CPU. Whatever its weights are, the blocks of this one are told.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 129280,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


async def test_what_it_tells_of_its_cache(model: Path, tmp_path: Path) -> None:
    """A prompt's blocks are known once it is answered, with their salt, and forgotten when it is cleared."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    settings = EngineSettings(
        kind="vllm",
        path=str(tmp_path),
        replicas=2,
        command=COMMAND,
        args=["--dtype", "float32", "--enforce-eager", "--load-format", "dummy"],
        env={**ENV, "VLLM_SERVER_DEV_MODE": "1"},
        context=512,
    )
    socket = Path(tempfile.mkdtemp(prefix="vllm-")) / "v.sock"
    source = kinds.kv_source(ModelSettings(name="m", engines=[settings]), settings, socket)
    assert source is not None
    lifeline = Lifeline()
    endpoint = kinds.listening_place(settings, socket)
    process = kinds.managed(
        settings,
        model=str(tmp_path),
        endpoint=endpoint,
        log=tmp_path / "vllm.log",
        lifeline=lifeline,
        kv=source,
    )
    process.start()
    index, heard = PrefixIndex(), asyncio.Event()
    told: list[KVEvent] = []

    def tell(events: Sequence[KVEvent]) -> None:
        told.extend(events)
        for event in events:
            index.apply(0, event)
        heard.set()

    def held(ids: list[int], salt: bytes = b"") -> int:
        return index.held(0, chain(ids, salt=salt))

    async def until(ids: list[int], tokens: int, salt: bytes = b"") -> None:
        while held(ids, salt) != tokens:
            heard.clear()
            await asyncio.wait_for(heard.wait(), 60)

    reader = KVReader(source, tell, lambda: told.append(Cleared()))
    reading = asyncio.ensure_future(reader.run())
    http = Upstream(endpoint, read_timeout=60.0)
    # Whole blocks, whether these have 16 tokens or, as by default on the CPU, 128; and a few tokens more.
    first, second = [*range(1000, 1260)], [*range(1000, 1128), *range(2000, 2132)]
    try:
        assert await process.until("ready", "failed") == "ready", process.detail
        engine = kinds.connect(settings, endpoint, process.info)
        for ids, salt in ((first, ""), (second, ""), (first, "a tenant")):
            await run(engine, Job(ids, 4, GREEDY, cache_salt=salt))
            await until(ids, 256, salt.encode())
        again = await run(engine, Job(first, 4, GREEDY))
        assert again[-1].cached_tokens == 256
        assert held(first) == held(second) == held(first, b"a tenant") == 256
        assert held(first, b"another") == 0
        assert (await http.fetch("POST", "/reset_prefix_cache", b"{}"))[0] == 200
        await run(engine, Job(second, 4, GREEDY))  # it is told with the next step that the engine makes
        await until(first, 128)
        await until(second, 256)
        assert held(first, b"a tenant") == 0
        assert told.count(Cleared()) == 2  # one at the start
        assert reader.dropped == 0
        await engine.close()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await http.close()
        await process.stop(grace=30.0)
        lifeline.close()
