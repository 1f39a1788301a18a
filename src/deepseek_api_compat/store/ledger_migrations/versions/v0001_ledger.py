"""The ledger, what is summed up of it, and how far each journal has been taken in."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "price")


def _counts(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def upgrade() -> None:
    op.create_table(
        "ledger",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("started", sa.BigInteger, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("token_id", sa.Text),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("replica", sa.Integer),
        sa.Column("status", sa.Integer),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("finish", sa.Text),
        sa.Column("queue_ms", sa.BigInteger),
        sa.Column("ttft_ms", sa.BigInteger),
        sa.Column("total_ms", sa.BigInteger),
        *_counts(*_SUMS[1:5], "sent_tokens", "price"),
    )
    op.create_index("ledger_started", "ledger", ["started"])
    op.create_index("ledger_key_started", "ledger", ["key_id", "started"])
    op.create_index("ledger_model_started", "ledger", ["model", "started"])
    op.create_table(
        "refusals",
        sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("code", sa.Text, primary_key=True),
        sa.Column("journal", sa.Text, primary_key=True),
        *_counts("count"),
    )
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("outcome", sa.Text, primary_key=True),
        *_counts(*_SUMS),
    )
    op.create_table("totals", sa.Column("key_id", sa.Text, primary_key=True), *_counts(*_SUMS))
    op.create_table("journals", sa.Column("file", sa.Text, primary_key=True), *_counts("position"))


def downgrade() -> None:
    for table in ("journals", "totals", "usage", "refusals", "ledger"):
        op.drop_table(table)
