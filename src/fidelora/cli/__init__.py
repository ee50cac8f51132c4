"""Command line `fidelora`; each command has its own module."""

from __future__ import annotations

import typer

import fidelora
from fidelora.cli import (
    cluster,
    convert,
    demo,
    download,
    explain,
    generate,
    grid,
    info,
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
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fidelora {fidelora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "-V", "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


_PICTURES = "Pictures"
_TRAINING = "Training runs and LoRAs"
_MODELS = "Base models and this machine"
_SERVER = "Server"

app.command("generate", rich_help_panel=_PICTURES)(generate.generate)
app.command("replay", rich_help_panel=_PICTURES)(replay.replay)
app.command("demo", rich_help_panel=_PICTURES)(demo.demo)
app.command("verify", rich_help_panel=_TRAINING)(verify.verify)
app.command("explain", rich_help_panel=_TRAINING)(explain.explain)
app.command("grid", rich_help_panel=_TRAINING)(grid.grid)
app.command("inspect", rich_help_panel=_TRAINING)(inspect.inspect)
app.command("convert", rich_help_panel=_TRAINING)(convert.convert)
app.command("recipe", rich_help_panel=_TRAINING)(recipe.recipe)
app.command("models", rich_help_panel=_MODELS)(models.list_models)
app.command("download", rich_help_panel=_MODELS)(download.download)
app.command("info", rich_help_panel=_MODELS)(info.info)
app.command("serve", rich_help_panel=_SERVER)(serve.serve)
app.command("worker", rich_help_panel=_SERVER)(cluster.worker)
app.command("workers", rich_help_panel=_SERVER)(cluster.workers)
app.add_typer(serve.keys, name="keys", rich_help_panel=_SERVER)
app.add_typer(cluster.db, name="db", rich_help_panel=_SERVER)


def main() -> None:
    """Run the command line and exit; `console.run` lists the exit codes."""
    run(app)


__all__ = ["app", "main"]
