"""A scripted server that runs beside a test which has no event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from fakes.http_server import HttpServer, Script


class Running:
    """The script's server, up when the constructor returns, until `close`. `port` is where it listens."""

    def __init__(self, script: Script) -> None:
        self._server = HttpServer(script)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._do(self._server.__aenter__())
        self.port = self._server.endpoint.port

    def close(self) -> None:
        """Cut all connections and listen no more; harmless when repeated."""
        if not self._loop.is_closed():
            self._do(self._server.__aexit__())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)
