"""Reviews, what is known of an answer for them, and which sessions read which entries of memory."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "v0002"
down_revision = "v0001"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("questions", sa.Column("advised", sa.Boolean(), nullable=True))
    op.add_column("questions", sa.Column("confidence", sa.Double(), nullable=True))
    op.create_table(
        "reviews",
        sa.Column("id", NUMBER, nullable=False),
        sa.Column("question", NUMBER, nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("explanation", sa.Text(), nullable=False),
        sa.Column("sampled", sa.Boolean(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["question"], ["questions.number"]),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key"),
    )
    op.create_index(op.f("ix_reviews_question"), "reviews", ["question"], unique=False)
    op.create_table(
        "memory_reads",
        sa.Column("entry_id", NUMBER, nullable=False),
        sa.Column("question", NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["entry_id"], ["memory.id"]),
        sa.ForeignKeyConstraint(["question"], ["questions.number"]),
        sa.PrimaryKeyConstraint("entry_id", "question"),
    )
    _read_sessions()


def _read_sessions() -> None:
    """What sessions of before say; how probable their answers were only the codec of their agent could tell."""
    connection = op.get_bind()
    known = set(connection.execute(sa.text("SELECT id FROM memory")).scalars())
    numbers = connection.execute(sa.text("SELECT number FROM questions WHERE session IS NOT NULL")).scalars().all()
    for number in numbers:
        one = {"number": number}
        kept = connection.execute(sa.text("SELECT session FROM questions WHERE number = :number"), one).scalar_one()
        session = json.loads(kept)
        advised = session["advice"] is not None and session["advice"]["status"] == "answered"
        connection.execute(
            sa.text("UPDATE questions SET advised = :advised WHERE number = :number"), {**one, "advised": advised}
        )
        for entry in sorted({int(i) for i, _ in session["retrieved"]} & known):
            connection.execute(
                sa.text("INSERT INTO memory_reads (entry_id, question) VALUES (:entry, :number)"),
                {**one, "entry": entry},
            )


def downgrade() -> None:
    op.drop_table("memory_reads")
    op.drop_index(op.f("ix_reviews_question"), table_name="reviews")
    op.drop_table("reviews")
    op.drop_column("questions", "confidence")
    op.drop_column("questions", "advised")
