"""Shared by all tests. That this file is here also puts `tests/` on the path: `from fakes.x import ...`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest
import uvloop

# A shell that starts the tests in the background has SIGINT ignored, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # older versions of pytest-asyncio run everything under asyncio's loop
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A module with `BOTH_LOOPS = True` runs its tests under asyncio's loop and under uvloop."""
    if getattr(item.getparent(pytest.Module).obj, "BOTH_LOOPS", False):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
