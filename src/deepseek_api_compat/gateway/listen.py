"""The sockets that the workers accept from."""

from __future__ import annotations

import errno
import socket
import sys

from deepseek_api_compat.errors import SetupError

# Only Linux shares out the connections to several sockets of one port.
_BALANCES = sys.platform == "linux"


def bind(host: str, port: int, workers: int = 1) -> list[socket.socket]:
    """A bound socket for each worker, none of which listens yet. Port 0: any free one.

    On Linux each worker gets its own, and the kernel shares out connections evenly; of one socket shared
    by all, the first worker to wake takes whole bursts. The supervisor keeps them open, so that connections
    to a worker that died wait for its successor. Raises SetupError with the reason in one sentence.
    """
    first = _bind(host, port, shared=False)
    if workers == 1 or not _BALANCES:
        return [first] * workers
    # Bound alone first: sockets that share a port would not notice another service of this user on it.
    port = first.getsockname()[1]
    first.close()
    return [_bind(host, port, shared=True) for _ in range(workers)]


def _bind(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SetupError(f"Can't use the address {host}: {error.strerror or error}.") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SetupError(_problem(error, host, port)) from None
    return listener


def _problem(error: OSError, host: str, port: int) -> str:
    if isinstance(error, PermissionError):
        return f"Ports below 1024, such as {port}, need root rights; choose another with --port."
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} is already in use; choose another with --port, or stop its owner."
    return f"Can't listen on {host} port {port}: {error.strerror}."
