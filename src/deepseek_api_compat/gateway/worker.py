"""One gateway process: `python -m deepseek_api_compat.gateway.worker`, started by the supervisor only.

It inherits the listening socket, a channel to the supervisor, the shared memory and the wake pipes.
It dies when the supervisor does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Callable

import uvicorn
import uvloop

from deepseek_api_compat.config import ServerSettings
from deepseek_api_compat.engines.lifeline import die_with_parent
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.gateway import channel, logs
from deepseek_api_compat.gateway.app import Application, shared_cells
from deepseek_api_compat.gateway.http import HttpProtocol, sweep
from deepseek_api_compat.gateway.idempotency import Repeats
from deepseek_api_compat.gateway.metrics import WORKER_TASKS
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.security.certificates import LiveContext, published_place
from deepseek_api_compat.security.keys import KeyTable

TASKS_COUNTED = 2.0  # seconds between two counts


class Server(uvicorn.Server):
    """uvicorn's server, which says when it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


async def renew(certificate: LiveContext) -> None:
    try:
        await asyncio.to_thread(certificate.renew)
    except SetupError as error:  # the supervisor has checked it: it must have been removed since
        logging.getLogger("deepseek_api").error("TLS: %s The certificate in use stays.", error)


async def count_tasks(worker: int) -> None:
    """Tell how many tasks there are, for as long as the worker lives."""
    gauge = WORKER_TASKS.labels(str(worker))
    while True:
        gauge.set(len(asyncio.all_tasks()))
        await asyncio.sleep(TASKS_COUNTED)


def server_config(gate: object, server: ServerSettings, certificate: LiveContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        gate,  # type: ignore[arg-type]
        http=HttpProtocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # the peer address is never what a header says
        server_header=False,
        timeout_keep_alive=int(server.keep_alive_timeout),
        timeout_graceful_shutdown=math.ceil(server.drain_timeout),
        ssl_context_factory=(lambda _config, _default: certificate.context) if certificate else None,
    )


async def serve(args: argparse.Namespace) -> None:
    reader, writer = await asyncio.open_connection(
        sock=socket.socket(fileno=args.channel), limit=channel.LIMIT
    )
    incoming = channel.messages(reader)
    hello = await incoming.__anext__()
    assert isinstance(hello, channel.Hello)
    settings = hello.settings
    logs.configure(settings.log, f"worker {hello.worker}", sys.stderr)
    logs.log_task_exceptions(asyncio.get_running_loop())
    master = bytes.fromhex(hello.master)
    questions = channel.Questions(lambda message: writer.write(channel.encode(message)))
    application = Application(
        settings,
        KeyTable(hello.keys, master, hello.version),
        SharedMemory(args.memory, shared_cells(settings)),
        worker=hello.worker,
        wake_fds=[int(fd) for fd in args.wake_fds.split(",")],
        my_fd=args.my_fd,
        created=hello.started,
        ask=questions.ask,
        repeats=Repeats(questions.begin, questions.end),
        on_doubt=lambda pool, replica, hung: writer.write(channel.encode(channel.Doubt(pool, replica, hung))),
    )
    application.use_engines(hello.engines)
    application.start()
    certificate = LiveContext(published_place(settings.data_dir)) if settings.server.tls_cert else None
    server = Server(
        server_config(application.gate, settings.server, certificate),
        on_started=lambda: writer.write(channel.encode(channel.Started())),
    )

    async def listen() -> None:
        async for message in incoming:
            if isinstance(message, channel.Keys):
                application.use_keys(KeyTable(message.keys, master, message.version))
                writer.write(channel.encode(channel.Acknowledged(message.version)))
            elif isinstance(message, channel.Answer):
                questions.answered(message)
            elif isinstance(message, channel.Engines):
                application.use_engines(message.engines)
            elif isinstance(message, channel.Intake):
                application.books.intake = message.state
            elif isinstance(message, channel.Certificate) and certificate is not None:
                await renew(certificate)
            elif isinstance(message, channel.Drain):
                server.should_exit = True

    listening = asyncio.create_task(listen())
    # Without the channel nobody owns this process: the lifeline ends it, and so does a broken channel.
    listening.add_done_callback(lambda task: None if task.cancelled() else os._exit(1))
    tasks = [
        listening,
        asyncio.create_task(application.pulse.run()),
        asyncio.create_task(application.journal.run()),
        asyncio.create_task(count_tasks(hello.worker)),
        asyncio.create_task(sweep(server.server_state.connections, settings.server)),
    ]
    # What was built so far lives as long as the process: keep the garbage collector off it.
    gc.collect()
    gc.freeze()
    try:
        await server.serve(sockets=[socket.socket(fileno=args.listen)])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await application.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--channel", "--listen", "--memory", "--lifeline", "--my-fd"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--wake-fds", required=True)
    args = parser.parse_args()
    die_with_parent(args.lifeline)
    logs.log_every_exception()
    uvloop.run(serve(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
