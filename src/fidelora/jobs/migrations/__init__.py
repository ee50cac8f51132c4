"""The tables of the SQL store, version by version (Alembic)."""
