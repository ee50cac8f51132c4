"""`fidelora grid`"""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fidelora.atomic import make_folder, write_atomically
from fidelora.cli.console import (
    INTERRUPTED,
    Debug,
    Device,
    Fidelity,
    FidelityOption,
    fail,
    make_engine,
)
from fidelora.errors import JobFolderError


def grid(
    job_dir: Annotated[
        Path, typer.Argument(metavar="JOB_DIR", help="The output folder of an AI Toolkit job.")
    ],
    steps: Annotated[
        str,
        typer.Option(help="Checkpoints, with commas: numbers (0 is the base model), last, or all."),
    ] = "all",
    multipliers: Annotated[
        str, typer.Option(help="Multipliers of the LoRA, -2..2, with commas.")
    ] = "1",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of the job's samples, with commas, or a prompt, which may have [trigger] and flags, and takes the rest "
            "from the job. By default all samples."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, diffusers folder or .safetensors checkpoint, in place of the job's."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The image that is written (.png, .jpg, .webp).")
    ] = Path("grid.png"),
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Paint a job's prompts with several checkpoints and multipliers, same seeds, on one sheet with labelled axes."""
    from fidelora.images.write import format_of
    from fidelora.training.grid import cells, columns_of, contact_sheet, rows_of
    from fidelora.training.run_folder import read_run

    image_format = format_of(out)
    job = read_run(job_dir)
    rows = rows_of(job, _prompts(prompts or []), base_model=base_model)
    columns = columns_of(job, _steps(steps, sorted(job.checkpoints)), _multipliers(multipliers))
    wanted = list(cells(job, rows, columns))
    make_folder(out.parent)

    engine = make_engine(device)
    images = {}
    try:
        for number, (down, across, recipe) in enumerate(wanted, start=1):
            if sys.stderr.isatty():
                typer.echo(f"\rimage {number} of {len(wanted)}", nl=False, err=True)
            images[down, across] = engine.generate(replace(recipe, fidelity=fidelity.value)).pixels
    except KeyboardInterrupt:
        fail("Interrupted; no grid was written.", INTERRUPTED)
    if sys.stderr.isatty():
        typer.echo("", err=True)
    sheet = contact_sheet(
        f"{job.name}: {rows[0].recipe.sampler}, {rows[0].recipe.dtype}", rows, columns, images
    )
    buffer = io.BytesIO()
    sheet.save(buffer, image_format, **({"lossless": True} if image_format == "webp" else {}))
    write_atomically(out, buffer.getvalue())
    typer.echo(out)


def _steps(text: str, there_are: list[int]) -> list[int]:
    if text == "all":
        return there_are
    steps: list[int] = []
    for word in _words(text, "--steps"):
        if word == "last":
            steps += there_are[-1:]
        elif word.isdigit():
            steps.append(int(word))
        else:
            raise JobFolderError(
                f"--steps has {word!r}, which is no step; give numbers with commas, last or all."
            )
    return steps


def _multipliers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text, "--multipliers")]
    except ValueError:
        raise JobFolderError(
            f"--multipliers is {text!r}; give numbers with commas, such as 0.5,1."
        ) from None


def _prompts(texts: list[str]) -> list[str]:
    """Numbers apart, prompts whole: only what is nothing but numbers is split at its commas."""
    parts = []
    for text in texts:
        words = [word.strip() for word in text.split(",")]
        parts += words if all(word.isdigit() for word in words) else [text]
    return parts


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise JobFolderError(f"{option} is empty.")
    return words
