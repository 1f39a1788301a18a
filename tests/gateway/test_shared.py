"""Memory that processes share: how much of it there really is, and its lock."""

from __future__ import annotations

import os
import select
import signal

import pytest

from deepseek_api_compat.gateway import shared
from deepseek_api_compat.gateway.shared import SharedMemory

CELLS = 100_000_000  # 800 MB, about what eight workers need


@pytest.fixture(params=["memory", "disk"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SharedMemory:
    if request.param == "disk":
        monkeypatch.delattr(shared.os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files in memory")
    return SharedMemory.create(CELLS)


def test_only_what_was_written_to_takes_room(memory: SharedMemory):
    for cell in range(0, CELLS, CELLS // 10):
        memory.ints[cell] = 1
    assert memory.ints[CELLS - 1] == 0
    assert os.fstat(memory.fd).st_size == CELLS * 8
    assert os.fstat(memory.fd).st_blocks * 512 < 1_000_000
    memory.close()


def test_a_process_that_dies_with_the_lock_does_not_keep_it(memory: SharedMemory):
    holds, told = os.pipe()
    child = os.fork()
    if not child:
        with memory:
            memory.ints[7] = 42
            os.write(told, b"x")
            select.select([], [], [])
    assert os.read(holds, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    with memory:  # waits for ever if the dead process still had it
        assert memory.ints[7] == 42
    os.waitpid(child, 0)
    memory.close()
    os.close(holds)
    os.close(told)
