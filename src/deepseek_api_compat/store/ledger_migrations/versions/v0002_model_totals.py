"""What was used of each model in all, for budgets of models; begun with the sums by hour that are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "price")


def upgrade() -> None:
    counts = [sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMS]
    op.create_table("model_totals", sa.Column("model", sa.Text, primary_key=True), *counts)
    sums = ", ".join(f"SUM({name})" for name in _SUMS)
    op.execute(f"INSERT INTO model_totals SELECT model, {sums} FROM usage GROUP BY model")  # noqa: S608


def downgrade() -> None:
    op.drop_table("model_totals")
