"""Notifications of PostgreSQL (LISTEN and NOTIFY), received on a thread."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa

from fidelora.jobs.database import database_errors

log = logging.getLogger(__name__)

CHANNEL = "fidelora_jobs"
_NEW_JOB = "job"  # payload: a job entered the queue; a colon and names of workers can follow
CLIENTS = "clients"  # payload: an API key was changed, or a session was ended
CANCEL = "cancel:"  # payload: this text, and the id of a running job that has to stop
_SEPARATOR = "\n"  # between names of workers
_POLL_S = 1.0  # seconds between two checks whether the listener was closed
_RECONNECT_S = 2.0  # seconds between two attempts to connect
_MAX_PAYLOAD = 7_000  # bytes; PostgreSQL's limit is 8,000
_MAX_CANCELLATIONS = 1000  # ids of canceled jobs to keep; far more than a process has workers


_NOTIFY = sa.select(sa.func.pg_notify(sa.bindparam("channel"), sa.bindparam("payload")))


class Notifications:
    """Sends notifications, and receives those of all processes.

    The thread that receives them starts with the first call that needs it. SQLite has no
    notifications; with it, new jobs wake only the workers of this process.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._is_local = engine.dialect.name == "sqlite"
        self._listener: Listener | None = None
        self._listener_lock = threading.Lock()
        self._cancellations: OrderedDict[str, None] = OrderedDict()
        self._wakes: list[Callable[[Collection[str] | None], None]] = []
        self._on_clients_changed: list[Callable[[], None]] = []

    def send(self, connection: sa.Connection, payload: str) -> None:
        """Send a notification when the transaction of this connection is committed."""
        if not self._is_local:
            connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": payload})

    def send_new_job(self, connection: sa.Connection, workers: Sequence[str] = ()) -> None:
        """Wake workers when the transaction of this connection is committed.

        Args:
            workers: names of the workers to wake; empty for all.
        """
        payload = f"{_NEW_JOB}:{_SEPARATOR.join(workers)}"
        is_short = len(payload.encode()) <= _MAX_PAYLOAD
        self.send(connection, payload if workers and is_short else _NEW_JOB)

    def on_new_job(self, wake: Callable[[Collection[str] | None], None]) -> None:
        """Call a function whenever a job enters the queue, as `JobStore.on_new_job` describes."""
        self._wakes.append(wake)
        if not self._is_local:
            self._listen()

    def on_clients_changed(self, call: Callable[[], None]) -> None:
        """Call a function when a process changes an API key or ends a session; not on SQLite."""
        self._on_clients_changed.append(call)
        if not self._is_local:
            self._listen()

    def wake_if_local(self) -> None:
        """Wake the workers of this process, if the database sends no notifications."""
        if self._is_local:
            self._wake(None)

    def cancel_requested(self, job_id: str) -> bool:
        """True if a notification asked to cancel this job."""
        self._listen()
        return job_id in self._cancellations

    def close(self) -> None:
        """Stop receiving notifications."""
        with self._listener_lock:
            if self._listener is not None:
                self._listener.close()

    def _listen(self) -> None:
        """Start receiving notifications, unless already started."""
        with self._listener_lock:
            if self._listener is None:
                self._listener = Listener(self._engine, self._on_notification)

    def _on_notification(self, payload: str) -> None:
        if payload.startswith(CANCEL):
            self._cancellations[payload.removeprefix(CANCEL)] = None
            if len(self._cancellations) > _MAX_CANCELLATIONS:
                self._cancellations.popitem(last=False)
        elif payload == _NEW_JOB:
            self._wake(None)
        elif payload.startswith(f"{_NEW_JOB}:"):
            self._wake(payload.removeprefix(f"{_NEW_JOB}:").split(_SEPARATOR))
        elif payload == CLIENTS:
            for call in self._on_clients_changed:
                call()

    def _wake(self, workers: Collection[str] | None) -> None:
        for wake in self._wakes:
            wake(workers)


class Listener:
    """Calls a function with the payload of each notification, on a thread of its own.

    Notifications that are sent while the connection is lost are missed, and some connection
    poolers drop all of them. So callers also have to poll.

    Args:
        on_payload: function to call; must return quickly and must not raise.
    """

    def __init__(self, engine: sa.Engine, on_payload: Callable[[str], None]) -> None:
        self._engine = engine
        self._on_payload = on_payload
        self._closed = threading.Event()
        self.listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listens", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(2 * _POLL_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001  # the thread must survive lost connections
                self.listening.clear()
                log.warning("no notifications from the job database, reconnecting: %s", error)
                self._closed.wait(_RECONNECT_S)

    def _listen(self) -> None:
        with database_errors():
            pooled = self._engine.raw_connection()
        connection = pooled.driver_connection
        assert connection is not None
        pooled.detach()
        try:
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            self.listening.set()
            while not self._closed.is_set():
                for received in connection.notifies(timeout=_POLL_S, stop_after=100):
                    self._on_payload(received.payload)
        finally:
            connection.close()
