"""An audit log of what is done to keys, which can only be added to."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

REFUSAL = "the audit log can only be added to"
SQLITE = """
CREATE TRIGGER audit_no_{event} BEFORE {event} ON audit
BEGIN SELECT RAISE(ABORT, '{refusal}'); END
"""
POSTGRESQL = (
    """
CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION '{refusal}'; END $$
""",
    """
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()
""",
)


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor_kind", sa.String(16), nullable=False),
        sa.Column("actor_id", sa.String(100), nullable=False),
        sa.Column("request_id", sa.String(100)),
        sa.Column("op", sa.String(100), nullable=False),
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("key_name", sa.String(100), nullable=False),
        sa.Column("changes", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    for statement in _append_only(op.get_bind().dialect.name):
        op.execute(statement.format(refusal=REFUSAL))


def downgrade() -> None:
    op.drop_table("audit")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_refuse()")


def _append_only(dialect: str) -> tuple[str, ...]:
    if dialect == "sqlite":
        return tuple(SQLITE.replace("{event}", event) for event in ("update", "delete"))
    return POSTGRESQL if dialect == "postgresql" else ()
