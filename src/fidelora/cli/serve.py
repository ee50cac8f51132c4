"""`fidelora serve` and `fidelora keys`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import fail, make_engine, warn
from fidelora.cli.options import OPTION_OF_SETTING, Debug
from fidelora.errors import SettingsError

if TYPE_CHECKING:
    from fidelora.jobs.api_keys import ApiKeys

_LOCAL_PANEL = "Engine for the commands of this user"
keys = typer.Typer(
    help="Manage the API keys of the server, which stores only their hashes.",
    no_args_is_help=True,
)

_INSTALL = (
    "The server needs more packages; install them in the folder of Fidelora's repository with: "
    "pip install '.[server]'"
)
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="PostgreSQL job database; all its servers share the keys. By default "
        "FIDELORA_STORE_URL.",
    ),
]


def serve(
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            "--base-model",
            "--base",
            metavar="[MODEL=]BASE",
            help="Base model of a model family (default sd15): hub id, diffusers folder or "
            ".safetensors checkpoint.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; by default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; by default 8000, 0 for a free port.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Devices, separated by commas: auto, cpu, cuda, cuda:N or mps; none for a server "
            "without workers."
        ),
    ] = None,
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="Keep an engine in memory for `fidelora generate`, `replay` and `grid` of this "
            "user instead of serving HTTP.",
            rich_help_panel=_LOCAL_PANEL,
        ),
    ] = False,
    offload: Annotated[
        str,
        typer.Option(
            help="With --local: offload mode, as for `fidelora generate`.",
            rich_help_panel=_LOCAL_PANEL,
        ),
    ] = "none",
    idle: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="With --local: end after this time without a command; by default never.",
            rich_help_panel=_LOCAL_PANEL,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Start the server with the HTTP API and the web page.

    All other settings are environment variables, which can also be set in `.env`.
    """
    if local:
        if base_model or host is not None or port is not None:
            raise typer.BadParameter(
                "--local cannot be combined with --base-model, --host or --port. Leave them out: "
                "each command names its own base model.",
                param_hint="--local",
            )
        _serve_locally(device or "auto", offload, idle)
        return
    if idle is not None or offload != "none":
        raise typer.BadParameter(
            "It requires --local. For a server, set OFFLOAD_MODE instead of --offload.",
            param_hint="--idle or --offload",
        )
    try:
        from fidelora.server.run import serve as run
        from fidelora.settings import read_settings, setting_warnings
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    for sentence in setting_warnings():
        warn(sentence)
    run(
        read_settings(
            OPTION_OF_SETTING,
            base_model=",".join(base_model) if base_model else None,
            host=host,
            port=port,
            device=device,
            debug=debug or None,
        )
    )


def _serve_locally(device: str, offload: str, idle_min: float | None) -> None:
    """Keep an engine until SIGTERM, Ctrl-C, or `idle_min` minutes without a command."""
    from fidelora.resident.address import socket_path

    path = socket_path(device, offload)
    engine = make_engine(device, offload)
    from fidelora.resident.serve import ResidentServer

    # Paths in recipes may be relative to the folder of a command. Leave the current folder, so that
    # they are not found here by accident.
    os.chdir(Path(path.anchor))
    server = ResidentServer(engine, path, None if idle_min is None else 60 * idle_min)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _signal, _frame: stop.set())
    typer.echo(f"The engine is ready on {engine.device}; commands with the same --device use it.")
    sys.stdout.flush()
    server.serve(stop.is_set)
    # If another thread is making an image, torch's clean-up at exit would abort the process.
    os._exit(0)


@keys.command("add")
def add(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the key, such as a user name.")
    ],
    admin: Annotated[
        bool,
        typer.Option("--admin", help="Give access to the requests and uploads of all keys."),
    ] = False,
    store: Store = None,
) -> None:
    """Create a key and print it. It cannot be shown again.

    A key has access to its own requests and uploads only, unless it is an admin key.
    """
    with _opened_keys(store) as opened:
        typer.echo(opened.add(name, is_admin=admin))


@keys.command("import")
def import_keys(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, help="`api_keys.json` of a server."
        ),
    ],
    store: Store = None,
) -> None:
    """Add the keys in the file of another server, and print their names. The keys stay valid.

    Keys that exist already are skipped.
    """
    with _opened_keys(store) as opened:
        from fidelora.jobs.api_keys import FileKeys

        for name in opened.add_existing(FileKeys(file).all()):
            typer.echo(name)


@keys.command("admin")
def change_admin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")],
    off: Annotated[bool, typer.Option("--off", help="Make an admin key an ordinary one.")] = False,
    store: Store = None,
) -> None:
    """Give an existing key access to the requests and uploads of all keys."""
    with _opened_keys(store) as opened:
        opened.set_admin(name, not off)


@keys.command("list")
def list_keys(
    ids: Annotated[
        bool, typer.Option("--ids", help="Also show the ids, which name the folders of uploads.")
    ] = False,
    store: Store = None,
) -> None:
    """List the names of all keys; admin keys are marked."""
    with _opened_keys(store) as opened:
        for key in opened.all():
            first = f"{key.id}  " if ids else ""
            typer.echo(f"{first}{key.name}{' (admin)' if key.is_admin else ''}")


@keys.command("remove")
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")],
    store: Store = None,
) -> None:
    """Revoke a key immediately. A server without keys accepts only calls from its own machine.

    If the servers share a database, a server that has lost its connection for notifications accepts
    the key for up to two more seconds.
    """
    with _opened_keys(store) as opened:
        opened.remove(name)
        is_last = not opened.names()
    if is_last:
        typer.echo(
            "This was the last key. Until you add another one, the server accepts only calls from "
            "its own machine.",
            err=True,
        )


@contextmanager
def _opened_keys(store: str | None) -> Iterator[ApiKeys]:
    try:
        from fidelora.server.key_store import opened_keys
        from fidelora.settings import read_settings
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    settings = read_settings(OPTION_OF_SETTING, store_url=store)
    if store and not settings.can_share_database:
        raise SettingsError(
            "--store is for keys in PostgreSQL. The keys of a server with an SQLite database are "
            "in its data folder; omit --store, and set FIDELORA_DATA_DIR for another folder."
        )
    with opened_keys(settings) as opened:
        yield opened
