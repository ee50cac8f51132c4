"""`fidelora grid`."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fidelora.atomic import write_atomically
from fidelora.cli.console import INTERRUPTED, fail, make_output_folder, progress_display, warn
from fidelora.cli.engines import image_maker
from fidelora.cli.options import Debug, Device, Fidelity, FidelityOption, RunFolder
from fidelora.cli.output_names import is_folder, unused_path
from fidelora.errors import TrainingRunError


def grid(
    run_folder: RunFolder,
    steps: Annotated[
        str,
        typer.Option(
            help="Steps of the checkpoints, separated by commas: numbers (0 for the base model), "
            "last or all."
        ),
    ] = "all",
    multipliers: Annotated[
        str, typer.Option(help="Multipliers of the LoRA, -5..5, separated by commas.")
    ] = "1",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Indices of samples, separated by commas, or a prompt with optional [trigger] and "
            "flags; the settings that its flags do not change are those of the run. By default all "
            "samples."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            "--base",
            help="Hub id, diffusers folder or .safetensors checkpoint; by default the run's.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            "--out",
            metavar="PATH",
            help="Output file (.png, .jpg or .webp), which is replaced if it exists, or folder; by "
            "default grid.png in this folder. If a file has this name already, a number is added.",
        ),
    ] = Path(),
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Generate a contact sheet: a row per prompt, a column per checkpoint and multiplier.

    All images of a row have the same seed.
    """
    from fidelora.images.formats import format_of
    from fidelora.training.base_advice import advice_on_base
    from fidelora.training.grid import (
        contact_sheet,
        frame_strip,
        iterate_cells,
        make_columns,
        make_rows,
    )
    from fidelora.training.notes import notes_on
    from fidelora.training.run_folder import read_run

    out = unused_path(out / "grid.png") if is_folder(out) else out
    image_format = format_of(out)
    run = read_run(run_folder)
    for sentence in notes_on(run):
        warn(sentence)
    rows = make_rows(run, _read_prompts(prompts or []), base_model=base_model)
    columns = make_columns(
        run, _read_steps(steps, sorted(run.checkpoints)), _read_multipliers(multipliers)
    )
    cells = list(iterate_cells(run, rows, columns))
    make_output_folder(out.parent)

    engine = image_maker(device, first=cells[0][2])
    images = {}
    try:
        with progress_display() as show, advice_on_base(run, base_model):
            for number, (down, across, recipe) in enumerate(cells):
                if show is not None:
                    show("images", number, len(cells))
                image = engine.generate(replace(recipe, fidelity=fidelity.value))
                images[down, across] = frame_strip(image.all_pixels)
    except KeyboardInterrupt:
        fail("Interrupted; no grid was written.", INTERRUPTED)
    sheet = contact_sheet(
        f"{run.name}: {rows[0].recipe.sampler}, {rows[0].recipe.dtype}", rows, columns, images
    )
    buffer = io.BytesIO()
    sheet.save(buffer, image_format, **({"lossless": True} if image_format == "webp" else {}))
    write_atomically(out, buffer.getvalue())
    typer.echo(out)


def _read_steps(text: str, available: list[int]) -> list[int]:
    if text == "all":
        return available
    steps: list[int] = []
    for word in _split(text, "--steps"):
        if word == "last":
            steps += available[-1:]
        elif word.isdigit():
            steps.append(int(word))
        else:
            raise TrainingRunError(
                f"--steps has {word!r}, which is not a step; "
                "set numbers separated by commas, last or all."
            )
    return steps


def _read_multipliers(text: str) -> list[float]:
    try:
        return [float(word) for word in _split(text, "--multipliers")]
    except ValueError:
        raise TrainingRunError(
            f"--multipliers is {text!r}; set numbers separated by commas, such as 0.5,1."
        ) from None


def _read_prompts(texts: list[str]) -> list[str]:
    """Split lists of indices at their commas; prompts stay whole."""
    parts = []
    for text in texts:
        words = [word.strip() for word in text.split(",")]
        parts += words if all(word.isdigit() for word in words) else [text]
    return parts


def _split(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise TrainingRunError(f"{option} is empty; set at least one value.")
    return words
