"""Transactions of a database that several threads and processes use at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fidelora.errors import JobStoreError
from fidelora.jobs.connection_watchdog import ConnectionWatchdog
from fidelora.jobs.database import BUSY_TIMEOUT_S, database_errors, open_database
from fidelora.jobs.notifications import Notifications


class Database:
    """An open database whose tables have been created or migrated.

    Args:
        url: address of the database, such as `sqlite:////var/lib/fidelora/jobs.sqlite` or
            `postgresql://user:password@host/fidelora`.

    Attributes:
        dialect: `sqlite` or `postgresql`.
        now_s: expression for the current time in seconds; a statement that contains it needs the
            parameters that `now` returns.
        notifications: notifications of other processes.

    Raises:
        JobStoreError: the database cannot be opened, or was written by a newer version.
    """

    def __init__(self, url: str) -> None:
        self.engine = open_database(url)
        self.dialect = self.engine.dialect.name
        self.is_sqlite = self.dialect == "sqlite"
        self.now_s = clock(self.dialect)
        self.notifications = Notifications(self.engine)
        self._write_lock = threading.Lock() if self.is_sqlite else None
        # Created after the migration, which may wait for another process for a long time.
        self._watchdog = None if self.is_sqlite else ConnectionWatchdog(self.engine)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that writes, and commit it at the end of the block."""
        # SQLite allows one writer at a time and makes others sleep with a growing backoff. Threads
        # of this process wait for a lock instead, which is faster and fairer.
        with database_errors(), self._write_turn(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Open a transaction that only reads."""
        with (
            database_errors(),
            self.engine.connect().execution_options(fidelora_reads=True) as connection,
        ):
            yield connection

    def insert(self, table: sa.TableClause) -> Any:
        """Return an INSERT that supports ON CONFLICT."""
        return (sqlite.insert if self.is_sqlite else postgresql.insert)(table)

    def now(self, now: datetime | None) -> dict[str, Any]:
        """Return the parameter `now_s`, which is None for the clock of PostgreSQL."""
        if now is None and self.is_sqlite:
            return {"now_s": time.time()}
        return {"now_s": now and now.timestamp()}

    def close(self) -> None:
        """Close all connections."""
        self.notifications.close()
        if self._watchdog is not None:
            self._watchdog.close()
        self.engine.dispose()

    @contextmanager
    def _write_turn(self) -> Iterator[None]:
        if self._write_lock is None:
            yield
            return
        if not self._write_lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise JobStoreError(
                "The job database cannot be used at the moment: it is locked by another write."
            )
        try:
            yield
        finally:
            self._write_lock.release()


def clock(dialect: str) -> sa.ColumnElement[float]:
    """Return the SQL expression for the current time in seconds.

    It is the statement's parameter `now_s`. On PostgreSQL, the parameter may be None for the time
    of the database's clock.
    """
    given = sa.bindparam("now_s", type_=sa.Float)
    if dialect == "sqlite":
        return given
    time_s: sa.ColumnElement[float] = sa.literal_column(
        "extract(epoch FROM clock_timestamp())::float8"
    )
    return sa.func.coalesce(sa.cast(given, sa.Float), time_s)
