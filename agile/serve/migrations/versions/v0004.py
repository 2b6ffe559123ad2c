"""What advice costs and what may be spent on it in a day, as administrators set it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0004"
down_revision = "v0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "terms",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("advice_price", sa.Double(), nullable=False),
        sa.Column("daily_budget", sa.Double(), nullable=True),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("questions", sa.Column("price", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("questions", "price")
    op.drop_table("terms")
