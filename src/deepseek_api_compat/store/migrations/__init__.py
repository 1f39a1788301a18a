"""Alembic migrations of the store. A new one goes into `versions/`, and its id into `store.sql.HEAD`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from deepseek_api_compat.errors import SetupError

HERE = Path(__file__).parent


def upgrade(connection: sa.Connection, location: Path = HERE) -> None:
    """Bring the schema to the newest revision, within the transaction that `connection` is in.

    `location` is the directory of another schema's migrations.
    """
    try:
        command.upgrade(config(connection, location), "head")
    except CommandError as error:
        database = connection.engine.url.database
        raise SetupError(f"The database {database} is of a newer version of this program: {error}.") from None


def config(connection: sa.Connection | None = None, location: Path = HERE) -> Config:
    """Alembic's configuration, without an ini file."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    return config
