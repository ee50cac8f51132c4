"""Limits of connections: their number, and the time for a request and for reading a response."""

from __future__ import annotations

import asyncio
import resource
import time
from contextlib import suppress

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEADER_TIMEOUT_S = 20.0
"""Seconds from the opening of a connection, or the first byte of a further request, to the end of
the request's header."""
BODY_TIMEOUT_S = 60.0
"""Longest pause between two parts of a request's body, in seconds. `MIN_BYTES_PER_S` applies to a
body only after this time."""
WRITE_TIMEOUT_S = 60.0
"""Seconds after which the connection of a client that does not read the response is closed."""
MIN_BYTES_PER_S = 500
"""Minimum speed of a body, after its first `BODY_TIMEOUT_S`, and of reading a response. Without it,
connections that transfer one byte per minute would stay open for days."""
READ_BYTES = 64 * 2**10
"""Largest part of a request that is parsed before other connections have their turn. 64 KiB of
chunks with one byte each take 0.3 s. Smaller parts would make uploads slower."""
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
    _write_deadline: asyncio.TimerHandle | None = None
    _body_of: RequestResponseCycle | None = None
    _body_ends = 0.0
    """Deadline for the body of the request `_body_of`; received bytes extend it."""
    _reported_s = -1e9
    """Time of the last log line about closed connections, so that a flood cannot fill the log."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or close it if there are too many."""
        super().connection_made(transport)
        # asyncio's own limit of one read is 256 KiB; its documentation has no setting for it.
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        # Call `pause_writing` for any unread byte; the default is to call it from 64 KiB on.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.max_connections:
            self._report("too many connections, closing new ones", limit=self.max_connections)
            self.connections.discard(self)
            transport.abort()
            return
        self._wait(HEADER_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Handle bytes of a request, and set the time until which more bytes must arrive."""
        super().data_received(data)
        if self.cycle is not None and _has_two_lengths(self.cycle):
            self.cycle.keep_alive = False
        if self.cycle is None or self.cycle.response_complete:
            if self._deadline is None:  # later bytes of the same header do not extend the time
                self._wait(HEADER_TIMEOUT_S)
        elif self.cycle.more_body:
            self._stop_waiting()
            self._wait_for_body(len(data))
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Start uvicorn's timer for the next request."""
        self._stop_waiting()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start a timer that closes the connection unless its client continues to read."""
        super().pause_writing()
        self._wait_for_client(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stop the timer: the client has read the response, or the system has buffered it."""
        self._stop_waiting_for_client()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers of the closed connection."""
        self._stop_waiting()
        self._stop_waiting_for_client()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(seconds, self._give_up)

    def _wait_for_body(self, received: int) -> None:
        now = self.loop.time()
        if self._body_of is not self.cycle:
            self._body_of, self._body_ends = self.cycle, now + BODY_TIMEOUT_S
        self._body_ends += received / MIN_BYTES_PER_S
        self._wait(min(BODY_TIMEOUT_S, self._body_ends - now))

    def _wait_for_client(self, unsent: int) -> None:
        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if unsent - left >= WRITE_TIMEOUT_S * MIN_BYTES_PER_S:
                self._wait_for_client(left)
            else:
                self._report("connection closed: the client did not read the response in time")
                self.transport.abort()

        self._write_deadline = self.loop.call_later(WRITE_TIMEOUT_S, check)

    def _stop_waiting_for_client(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.flow.read_paused:  # the application is slow, not the client
            self._body_ends = max(self._body_ends, self.loop.time() + BODY_TIMEOUT_S)
            self._wait(BODY_TIMEOUT_S)
            return
        self._report("connection closed: the request did not arrive completely in time")
        self.transport.close()

    def _report(self, event: str, **fields: object) -> None:
        now = time.monotonic()
        if now - LimitedProtocol._reported_s > HEADER_TIMEOUT_S:
            LimitedProtocol._reported_s = now
            log.warning(event, **fields)


def _has_two_lengths(request: RequestResponseCycle) -> bool:
    """True if a request has both `Transfer-Encoding` and `Content-Length`.

    A proxy may have used the other one, so bytes after the body could be a request that the proxy
    did not see. RFC 9112, section 6.1, requires to close the connection after the response.
    """
    names = {name for name, _ in request.scope["headers"]}
    return {b"transfer-encoding", b"content-length"} <= names
