"""`fidelora serve` and `fidelora keys`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import Debug, fail

if TYPE_CHECKING:
    from fidelora.server.api_keys import ApiKeys

keys = typer.Typer(
    help="API keys of the server: made here, shown once, kept as hashes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_INSTALL = "The server needs more packages; install them with: pip install 'fidelora[server]'"


def serve(
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            "--base-model",
            "--base",
            metavar="[MODEL=]PLACE",
            help="What a model means, sd15 if none is named: hub id, diffusers folder or .safetensors checkpoint; repeatable.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; by default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; by default 8000, 0 takes a free one.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps; several with commas.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve the HTTP API. Everything else is set in the environment or in `.env`."""
    try:
        from fidelora.server.run import serve as run
        from fidelora.settings import read_settings
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    run(
        read_settings(
            base_model=",".join(base_model) if base_model else None,
            host=host,
            port=port,
            device=device,
            debug=debug or None,
        )
    )


@keys.command("add")
def add(name: Annotated[str, typer.Argument(help="Whom or what the key is for.")]) -> None:
    """Make a key, and print it. It cannot be seen again."""
    typer.echo(_keys().add(name))


@keys.command("list")
def list_keys() -> None:
    """Whom keys were made for."""
    for name in _keys().names():
        typer.echo(name)


@keys.command("remove")
def remove(name: Annotated[str, typer.Argument(help="Whose key.")]) -> None:
    """Let a key open nothing any more, at once."""
    _keys().remove(name)


def _keys() -> ApiKeys:
    try:
        from fidelora.server.api_keys import ApiKeys
        from fidelora.server.app import keys_file
        from fidelora.settings import read_settings
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    return ApiKeys(keys_file(read_settings()))
