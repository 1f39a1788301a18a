"""The control socket: how commands reach the service that runs on a data directory.

A Unix stream socket of mode 0600, one JSON object per line each way, in order:

    {"op": "keys.create", "name": "alice", "role": "user", "limits": {"rps": 5}}
    {"ok": true, "result": {...}}    or    {"ok": false, "error": "One sentence."}

Operations: `keys.*` (see security.admin.KeyAdmin); `engines.list` and `metrics`, which have no parameters.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from pathlib import Path
from typing import Any

import msgspec

from deepseek_api_compat.errors import SetupError

SOCKET_NAME = "control.sock"
MAX_PATH = 100  # bytes; sockaddr_un holds 108 on Linux, 104 on macOS
MAX_LINE = 1 << 20  # bytes of a request; a reply has no limit
REPLY_TIMEOUT = 30.0  # seconds


class NotRunning(SetupError):
    """No service listens on this data directory."""


def control_socket_path(data_dir: Path) -> Path:
    """Where the service on `data_dir` listens, the same for every process and environment. Raises SetupError.

    A path too long for a socket address is replaced by one in `/tmp/deepseek-api-<uid>`, which is made if
    missing and refused unless it belongs to the data directory's owner alone.
    """
    path = data_dir / SOCKET_NAME
    if len(os.fsencode(path)) <= MAX_PATH:
        return path
    owner = data_dir.stat().st_uid if data_dir.exists() else os.getuid()
    directory = Path(f"/tmp/deepseek-api-{owner}")  # noqa: S108 - ownership and mode are checked below
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise SetupError(f"Can't make {directory} for the control socket: {error.strerror}.") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & 0o077:
        raise SetupError(f"{directory} must be a directory that only the user {owner} can enter; remove it.")
    return directory / f"{hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:32]}.sock"


def call(data_dir: Path, op: str, *, timeout: float | None = REPLY_TIMEOUT, **params: Any) -> Any:
    """The result of `op` by the service on `data_dir`, which has `timeout` seconds for it (None: any time).

    Raises NotRunning before anything was sent, or SetupError with the service's sentence.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        _connect(connection, data_dir)
        try:
            connection.sendall(msgspec.json.encode({"op": op, **params}) + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except TimeoutError:
            raise SetupError(f"The service on {data_dir} gave no answer in {timeout:.0f} s.") from None
        except OSError:
            line = b""
    if not line.endswith(b"\n"):
        raise SetupError(f"The service on {data_dir} stopped before it answered.")
    reply = msgspec.json.decode(line)
    if not reply["ok"]:
        raise SetupError(reply["error"])
    return reply["result"]


def decode_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Operation and parameters of a request line. Raises SetupError."""
    try:
        request = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise SetupError(f"The request is not a JSON object: {error}.") from None
    op = request.pop("op", None)
    if not isinstance(op, str):
        raise SetupError("The request names no op.")
    return op, request


def encode_result(result: Any) -> bytes:
    """The line that answers a request."""
    return msgspec.json.encode({"ok": True, "result": result}) + b"\n"


def encode_error(error: SetupError) -> bytes:
    """The line that refuses a request."""
    return msgspec.json.encode({"ok": False, "error": str(error)}) + b"\n"


def _connect(connection: socket.socket, data_dir: Path) -> None:
    path = control_socket_path(data_dir)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):  # refused: its owner was killed
        raise NotRunning(f"No service runs on {data_dir}.") from None
    except OSError as error:
        raise SetupError(f"Can't reach the service through {path}: {error.strerror or error}.") from None
