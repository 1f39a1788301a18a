"""Alembic migrations of the ledger. A new one goes into `versions/`, its id into `ledger_tables.SCHEMA`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from deepseek_api_compat.store import migrations

HERE = Path(__file__).parent


def upgrade(connection: sa.Connection) -> None:
    """Bring the schema to the newest revision, within the transaction that `connection` is in."""
    migrations.upgrade(connection, HERE)
