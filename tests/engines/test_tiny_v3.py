"""The tiny DeepSeek-V3, made and converted by the commands, in a real llama.cpp beside the model in numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from deepseek_api_compat.cli import main
from deepseek_api_compat.engines.llamacpp import LlamaCpp
from deepseek_api_compat.models import checkpoint, convert, tiny_v3
from deepseek_api_compat.models.deepseek_v3 import DeepSeekV3
from deepseek_api_compat.models.tiny_v3 import Greedy
from deepseek_api_compat.protocol.job import Job, Sampling
from fakes.engines import served

pytestmark = [pytest.mark.embedded, pytest.mark.slow]

TYPES = ("f32", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v3") / "tiny"
    program = "import sys; from deepseek_api_compat.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "models", "build-tiny", str(path)]
    # numpy's threads wait for each other by spinning: on a busy machine that takes ten times as long.
    subprocess.run(command, check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    return path


@pytest.fixture(scope="module", params=TYPES)
def file(folder: Path, request: pytest.FixtureRequest) -> Path:
    path = folder.with_name(f"tiny-{request.param}.gguf")
    assert main(["models", "convert", str(folder), str(path), "--type", request.param]) == 0
    return path


@pytest.fixture
async def llamacpp(file: Path) -> AsyncIterator[LlamaCpp]:
    with served(file, slots=1, context=1024) as endpoint:
        engine = LlamaCpp(endpoint)
        yield engine
        await engine.close()


async def answer(engine: LlamaCpp, prompt: list[int], count: int) -> list[int]:
    job = Job(prompt, max_tokens=count, sampling=Sampling(temperature=0.0))
    return [token async for pieces in engine.stream(job) for piece in pieces for token in piece.ids]


def test_both_files_speak_v3(folder: Path, file: Path) -> None:
    for path in (folder, file):
        found = checkpoint.read(path)
        assert (found.format, found.context) == ("v3", 163840)
    assert checkpoint.read(folder).controls == checkpoint.read(file).controls


def test_the_record_is_fit_to_judge_engines(folder: Path) -> None:
    record = tiny_v3.recorded(folder)
    assert [len(one.prompt) for one in record] == [4, 25, 151]
    for one in record:
        assert len(set(one.answer)) > 24  # no loop
        assert min(one.answer) > 2
        assert max(one.answer) < 128_000
        assert one.lead >= 0.05


async def test_llama_cpp_answers_as_recorded(folder: Path, llamacpp: LlamaCpp) -> None:
    """Token for token, from weights of all bits, with llama.cpp's own settings."""
    for one in tiny_v3.recorded(folder):
        assert await answer(llamacpp, one.prompt, len(one.answer)) == one.answer


def changed(folder: Path, record: Greedy, change: str) -> bool:
    """Does an engine that gets this part of the architecture wrong answer otherwise?"""
    model = DeepSeekV3(folder)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}."
        if change == "bias":
            model.weights[f"{prefix}mlp.gate.e_score_correction_bias"][:] = 0
        elif change == "shared expert":
            model.weights[f"{prefix}mlp.shared_experts.down_proj.weight"][:] = 0
        elif change == "one expert":
            model.weights[f"{prefix}mlp.experts.5.down_proj.weight"][:] = 0
        elif change == "rotated key":
            model.weights[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"][512:] *= np.float32(-1)
        elif change == "norm of the latent vector":
            model.weights[f"{prefix}self_attn.kv_a_layernorm.weight"][:] = 1
    steps = zip(model.greedy(record.prompt), record.answer, strict=False)
    return any(token != expected for (token, _), expected in steps)


@pytest.mark.parametrize(
    "change", ["bias", "shared expert", "one expert", "rotated key", "norm of the latent vector"]
)
def test_the_record_catches_a_wrong_engine(folder: Path, change: str) -> None:
    assert any(changed(folder, record, change) for record in tiny_v3.recorded(folder))


async def test_fp8_weights_arrive_in_llama_cpp(folder: Path, tmp_path: Path) -> None:
    quantised, file = tmp_path / "fp8", tmp_path / "fp8.gguf"
    quantised.mkdir()
    tiny_v3.write_checkpoint(quantised, folder / "tokenizer.json", quantised=True)
    convert.to_gguf(quantised, file, "f32")
    prompt = [0, 128803, 1004, 128804]
    steps = list(islice(DeepSeekV3(quantised).greedy(prompt), 16))
    assert min(lead for _, lead in steps) > 0.05
    with served(file, slots=1, context=1024) as endpoint:
        engine = LlamaCpp(endpoint)
        assert await answer(engine, prompt, len(steps)) == [token for token, _ in steps]
        await engine.close()
