"""Ends connections to PostgreSQL that do not answer.

PostgreSQL itself enforces `lock_timeout` and its other limits. If its machine, its disk or the
network hangs, a call would wait for hours, because libpq has no timeout for responses.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

import sqlalchemy as sa

log = logging.getLogger(__name__)

MAX_TRANSACTION_S = 30.0
"""Seconds after which a transaction ends with an error. Each statement of a transaction can wait 10
seconds for a lock, and the longest transaction, the removal of old jobs, takes about 5 seconds."""
_CHECK_S = 1.0  # seconds between two checks


class ConnectionWatchdog:
    """Closes the sockets of connections that have been in use for `MAX_TRANSACTION_S` seconds.

    The thread that waits for an answer then gets an `OperationalError`, and the pool opens another
    connection for the next transaction. The watchdog's own thread starts with the first connection.

    Args:
        engine: engine for PostgreSQL with psycopg.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._in_use: dict[Any, float] = {}  # time of the checkout by driver connection
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # Before other listeners, because one of them sends a query.
        sa.event.listen(engine, "checkout", self._on_checkout, insert=True)
        sa.event.listen(engine, "checkin", self._on_end)
        sa.event.listen(engine, "detach", self._on_end)
        sa.event.listen(engine, "invalidate", lambda connection, *_: self._on_end(connection, None))

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * _CHECK_S)

    def _on_checkout(self, connection: Any, _record: Any, _proxy: Any) -> None:
        with self._lock:
            self._in_use[connection] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="watches-connections", daemon=True
                )
                self._thread.start()

    def _on_end(self, connection: Any, _record: Any) -> None:
        with self._lock:
            self._in_use.pop(connection, None)

    def _run(self) -> None:
        while not self._closed.wait(min(_CHECK_S, MAX_TRANSACTION_S)):
            oldest = time.monotonic() - MAX_TRANSACTION_S
            # The lock keeps a connection from being returned to the pool meanwhile.
            with self._lock:
                for connection in [one for one, since in self._in_use.items() if since < oldest]:
                    del self._in_use[connection]
                    _shut_down(connection)


def _shut_down(connection: Any) -> None:
    try:
        duplicate = socket.socket(fileno=os.dup(connection.fileno()))
    except Exception:  # noqa: BLE001  # psycopg's error: the connection is closed already
        return
    log.warning("a connection to the job database did not answer and is closed")
    try:
        duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side has closed it
    finally:
        duplicate.close()
