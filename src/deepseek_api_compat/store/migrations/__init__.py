"""Alembic migrations of the store. A new one goes into `versions/`, and its id into `store.sql.HEAD`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from deepseek_api_compat.errors import SetupError


def upgrade(connection: sa.Connection) -> None:
    """Bring the schema to the newest revision, within the transaction that `connection` is in."""
    try:
        command.upgrade(config(connection), "head")
    except CommandError as error:
        database = connection.engine.url.database
        raise SetupError(f"The database {database} is of a newer version of this program: {error}.") from None


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration, without an ini file."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
