"""Addresses at which answers are told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0005"
down_revision = "v0004"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", NUMBER, nullable=False),
        sa.Column("question", NUMBER, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("late", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["question"], ["questions.number"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_webhooks_question"), "webhooks", ["question"], unique=False)
    op.create_index(op.f("ix_webhooks_state"), "webhooks", ["state"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_webhooks_state"), table_name="webhooks")
    op.drop_index(op.f("ix_webhooks_question"), table_name="webhooks")
    op.drop_table("webhooks")
