"""Alembic runs this file. The caller, `migrations.upgrade`, owns the connection and its transaction."""

from alembic import context

from deepseek_api_compat.store.ledger_tables import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=SCHEMA.version_table,  # of its own: keys and ledger may share one PostgreSQL database
)
context.run_migrations()
