"""Command line `fidelora`; each command has its own module."""

from __future__ import annotations

import typer

import fidelora
from fidelora.cli import (
    convert,
    demo,
    generate,
    grid,
    inspect,
    models,
    recipe,
    replay,
    serve,
    verify,
)
from fidelora.cli.console import run

app = typer.Typer(
    name="fidelora",
    help="Generate images with LoRAs trained by AI Toolkit, identical to the trainer's samples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fidelora {fidelora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


app.command("generate")(generate.generate)
app.command("models")(models.list_models)
app.command("demo")(demo.demo)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("recipe")(recipe.recipe)
app.command("replay")(replay.replay)
app.command("grid")(grid.grid)
app.command("serve")(serve.serve)
app.add_typer(serve.keys, name="keys")


def main() -> None:
    """Run the command line and exit: 0 for success, 1 for a failure, 2 for wrong use."""
    run(app)


__all__ = ["app", "main"]
