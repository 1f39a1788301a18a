"""Shared by all tests. That this file is here also puts `tests/` on the path: `from fakes.x import ...`."""

from __future__ import annotations

import asyncio
import compileall
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

# A shell that starts the tests in the background has SIGINT ignored, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says little beside another process. The rest is as hypothesis has it, for CI too.
settings.register_profile(
    "tests", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Compile our code once: tests start it in a thousand processes.

    Each would do that for itself where PYTHONDONTWRITEBYTECODE is set, which takes half a second.
    """
    if not hasattr(config, "workerinput"):  # one of pytest-xdist's processes finds it done
        compileall.compile_dir(Path(__file__).parents[1] / "src", quiet=2)


@pytest.hookimpl(optionalhook=True)  # older versions of pytest-asyncio run everything under asyncio's loop
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A module with `BOTH_LOOPS = True` runs its tests under asyncio's loop and under uvloop."""
    if getattr(item.getparent(pytest.Module).obj, "BOTH_LOOPS", False):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
