"""The engine's program: how it shares out the context, and how it refuses."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from deepseek_api_compat.engines import llamacpp_server
from deepseek_api_compat.engines.llamacpp_server import default_context


@pytest.mark.parametrize(
    ("trained", "slots", "context"),
    [(8192, 8, 4096), (8192, 4, 8192), (163840, 1, 8192), (2048, 1, 2048), (8192, 64, 2048), (None, 2, 8192)],
)
def test_default_context(trained: int | None, slots: int, context: int) -> None:
    assert default_context(trained, slots) == context


def test_cores_are_those_we_may_use() -> None:
    assert 1 <= llamacpp_server.cores() <= len(os.sched_getaffinity(0))


async def test_unreadable_model_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"hello")
    for path, reason in ((model, "GGUF"), (tmp_path / "none.gguf", "No such file")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server"),
            *(f"--model={path}", f"--socket={tmp_path}/e.sock"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await process.communicate()
        assert process.returncode == 2
        assert stderr.count(b"\n") == 1
        assert reason in stderr.decode()
