"""Hugging Face and ModelScope, as far as downloads need them, on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit


class FakeHub:
    """Hugging Face (with its redirect to a storage host) and ModelScope at one address.

    cuts: how many answers to break off, each after `cut_after` bytes. hang: stop there instead, and set
    `hanging`. status: answer everything with it. ranges: False ignores Range. requests: (path, headers).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}  # instead of the true content
        self.claim: dict[str, int] = {}  # sizes that listings give, instead of the true ones
        self.cuts, self.cut_after, self.hang, self.ranges, self.status = 0, 0, False, True, 0
        self.hanging, self.let_go = threading.Event(), threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.let_go.set()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def ranges_asked(self) -> list[str]:
        return [headers["range"] for _, headers in self.requests if "range" in headers]

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        self.requests.append((http.path, {key.lower(): value for key, value in http.headers.items()}))
        if self.status:
            self._send(http, self.status, b"no")
        elif url.path.startswith("/api/models/"):
            self._tree(http, "cursor" in url.query)
        elif url.path.endswith("/repo/files"):
            self._send(http, 200, json.dumps({"Code": 200, "Data": {"Files": self._modelscope()}}).encode())
        elif url.path.startswith("/api/v1/models/"):
            self._file(http, parse_qs(url.query)["FilePath"][0])
        elif match := re.fullmatch(r"/[^/]+/[^/]+/resolve/main/(.+)", url.path):
            self._redirect(http, unquote(match[1]))
        else:
            self._file(http, unquote(url.path).removeprefix("/storage/"))

    def _tree(self, http: BaseHTTPRequestHandler, second: bool) -> None:
        """Two pages: the first file, then the others."""
        items = [
            {
                "type": "file",
                "path": path,
                "size": self.claim.get(path, len(data)),
                "lfs": {"oid": sha256(data)},
            }
            for path, data in self.files.items()
        ]
        page = items[1:] if second else [{"type": "directory", "path": "sub", "size": 0}, *items[:1]]
        link = {} if second else {"link": f'<{self.url}{http.path}&cursor=2>; rel="next"'}
        self._send(http, 200, json.dumps(page).encode(), link)

    def _modelscope(self) -> list[dict[str, object]]:
        files = [
            {"Path": path, "Type": "blob", "Size": len(data), "Sha256": sha256(data)}
            for path, data in self.files.items()
        ]
        return [{"Path": "sub", "Type": "tree", "Size": 0}, *files]

    def _redirect(self, http: BaseHTTPRequestHandler, path: str) -> None:
        if path not in self.files:
            self._send(http, 404, b"Entry not found")
            return
        linked = {
            "location": f"{self.url}/storage/{quote(path)}",
            "x-linked-etag": f'"{sha256(self.files[path])}"',
        }
        self._send(http, 302, b"", linked)

    def _file(self, http: BaseHTTPRequestHandler, path: str) -> None:
        data = self.served.get(path, self.files.get(path))
        if data is None:
            self._send(http, 404, b"not found")
            return
        asked = http.headers.get("range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start >= len(data) and start:
            self._send(http, 416, b"")
            return
        cut = self.cuts > 0 or self.hang
        self.cuts -= 1
        http.send_response(206 if start else 200)
        http.send_header("content-length", str(len(data) - start))
        http.end_headers()
        http.wfile.write(data[start : start + self.cut_after] if cut else data[start:])
        if self.hang:
            http.wfile.flush()
            self.hanging.set()
            self.let_go.wait(10)
        http.close_connection = cut

    def _send(
        self, http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        http.send_response(status)
        for key, value in {**(headers or {}), "content-length": str(len(body))}.items():
            http.send_header(key, value)
        http.end_headers()
        http.wfile.write(body)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
