"""Tables with the state of the clients of all servers that share a database."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping

import sqlalchemy as sa

from fidelora.jobs.api_keys import ApiKey, ApiKeys, name_taken, name_unknown
from fidelora.jobs.client_state import MAX_SESSIONS, SESSION_S, ClientState
from fidelora.jobs.notifications import CLIENTS
from fidelora.jobs.rows import FINAL_STATUSES, JOBS
from fidelora.jobs.transactions import Database

MAX_AGE_S = 2.0
"""Seconds for which a server reuses keys and sessions after it has read them. It reads them again
at once when a notification arrives, so this limit matters only if a notification is lost."""
_API_KEYS = sa.table(
    "api_keys",
    sa.column("sha256", sa.String),
    sa.column("name", sa.String),
    sa.column("is_admin", sa.Boolean),
    sa.column("created_at_s", sa.Float),
)
_SESSIONS = sa.table(
    "sessions",
    sa.column("token_sha256", sa.String),
    sa.column("key_sha256", sa.String),
    sa.column("ends_at_s", sa.Float),
)
_A1111_MODELS = sa.table(
    "a1111_models", sa.column("owner", sa.String), sa.column("model", sa.String)
)
_A1111_JOBS = sa.table("a1111_jobs", sa.column("job_id", sa.String), sa.column("owner", sa.String))


def database_state(database: Database) -> ClientState:
    """Return the state of the clients of all servers with this database."""
    return ClientState(
        DatabaseKeys(database, max_age_s=MAX_AGE_S),
        DatabaseSessions(database),
        DatabaseA1111State(database),
    )


class _Freshness:
    """Decides whether keys and sessions that were read before are still up to date.

    Args:
        max_age_s: seconds for which a value is up to date if no notification arrives; 0 to read
            every value again.
    """

    def __init__(self, database: Database, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._last = object()
        if max_age_s:
            database.notifications.on_clients_changed(self.invalidate)

    def invalidate(self) -> None:
        """Make `is_current` false for all values that were read before."""
        self._last = object()

    def stamp(self) -> tuple[object, float]:
        """Return a stamp to store with a value; call this before the value is read."""
        return self._last, time.monotonic()

    def is_current(self, stamp: tuple[object, float]) -> bool:
        """True if a value with this stamp can still be used."""
        last, at = stamp
        return last is self._last and time.monotonic() - at < self._max_age_s


class DatabaseKeys(ApiKeys):
    """The API keys of all servers that share a database.

    Args:
        max_age_s: seconds for which the keys are used after they were read, unless a notification
            comes earlier; 0 to read them at each call.
    """

    def __init__(self, database: Database, *, max_age_s: float = 0.0) -> None:
        self._database = database
        self._freshness = _Freshness(database, max_age_s)
        self._lock = threading.Lock()
        no_keys: Mapping[str, ApiKey] = {}
        self._read = (no_keys, (object(), 0.0))  # a stamp that is never current

    def set_admin(self, name: str, is_admin: bool) -> None:
        update = sa.update(_API_KEYS).where(_API_KEYS.c.name == name).values(is_admin=is_admin)
        with self._database.writing() as connection:
            if connection.execute(update).rowcount != 1:
                raise name_unknown(name)
            self._database.notifications.send(connection, CLIENTS)
        self._freshness.invalidate()

    def remove(self, name: str) -> None:
        query = sa.select(_API_KEYS).where(_API_KEYS.c.name == name)
        with self._database.writing() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                raise name_unknown(name)
            key = ApiKey(row.name, row.sha256, row.is_admin)
            connection.execute(sa.delete(_API_KEYS).where(_API_KEYS.c.sha256 == key.sha256))
            connection.execute(sa.delete(_SESSIONS).where(_SESSIONS.c.key_sha256 == key.sha256))
            connection.execute(sa.delete(_A1111_MODELS).where(_A1111_MODELS.c.owner == key.id))
            self._database.notifications.send(connection, CLIENTS)
        self._freshness.invalidate()

    def by_hash(self) -> Mapping[str, ApiKey]:
        if (keys := self.in_memory()) is not None:
            return keys
        with self._lock:  # one thread reads, and the others wait for its result
            if (keys := self.in_memory()) is not None:
                return keys
            stamp = self._freshness.stamp()
            with self._database.reading() as connection:
                rows = connection.execute(sa.select(_API_KEYS)).all()
            keys = {row.sha256: ApiKey(row.name, row.sha256, row.is_admin) for row in rows}
            self._read = (keys, stamp)
            return keys

    def in_memory(self) -> Mapping[str, ApiKey] | None:
        keys, stamp = self._read
        return keys if self._freshness.is_current(stamp) else None

    def _insert(self, keys: Collection[ApiKey]) -> None:
        with self._database.writing() as connection:
            for key in keys:
                row = {
                    "sha256": key.sha256,
                    "name": key.name,
                    "is_admin": key.is_admin,
                    "created_at_s": sa.select(self._database.now_s).scalar_subquery(),
                }
                insert = sa.insert(_API_KEYS).values(row)
                try:
                    connection.execute(insert, self._database.now(None))
                except sa.exc.IntegrityError as error:
                    raise name_taken(key.name) from error  # rolls back the keys before it
            self._database.notifications.send(connection, CLIENTS)
        self._freshness.invalidate()


class DatabaseSessions:
    """Sessions that are valid at all servers that share a database. Implements `Sessions`."""

    is_local = False

    def __init__(self, database: Database) -> None:
        self._database = database
        self._freshness = _Freshness(database, MAX_AGE_S)
        self._lock = threading.Lock()
        # hash of the cookie -> (hash of the key, stamp of the read)
        self._known: OrderedDict[str, tuple[str, tuple[object, float]]] = OrderedDict()

    def start(self, token_sha256: str, key_sha256: str) -> None:
        now_s = sa.select(self._database.now_s).scalar_subquery()
        row = {
            "token_sha256": token_sha256,
            "key_sha256": key_sha256,
            "ends_at_s": now_s + SESSION_S,
        }
        newest = sa.select(_SESSIONS.c.token_sha256).order_by(_SESSIONS.c.ends_at_s.desc())
        surplus = newest.offset(MAX_SESSIONS)
        is_over = _SESSIONS.c.ends_at_s <= now_s
        removal = sa.delete(_SESSIONS).where(sa.or_(is_over, _SESSIONS.c.token_sha256.in_(surplus)))
        given = self._database.now(None)
        with self._database.writing() as connection:
            connection.execute(sa.insert(_SESSIONS).values(row), given)
            connection.execute(removal, given)

    def key_of(self, token_sha256: str) -> str | None:
        with self._lock:
            known, stamp = self._known.get(token_sha256, (None, (object(), 0.0)))
        if known is not None and self._freshness.is_current(stamp):
            return known
        stamp = self._freshness.stamp()
        query = sa.select(_SESSIONS.c.key_sha256).where(
            _SESSIONS.c.token_sha256 == token_sha256, _SESSIONS.c.ends_at_s > self._database.now_s
        )
        with self._database.reading() as connection:
            found = connection.execute(query, self._database.now(None)).scalar()
        with self._lock:
            self._known.pop(token_sha256, None)
            if found is not None:
                self._known[token_sha256] = (found, stamp)
                if len(self._known) > MAX_SESSIONS:
                    self._known.popitem(last=False)
        return found

    def end(self, token_sha256: str) -> None:
        with self._database.writing() as connection:
            connection.execute(sa.delete(_SESSIONS).where(_SESSIONS.c.token_sha256 == token_sha256))
            self._database.notifications.send(connection, CLIENTS)
        self._freshness.invalidate()


class DatabaseA1111State:
    """State of AUTOMATIC1111's API that servers with one database share. Implements `A1111State`.

    If a server ends while a client waits, the job stays registered until it has ended, so that
    another server can report its progress and interrupt it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def model(self, owner: str) -> str | None:
        query = sa.select(_A1111_MODELS.c.model).where(_A1111_MODELS.c.owner == owner)
        with self._database.reading() as connection:
            found: str | None = connection.execute(query).scalar()
        return found

    def set_model(self, owner: str, model: str) -> None:
        row = {"owner": owner, "model": model}
        insert = self._database.insert(_A1111_MODELS).values(row)
        with self._database.writing() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["owner"], set_=row))

    def begin(self, job_id: str, owner: str) -> None:
        unfinished = sa.exists().where(
            JOBS.c.id == _A1111_JOBS.c.job_id, JOBS.c.status.not_in(FINAL_STATUSES)
        )
        with self._database.writing() as connection:
            # Rows of servers that ended while a client waited.
            connection.execute(sa.delete(_A1111_JOBS).where(sa.not_(unfinished)))
            connection.execute(sa.insert(_A1111_JOBS).values(job_id=job_id, owner=owner))

    def end(self, job_id: str) -> None:
        with self._database.writing() as connection:
            connection.execute(sa.delete(_A1111_JOBS).where(_A1111_JOBS.c.job_id == job_id))

    def jobs(self, owner: str) -> list[str]:
        query = (
            sa.select(_A1111_JOBS.c.job_id)
            .join(JOBS, JOBS.c.id == _A1111_JOBS.c.job_id)
            .where(_A1111_JOBS.c.owner == owner, JOBS.c.status.not_in(FINAL_STATUSES))
            .order_by(JOBS.c.seq)
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())
