"""Database of the job store: opening, migration, and errors. Only `jobs/` imports SQLAlchemy."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from fidelora.errors import JobStoreError

_MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 10.0
"""Longest wait for another process that writes to the same SQLite file, in seconds."""
_TEST_AFTER_IDLE_S = 5.0
"""Seconds after which an unused connection is tested before its next use. Testing it every time, as
SQLAlchemy's `pool_pre_ping` does, would add a round trip to each transaction."""
_POSTGRESQL_OPTIONS = (
    "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s -c timezone=UTC"
)
"""Options of each connection. A process that is stopped in the middle of a transaction keeps its
locks for 30 seconds at most."""
_TCP_OPTIONS = {
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
"""Options of libpq that close a connection about 25 seconds after its other side has vanished, even
if the connection only waits for notifications. Options in the URL have priority."""
MIGRATION_LOCK, ADD_LOCK = 7_305_120_001, 7_305_120_002
"""Keys of PostgreSQL's advisory locks: for migrations, and for adding a job to a limited queue."""
_migration_thread_lock = threading.Lock()  # Alembic keeps its context in global variables


def open_database(url: str) -> sa.Engine:
    """Open a database, and create or migrate its tables in one transaction.

    Several processes and threads can open the same database at the same time.

    Args:
        url: address of the database, such as `sqlite:////var/lib/fidelora/jobs.sqlite` or
            `postgresql://user:password@host/fidelora`.

    Raises:
        JobStoreError: the database cannot be opened, or was written by a newer version.
    """
    try:
        address = _address(url)
        engine = sa.create_engine(address, **_engine_options(address))
        if engine.dialect.name == "sqlite":
            _restrict_to_owner(engine)
            _configure_sqlite(engine)
        else:
            _test_idle_connections(engine)
        with engine.begin() as connection:
            _migrate(connection)
    except ModuleNotFoundError as error:
        raise JobStoreError(
            f"The job database needs the package {error.name}; install it in the folder of "
            "Fidelora's repository with: pip install '.[postgres]'."
        ) from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        shown_url = ""
        if "://" in url:
            shown_url = " " + sa.make_url(url).render_as_string(hide_password=True)
        reason = str(error).splitlines()[0]
        raise JobStoreError(f"The job database{shown_url} cannot be used: {reason}.") from error
    return engine


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise `JobStoreError` for errors of the database in the block."""
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        # A TimeoutError means that other threads of this process use all pooled connections.
        reason = str(error.orig if isinstance(error, sa.exc.DBAPIError) else error).splitlines()[0]
        raise JobStoreError(
            f"The job database cannot be used at the moment: {reason.rstrip('.')}."
        ) from error


def wal_is_safe(version: str) -> bool:
    """True if this SQLite release is free of the bug that corrupts databases on a WAL reset.

    The bug was introduced with the WAL in 3.7.0 and fixed in 3.51.3. Backports of the fix to older
    series are not recognised; with those releases, the store uses the rollback journal, which is
    slower but just as safe.
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) >= (3, 51, 3)


def database_revisions(url: str) -> tuple[str, str]:
    """Return the revision of a database's tables, and the revision that this version needs.

    The first is empty if the tables do not exist.

    Raises:
        JobStoreError: the database cannot be opened.
    """
    with database_errors():
        address = _address(url)
        engine = sa.create_engine(address, **_engine_options(address))
        try:
            with engine.connect() as connection:
                return _revision(connection), _newest_revision()
        finally:
            engine.dispose()


def _address(url: str) -> sa.URL:
    """Return a database's URL with the driver that Fidelora supports.

    Raises:
        JobStoreError: Fidelora does not support this kind of database.
    """
    address = sa.make_url(url)
    kind, _, driver = address.drivername.partition("+")
    if kind in ("postgres", "postgresql"):
        return address.set(drivername=f"postgresql+{driver or 'psycopg'}")
    if kind == "sqlite":
        return address
    raise JobStoreError(
        f"The job database {kind} is not supported. Use an SQLite file or PostgreSQL, such as "
        "postgresql://user:password@host/fidelora."
    )


def _engine_options(address: sa.URL) -> dict[str, Any]:
    if address.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    given = {name: value for name, value in _TCP_OPTIONS.items() if name not in address.query}
    # The default isolation level of a server may be stricter; claims expect this one.
    return {
        "isolation_level": "READ COMMITTED",
        "connect_args": {"options": _POSTGRESQL_OPTIONS, "connect_timeout": 10, **given},
    }


def _restrict_to_owner(engine: sa.Engine) -> None:
    """Create the database's file, or change its mode, so that only its owner can read the jobs.

    SQLite gives the same mode to the files beside it.
    """
    path = engine.url.database
    if path and path != ":memory:" and not path.startswith("file:"):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with suppress(PermissionError):  # the file of another user, who decides who may read it
            Path(path).chmod(0o600)


def _configure_sqlite(engine: sa.Engine) -> None:
    """Sync every commit to disk, and take the write lock when a writing transaction begins.

    If two transactions took the write lock only at their first write, they could deadlock.
    """
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version) else "DELETE"

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        # None disables the implicit transactions of `sqlite3`; `on_begin` begins explicit ones.
        connection.isolation_level = None
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("PRAGMA synchronous = FULL")

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        reads = connection.get_execution_options().get("fidelora_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _test_idle_connections(engine: sa.Engine) -> None:
    """Replace pooled connections that were lost while they were idle."""

    @sa.event.listens_for(engine, "checkin")
    def on_checkin(_connection: Any, record: Any) -> None:
        record.info["used_at"] = time.monotonic()

    @sa.event.listens_for(engine, "checkout")
    def on_checkout(connection: Any, record: Any, _proxy: Any) -> None:
        idle_s = time.monotonic() - record.info.get("used_at", time.monotonic())
        if idle_s < _TEST_AFTER_IDLE_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool opens another connection.
            raise sa.exc.DisconnectionError(str(error)) from error


def _migrate(connection: sa.Connection) -> None:
    """Migrate the tables and record their version, both in the caller's transaction."""
    config = _alembic_config()
    config.attributes["connection"] = connection
    try:
        with _migration_thread_lock:
            if connection.dialect.name == "postgresql":
                if _revision(connection) == _newest_revision():
                    return
                # Another process may migrate at the same time; a long wait for it is not an error.
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            command.upgrade(config, "head")
    except CommandError as error:
        raise JobStoreError(
            f"The job database was written by another version of Fidelora: {error}. "
            "Use that version, or another database."
        ) from error


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


def _revision(connection: sa.Connection) -> str:
    """Return the revision of the tables; empty if they do not exist."""
    return MigrationContext.configure(connection).get_current_revision() or ""


def _newest_revision() -> str:
    return ScriptDirectory.from_config(_alembic_config()).get_current_head() or ""
