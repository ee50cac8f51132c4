"""The command line: `fidelora`, one file per command."""

from __future__ import annotations

import typer

import fidelora
from fidelora.cli import demo, generate, grid, inspect, models, recipe, replay, serve, verify
from fidelora.cli.console import run

app = typer.Typer(
    name="fidelora",
    help="Images from Stable Diffusion LoRAs, the same to the bit as the previews that AI Toolkit painted in training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fidelora {fidelora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    pass


app.command("generate")(generate.generate)
app.command("models")(models.list_models)
app.command("demo")(demo.demo)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("recipe")(recipe.recipe)
app.command("replay")(replay.replay)
app.command("grid")(grid.grid)
app.command("serve")(serve.serve)
app.add_typer(serve.keys, name="keys")


def main() -> None:
    """Run the command line and leave with its exit code: 0 done, 1 failure, 2 wrong use."""
    run(app)


__all__ = ["app", "main"]
