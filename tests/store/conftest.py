import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa

from fakes import postgresql


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """See `fakes.postgresql.server`."""
    bin = postgresql.programs()
    if bin is None:
        pytest.skip("PostgreSQL is not installed: on Debian and Ubuntu, apt-get install postgresql")
    # The path of a Unix socket may have 107 characters, and pytest's own directories are for one user only.
    with TemporaryDirectory(dir="/tmp") as directory, postgresql.server(Path(directory), bin) as url:
        yield url


_numbers = itertools.count()


@pytest.fixture
def postgresql_url(postgresql_server: str) -> str:
    """A new, empty database."""
    name = f"test{next(_numbers)}"
    engine = sa.create_engine(postgresql_server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return postgresql_server.format(name=name)
