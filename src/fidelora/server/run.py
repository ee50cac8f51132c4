"""The server process: start, signals and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import uvicorn
from filelock import FileLock, Timeout

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import ServerFailedError, SettingsError
from fidelora.server.app import make_app, make_context
from fidelora.server.connections import LimitedProtocol, connection_limit
from fidelora.server.context import ServerContext
from fidelora.server.defaults import server_defaults_of
from fidelora.server.key_store import check_keys
from fidelora.server.logs import configure_logs, is_text
from fidelora.server.page.mount import Page
from fidelora.server.stop_signals import STOP_SIGNALS, ignore_stop_signals
from fidelora.settings import Settings

log = structlog.get_logger(__name__)

_CONNECTION_GRACE_S = 5
"""Seconds that open connections have to finish after the workers have stopped."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    After the signal, the server rejects new requests. Running requests finish within the grace
    period or return to the queue.

    Raises:
        FideloraError: the server cannot start with these settings on this machine.
    """
    configure_logs(settings.log_format, settings.debug)
    check_keys(settings)
    data_dir = settings.data_dir.expanduser().absolute()
    make_folder(data_dir)
    with _lock_data_dir(data_dir), _listen(settings) as listener:
        host, port = (
            f"[{settings.host}]" if ":" in settings.host else settings.host,
            listener.getsockname()[1],
        )
        base_url = settings.base_url.rstrip("/") or f"http://{host}:{port}"
        context = make_context(
            settings, server_defaults_of(settings), base_url, _server_id(data_dir)
        )
        for model in settings.base_models:  # takes seconds for files that were never hashed
            log.info("base model", model=model, sha256=context.base_models.sha256(model))
        asyncio.run(_serve(context, listener, f"http://{host}:{port}"))
        ignore_stop_signals()
        log.info("stopped")


async def _serve(context: ServerContext, listener: socket.socket, url: str) -> None:
    stop_requested = asyncio.Event()

    def request_stop() -> None:
        if stop_requested.is_set() and context.pool is not None:  # a second signal: do not wait
            context.pool.skip_grace_period()
        stop_requested.set()

    # Before the application is made, which takes seconds: asyncio's own handler of SIGINT would
    # cancel the server in the middle of its startup.
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, request_stop)
    app = make_app(context, with_page=True)
    LimitedProtocol.max_connections = connection_limit()
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        log_config=None,
        access_log=False,
        # There are no WebSockets. If a package for them is installed, uvicorn would let connections
        # change to a protocol without limits.
        ws="none",
        timeout_graceful_shutdown=_CONNECTION_GRACE_S,
        # The access control needs the address of the connection, not one that a header claims.
        proxy_headers=False,
    )
    started = asyncio.Event()

    def announce() -> None:
        _announce(context, url)
        started.set()

    server = _UvicornServer(config, announce)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(stop_requested.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if stop_requested.is_set():
        # Wait for a startup in progress, because it starts the workers that are stopped here.
        starting = asyncio.create_task(started.wait())
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        log.info("stopping", grace_s=context.settings.stop_grace_s)
        context.stopping.set()
        if context.pool is not None:  # the API still serves status and results meanwhile
            await asyncio.to_thread(context.pool.stop, context.settings.stop_grace_s)
        if isinstance(page := getattr(app.state, "page", None), Page):
            await page.close()  # its open streams would delay the shutdown
        server.should_exit = True
    waiting.cancel()
    await serving
    if context.failed.is_set():
        raise ServerFailedError
    if not stop_requested.is_set():
        raise SettingsError(
            "The server could not start or ended unexpectedly; see the log for the reason."
        )


def _announce(context: ServerContext, url: str) -> None:
    """Log that the server accepts connections; on a terminal, print its address on its own line."""
    data_dir = str(context.settings.data_dir.expanduser().absolute())
    log.info("listening", url=url, base_url=context.base_url, data=data_dir)
    if is_text(context.settings.log_format):
        sys.stderr.write(f"{context.base_url}\n")


class _UvicornServer(uvicorn.Server):
    """Uvicorn's server, which leaves signals to `_serve`.

    Args:
        on_start: called when the server accepts connections.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `_serve`, which stops the workers before it closes connections."""
        yield


@contextlib.contextmanager
def _lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Lock a data folder while the context is open, so that only one server uses it.

    The operating system releases the lock when the process ends, even if it is killed.
    """
    lock = FileLock(data_dir / "server.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise SettingsError(
            f"Another server uses the data folder {data_dir}; stop it, or set FIDELORA_DATA_DIR."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # IPPROTO_TCP is required: without it, asyncio does not disable Nagle's algorithm, which delays
    # every response by 40 ms (it waits for an acknowledgement).
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                f"The server cannot listen on {settings.host}, port {settings.port}: "
                f"{error.strerror or error}; choose another --host or --port."
            ) from error
        yield listener


def _server_id(data_dir: Path) -> str:
    """Return the server's id, which is stored in the data folder and survives restarts."""
    file = data_dir / "server_id"
    if not file.is_file():
        write_atomically(file, uuid.uuid4().hex[:12].encode())
    return file.read_text()
