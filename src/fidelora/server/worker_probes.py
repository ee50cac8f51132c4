"""HTTP server of `fidelora worker` for the probes and metrics of an orchestrator.

It returns no data of requests and needs no API key.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import structlog
from prometheus_client import CONTENT_TYPE_LATEST

from fidelora.errors import SettingsError

log = structlog.get_logger(__name__)

CONNECTION_S = 10.0  # time in which a client has to send its request and read the response
MAX_CONNECTIONS = 128  # open connections, each of which needs a thread; further ones are closed
_END_S = 5.0  # time to wait for the serving thread to end


class WorkerProbes:
    """Serves `/health`, `/ready` and `/metrics` on threads of its own.

    Args:
        host: address to listen on.
        port: port to listen on; 0 selects a free one.
        is_ready: returns True while a worker takes requests.
        metrics: returns the metrics in Prometheus' text format.

    Attributes:
        port: the port that it listens on.

    Raises:
        SettingsError: the address or port cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        is_ready: Callable[[], bool],
        metrics: Callable[[], bytes],
    ) -> None:
        handler = type("Handler", (_Handler,), {"is_ready": is_ready, "metrics": metrics})
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(
                f"Port {port} of {host} cannot be used ({error}); change FIDELORA_WORKER_PORT or "
                "HOST."
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="serves-probes", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join(_END_S)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A server with a limited number of connections, each of which is open for a limited time.

    Otherwise, connections could use all threads and file handles of the workers' process.
    """

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The timeout of a socket counts from the last byte, so a slow client would not reach it.
        end = threading.Timer(CONNECTION_S, _shut_down, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error; a client that has gone away is not one."""
        if not isinstance(sys.exception(), OSError):
            log.exception("probe not answered")


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    is_ready: ClassVar[Callable[[], bool]]
    metrics: ClassVar[Callable[[], bytes]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._answer(200, b'{"status":"healthy"}')
        elif path == "/ready":
            if type(self).is_ready():
                self._answer(200, b'{"status":"ready"}')
            else:
                self._answer(503, b'{"status":"not ready"}')
        elif path == "/metrics":
            self._answer(200, type(self).metrics(), CONTENT_TYPE_LATEST)
        else:
            self._answer(404, b'{"status":"not found"}')

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: probes call several times a minute."""

    def _answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
