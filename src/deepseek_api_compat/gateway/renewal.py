"""Renewing the certificate of a running service: the supervisor's side."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress

from deepseek_api_compat.config import Settings
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.security.certificates import (
    CertificateFiles,
    development_certificate,
    development_names,
    development_place,
    published_place,
)

POLL = 1.0  # seconds between two looks at the files
DEVELOPMENT_CHECK = 3600.0  # seconds between two looks at how long a development certificate is still good
logger = logging.getLogger("deepseek_api")


class Renewal:
    """Publishes the certificate at the start, whenever its files have changed, and when asked to.

    Failure policy: at the start, files that can't be used raise SetupError; later they are logged once, and
    the certificate in use stays.
    """

    def __init__(self, settings: Settings, tell_workers: Callable[[], None]) -> None:
        server = settings.server
        assert server.tls_cert is not None
        assert server.tls_key is not None
        self._settings = settings
        self._tell_workers = tell_workers
        self._published = published_place(settings.data_dir)
        self._files = CertificateFiles(server.tls_cert, server.tls_key, self._published)
        self._asked = False
        self._next_check = time.monotonic() + DEVELOPMENT_CHECK
        self._on_terminal = os.isatty(0)

    def publish(self) -> None:
        """For the start. Raises SetupError."""
        self._files.publish()

    def hang_up(self) -> bool:
        """SIGHUP has come: renew within a second. False if it came because the terminal was closed."""
        if self._on_terminal and not os.isatty(0):
            return False
        self._asked = True
        return True

    async def run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), POLL)
            try:
                fingerprint = await asyncio.to_thread(self._renew)
            except SetupError as error:
                logger.error("TLS: %s The certificate in use stays.", error)
                continue
            if fingerprint is not None:
                logger.info("TLS: new connections are shown the certificate with SHA-256 %s", fingerprint)
                self._tell_workers()
        self._published.unlink(missing_ok=True)  # it has the private key in it

    def _renew(self) -> str | None:
        """The fingerprint of what was published, if anything was."""
        if self._settings.server.tls_dev and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + DEVELOPMENT_CHECK
            names = development_names(self._settings.server)
            development_certificate(development_place(self._settings.data_dir), names)
        if not self._files.changed() and not self._asked:
            return None
        self._asked = False
        return self._files.publish()
