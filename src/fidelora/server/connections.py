"""Limits of connections: their number, and the time in which a request must arrive."""

from __future__ import annotations

import asyncio
import resource
import time
from contextlib import suppress

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 20.0
"""Seconds from the opening of a connection, or the first byte of a further request, to the end of
the request's header."""
BODY_TIMEOUT_S = 60.0
"""Maximum pause between two parts of a request's body, in seconds."""
MAX_CONNECTIONS = 4096
_OTHER_FILES = 256
"""File handles reserved for everything except connections: database, images, workers, ..."""
_MAX_FILES = 65_536  # the limit of open files is not raised further

log = structlog.get_logger(__name__)


def connection_limit() -> int:
    """Raise the process's limit of open files, and return the maximum number of connections.

    Without this maximum, connections could use all file handles, and everything else in the
    process would fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    usable = most if soft == resource.RLIM_INFINITY else soft
    return max(16, min(MAX_CONNECTIONS, usable - _OTHER_FILES))


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with further limits.

    uvicorn itself limits only the pause between two requests of a connection.

    Attributes:
        max_connections: connections over this number are closed at once.
    """

    max_connections = MAX_CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None
    _reported_s = -1e9
    """Time of the last log line about closed connections, so that a flood cannot fill the log."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or close it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._report("too many connections, closing new ones", limit=self.max_connections)
            self.connections.discard(self)
            transport.abort()
            return
        self._wait(HEADER_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Handle bytes of a request, and set the time until which more bytes must arrive."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._deadline is None:  # later bytes of the same header do not extend the time
                self._wait(HEADER_TIMEOUT_S)
        elif self.cycle.more_body:
            self._stop_waiting()
            self._wait(BODY_TIMEOUT_S)
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Start uvicorn's timer for the next request."""
        self._stop_waiting()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of the closed connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.flow.read_paused:  # the application is slow, not the client
            self._wait(BODY_TIMEOUT_S)
            return
        self._report("connection closed: the request did not arrive completely in time")
        self.transport.close()

    def _report(self, event: str, **fields: object) -> None:
        now = time.monotonic()
        if now - LimitedProtocol._reported_s > HEADER_TIMEOUT_S:
            LimitedProtocol._reported_s = now
            log.warning(event, **fields)
