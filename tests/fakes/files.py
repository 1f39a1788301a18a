"""A web server with one file."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Files:
    """Serves `content` at every path, except that `/to?URL` leads elsewhere. paths: what was asked."""

    def __init__(self, content: bytes, host: str = "127.0.0.1") -> None:
        paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                place, _, target = self.path.partition("?")
                self.send_response(302 if place == "/to" else 200)
                if place == "/to":
                    self.send_header("Location", target)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.paths = paths
        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
