"""Services that most tests share, each a real one in its own processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.chat_upstream import ChatUpstream, answering_all
from fakes.configs import ENGINE, ENVIRONMENT, IMPATIENT, PATIENT, upstream_model
from fakes.observe import watched
from fakes.service import Service
from fakes.wire import Wire

Start = Callable[..., Service]


@pytest.fixture(scope="session")
def chat_upstream() -> Iterator[ChatUpstream]:
    upstream = ChatUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module", autouse=True)
def as_new(chat_upstream: ChatUpstream) -> None:
    """No module inherits what the one before it had the upstream play."""
    chat_upstream.health = 200
    chat_upstream.play(answering_all)


@pytest.fixture
def upstream(chat_upstream: ChatUpstream) -> ChatUpstream:
    """The upstream of the relays, healthy and with nothing recorded."""
    chat_upstream.health = 200
    chat_upstream.play(answering_all)
    return chat_upstream


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts services from the text of a configuration; those still running at the end are killed."""
    services = []

    def make(config: str, *args: str, data_dir: Path | None = None) -> Service:
        folder = tmp_path_factory.mktemp("service")
        file = folder / "config.toml"
        file.write_text(config)
        service = Service(data_dir or folder / "data", "--config", str(file), *args, env=ENVIRONMENT)
        services.append(service)
        return service

    yield make
    for service in services:
        if service.process.poll() is None:
            service.kill()


@pytest.fixture(scope="session")
def relay_service(start: Start, chat_upstream: ChatUpstream) -> Service:
    capped = [upstream_model(name, chat_upstream, concurrency=2) for name in ("capped", "timed")]
    plain = [upstream_model(name, chat_upstream) for name in ("relay", "counted")]
    return start("".join([PATIENT, *plain, *capped]))


@pytest.fixture
def relay(relay_service: Service, upstream: ChatUpstream) -> Iterator[Service]:
    """One worker; the models `relay`, without a cap, and `capped`, two requests at a time.

    `counted` and `timed` are such models too, each asked by one test only.
    """
    yield from watched(relay_service)


@pytest.fixture(scope="session")
def impatient_service(start: Start, chat_upstream: ChatUpstream) -> Service:
    capped = upstream_model("capped", chat_upstream, concurrency=2)
    return start(IMPATIENT + upstream_model("relay", chat_upstream) + capped)


@pytest.fixture
def impatient(impatient_service: Service, upstream: ChatUpstream) -> Iterator[Service]:
    """As `relay`, with early keep-alives and little time for slow clients."""
    yield from watched(impatient_service)


@pytest.fixture(scope="session")
def engine_service(start: Start) -> Service:
    return start(PATIENT + ENGINE, "--workers", "2")


@pytest.fixture
def service(engine_service: Service) -> Iterator[Service]:
    """Two workers over one engine with two slots, the model `tiny`."""
    yield from watched(engine_service)


@pytest.fixture(autouse=True)
def _no_connection_left() -> Iterator[None]:
    yield
    Wire.close_all()
