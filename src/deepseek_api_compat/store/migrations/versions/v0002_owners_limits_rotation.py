"""API keys get an owner, an expiry, scopes, more limits, a budget and rotation; the master key an id."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ADDED: dict[str, sa.types.TypeEngine[Any]] = {
    "expires": sa.BigInteger(),
    "models": sa.Text(),
    "networks": sa.Text(),
    "burst": sa.BigInteger(),
    "rpm": sa.BigInteger(),
    "tpm": sa.BigInteger(),
    "tpd": sa.BigInteger(),
    "concurrency": sa.BigInteger(),
    "budget": sa.BigInteger(),
    "old_hash": sa.LargeBinary(32),
    "old_version": sa.Integer(),
    "old_until": sa.BigInteger(),
}


def upgrade() -> None:
    op.add_column("keys", sa.Column("owner", sa.String(200), nullable=False, server_default=""))
    for name, type in ADDED.items():
        op.add_column("keys", sa.Column(name, type))
    op.create_table("master_key", sa.Column("id", sa.String(32), primary_key=True))


def downgrade() -> None:
    op.drop_table("master_key")
    for name in ("owner", *ADDED):
        op.drop_column("keys", name)
