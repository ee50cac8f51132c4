"""Alembic's entry point: run the migrations in the transaction of the store's connection."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
