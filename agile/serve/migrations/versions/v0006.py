"""Several experts who must agree, and what is known of a single question."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0006"
down_revision = "v0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "opinions",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("explanation", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("request_id", "user_id"),
    )
    op.add_column("requests", sa.Column("agree", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("questions", sa.Column("context", sa.Text(), nullable=False, server_default="{}"))


def downgrade() -> None:
    op.drop_column("questions", "context")
    op.drop_column("requests", "agree")
    op.drop_table("opinions")
