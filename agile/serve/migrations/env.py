"""Run by Alembic; `agile.serve.database.migrate` gives it the connection."""

from __future__ import annotations

from alembic import context

from agile.serve.models import Base

with_connection = context.config.attributes["connection"]
context.configure(connection=with_connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
