from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fakes import redis_server as servers


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.RedisServer]:
    if servers.BINARY is None:
        pytest.skip("Redis is not installed: on Debian and Ubuntu, apt-get install redis-server")
    # The path of a Unix socket may have 107 characters.
    with TemporaryDirectory(dir="/tmp") as folder:
        server = servers.RedisServer(Path(folder))
        yield server
        server.kill()
