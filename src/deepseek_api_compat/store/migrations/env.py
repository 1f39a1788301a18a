"""Alembic runs this file. The caller, `migrations.upgrade`, owns the connection and its transaction."""

from alembic import context

from deepseek_api_compat.store.sql import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
