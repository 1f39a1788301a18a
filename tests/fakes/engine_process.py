"""An engine program that misbehaves on request; run as a child process.

It listens on a Unix socket and greets each connection with one line, "ready" unless told otherwise.
`question()` is the readiness check that goes with it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.engines.lifeline import die_with_parent
from deepseek_api_compat.errors import EngineFailed


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, __file__, f"--socket={path}", *options]


def question(path: Path) -> Callable[[], Awaitable[ModelInfo]]:
    async def ready() -> ModelInfo:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            line = await reader.readline()
        finally:
            writer.close()
        if line != b"ready\n":
            raise EngineFailed(f"it says {line!r}")
        return ModelInfo(context=1024, slots=1)

    return ready


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--say", default="ready", help="the greeting")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds before it listens")
    parser.add_argument("--crash", type=int, help="exit with this code instead of listening")
    parser.add_argument("--serve", type=int, help="exit with code 1 after this many connections")
    parser.add_argument("--chatty", type=int, default=0, help="bytes on stderr before it listens")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--child", help="start a child that ignores SIGTERM; its pid goes to this file")
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("--no-death-signal", action="store_true", help="as on systems other than Linux")
    options = parser.parse_args()
    if options.no_death_signal:
        sys.platform = "other"
    if options.lifeline is not None:
        die_with_parent(options.lifeline)
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.child:
        ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        child = subprocess.Popen([sys.executable, "-c", ignore])
        Path(options.child).write_text(str(child.pid))
    sys.stderr.write("x" * 79 + "\n" if options.chatty else "")
    for _ in range(options.chatty // 80):
        sys.stderr.write("y" * 79 + "\n")
    if options.crash is not None:
        sys.stderr.write(f"engine: no luck, pid {os.getpid()}\n")
        sys.exit(options.crash)
    time.sleep(options.slow)
    serve(options)


def serve(options: argparse.Namespace) -> None:
    Path(options.socket).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.socket)
        listener.listen()
        while options.serve != 0:
            connection, _ = listener.accept()
            connection.sendall(options.say.encode() + b"\n")
            connection.close()
            if options.serve:
                options.serve -= 1
    sys.exit(1)


if __name__ == "__main__":
    main()
