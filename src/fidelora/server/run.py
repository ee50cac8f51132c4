"""A server as a process: from its settings to its end by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from filelock import FileLock, Timeout

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import DeviceError, SettingsError
from fidelora.families import all_families, get_family
from fidelora.server.api_keys import ApiKeys
from fidelora.server.app import keys_file, make_app, make_context
from fidelora.server.context import ServerContext
from fidelora.server.logs import configure_logs
from fidelora.server.middleware import is_loopback
from fidelora.server.page.mount import Page
from fidelora.settings import Settings

log = structlog.get_logger(__name__)

_LAST_ANSWERS_S = 5


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C: no new requests then, running ones finish within the grace or go back into the queue.

    Raises:
        FideloraError: the settings cannot be used on this machine.
    """
    configure_logs(settings.log_format, settings.debug)
    if not is_loopback(settings.host) and not ApiKeys(keys_file(settings)).names():
        raise SettingsError(
            f"Others could reach {settings.host}, and there is no API key that they would need; make one with "
            "`fidelora keys add NAME`, or listen on 127.0.0.1."
        )
    data_dir = settings.data_dir.expanduser().absolute()
    make_folder(data_dir)
    with _only_server(data_dir), _listen(settings) as listener:
        host, port = (
            f"[{settings.host}]" if ":" in settings.host else settings.host,
            listener.getsockname()[1],
        )
        base_url = settings.base_url.rstrip("/") or f"http://{host}:{port}"
        context = make_context(settings, _server_defaults(settings), base_url, _server_id(data_dir))
        log.info("listening", url=f"http://{host}:{port}", base_url=base_url, data=str(data_dir))
        asyncio.run(_serve(context, listener))
        log.info("stopped")


async def _serve(context: ServerContext, listener: socket.socket) -> None:
    app = make_app(context, with_page=True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=_LAST_ANSWERS_S
    )
    server = _Server(config)
    told = asyncio.Event()

    def tell() -> None:
        if told.is_set() and context.pool is not None:  # whoever asks twice does not want to wait
            context.pool.hurry()
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, tell)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if told.is_set():
        log.info("stopping", grace_s=context.settings.stop_grace_s)
        context.stopping.set()
        if context.pool is not None:  # status and results are still answered meanwhile
            await asyncio.to_thread(context.pool.stop, context.settings.stop_grace_s)
        if isinstance(page := getattr(app.state, "page", None), Page):
            await page.close()  # or those who look at it would be waited for
        server.should_exit = True
    waiting.cancel()
    await serving
    if not told.is_set():
        raise SettingsError("The server could not start, or ended by itself; its log says why.")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours are the signals: the workers have to be told before the connections are closed."""
        yield


def _server_defaults(settings: Settings) -> dict[str, dict[str, Any]]:
    """The recipe fields that this server decides, by model.

    Raises:
        DeviceError: a device is not there, or has no fast path where that is the default.
        BaseModelError: the base model is a file or folder that is not there.
    """
    from fidelora.accel.device import auto_dtype, resolve_device
    from fidelora.accel.fast_path import fast_path
    from fidelora.weights.locate import is_portable, locate

    devices = [resolve_device(name) for name in settings.devices]
    dtype = auto_dtype(devices[0]) if settings.dtype == "auto" else settings.dtype
    dtypes = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), dtype)
    default_model = next(iter(settings.base_models or all_families()))
    server_defaults: dict[str, dict[str, Any]] = {}
    for model, family in all_families().items():
        fidelity = settings.fidelity
        if fidelity == "fast":
            try:
                for device in devices:
                    fast_path(family, device, settings.offload)
            except DeviceError:
                if model == default_model:
                    raise
                fidelity = "exact"  # the family has no fast path
        server_defaults[model] = {**dtypes, "fidelity": fidelity}
    for model, place in settings.base_models.items():
        if not is_portable(place):  # a path has to be absolute, for requests outlive this folder
            place = str(locate(place, get_family(model).parts).absolute())
        server_defaults[model]["base_model"] = place
    return server_defaults


@contextlib.contextmanager
def _only_server(data_dir: Path) -> Iterator[None]:
    """One server for each data folder; the system lets go of the lock when the process ends, in whatever way."""
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
    # The protocol has to be named, or asyncio leaves Nagle's algorithm on, and every answer waits 40 ms for an acknowledgement.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                f"Nothing can listen on {settings.host}, port {settings.port}: {error.strerror or error}; give another --port."
            ) from error
        yield listener


def _server_id(data_dir: Path) -> str:
    """The name of the server that has this data folder, in each of its lives."""
    file = data_dir / "server_id"
    if not file.is_file():
        write_atomically(file, uuid.uuid4().hex[:12].encode())
    return file.read_text()
