"""`fidelora explain`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.atomic import write_atomically
from fidelora.cli.console import (
    COMPARISON_FAILED,
    fail,
    make_engine,
    make_output_folder,
    progress_display,
    reserve_exit_code_1,
)
from fidelora.cli.explain_write import lines_on, samples_of, write_settings
from fidelora.cli.options import AsJson, Debug, Device, RunFolder
from fidelora.cli.verify_options import NOTHING_TO_CHECK, BaseModel
from fidelora.errors import ImageRecordError, NothingToCheckError
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.explain.explain import Explanation
    from fidelora.explain.picture import Picture
    from fidelora.explain.reading import Reading

DIFFERENT, UNEXPLAINED = 1, 4  # exit codes
_WRITE = "Settings for another program"
_BY_HAND = "Settings of a picture whose file does not contain them"


class ProgramOption(StrEnum):
    """Values of `--program`."""

    A1111 = "a1111"
    FORGE = "forge"
    COMFYUI = "comfyui"
    DIFFUSERS = "diffusers"


class TargetOption(StrEnum):
    """Values of `--write`."""

    A1111 = "a1111"
    COMFYUI = "comfyui"
    DIFFUSERS = "diffusers"


_PROGRAMS = {"a1111": "A1111", "forge": "Forge", "comfyui": "ComfyUI", "diffusers": "diffusers"}


@reserve_exit_code_1
def explain(
    run_folder: RunFolder,
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PICTURE...", help="Pictures of another program; optional with --write."
        ),
    ] = None,
    base_model: BaseModel = None,
    step: Annotated[
        int | None,
        typer.Option(help="Training step to compare with; by default that of the picture's LoRA."),
    ] = None,
    index: Annotated[
        int | None,
        typer.Option(help="Sample to compare with, from 0; by default the most similar one."),
    ] = None,
    program: Annotated[
        ProgramOption | None,
        typer.Option(
            metavar="PROGRAM",
            help="Program that made the pictures: a1111, forge, comfyui or diffusers.",
            case_sensitive=False,
            rich_help_panel=_BY_HAND,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt.", rich_help_panel=_BY_HAND)] = None,
    negative: Annotated[
        str | None,
        typer.Option(
            "--negative",
            metavar="TEXT",
            help="Negative prompt.",
            rich_help_panel=_BY_HAND,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps.", rich_help_panel=_BY_HAND)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="Sampler, in the program's words.", rich_help_panel=_BY_HAND),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Schedule, in the program's words.", rich_help_panel=_BY_HAND),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "--cfg-scale", help="Guidance scale.", rich_help_panel=_BY_HAND),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.", rich_help_panel=_BY_HAND)] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=12,
            help="Clip skip, as the program counts; for ComfyUI without the minus sign.",
            rich_help_panel=_BY_HAND,
        ),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum work per picture, in images with as many steps as the sample.",
        ),
    ] = 40,
    as_json: AsJson = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines",
            help="Print the result of each picture as a line of JSON as soon as it is known.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write explain.html, a single file with all images, to this folder."
        ),
    ] = None,
    write: Annotated[
        TargetOption | None,
        typer.Option(
            help="Write settings with which a program comes nearest to the sample: comfyui (a "
            "workflow), a1111 (a text to paste) or diffusers (a script).",
            case_sensitive=False,
            rich_help_panel=_WRITE,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the files of --write, named PROGRAM_STEP_INDEX.",
            rich_help_panel=_WRITE,
        ),
    ] = Path(),
    progress_lines: Annotated[
        bool,
        typer.Option(
            "--progress-lines", help="Print the progress to stderr as lines, for other programs."
        ),
    ] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Explain why pictures of another program differ from the trainer's samples.

    With --write, settings for another program are written, and the distance that remains is
    measured.

    Exit codes: 0 the pictures are the samples, or no picture was given, 1 they differ and the
    reasons were found, 2 a usage error or a file that cannot be used, 3 no sample to compare with,
    4 at least one picture was not explained.
    """
    from fidelora.explain.document import document_of, lines_of
    from fidelora.explain.explain import explain as explain_picture
    from fidelora.training.base_advice import advice_on_base
    from fidelora.training.run_folder import read_run

    if not pictures and write is None:
        raise typer.BadParameter(
            "Give JOB_DIR and PICTURE, or JOB_DIR and --write PROGRAM.", param_hint="PICTURE"
        )
    if as_json and json_lines:
        raise typer.BadParameter("It cannot be combined with --json.", param_hint="--json-lines")
    as_text = not (as_json or json_lines)
    run = read_run(run_folder)
    if report is not None:
        make_output_folder(report)
    options = {
        "prompt": prompt, "negative_prompt": negative, "steps": steps, "sampler": sampler,
        "scheduler": scheduler, "guidance_scale": guidance, "seed": seed,
    }  # fmt: skip
    loaded = _read_pictures(pictures or [], run.model, program, options, clip_skip)
    engine = make_engine(device)
    explanations: list[Explanation] = []
    with progress_display(as_lines=progress_lines) as show, advice_on_base(run, base_model):
        for picture, reading in loaded:
            try:
                found = explain_picture(
                    run,
                    picture,
                    reading,
                    engine,
                    step=step,
                    index=index,
                    base_model=base_model,
                    max_images=max_images,
                    on_progress=show,
                )
            except NothingToCheckError as error:
                fail(str(error), NOTHING_TO_CHECK)
            explanations.append(found)
            if json_lines:
                typer.echo(json.dumps({"job": run.name, **document_of(found)}))
            for line in lines_of(found) if as_text else ():
                typer.echo(printable(line))
    files: list[dict[str, Any]] = []
    if write is not None:
        samples = [one.alignment.plan for one in explanations]
        with progress_display(as_lines=progress_lines) as show, advice_on_base(run, base_model):
            files = write_settings(
                samples or samples_of(run, step, index, base_model),
                write.value,
                output,
                engine,
                show,
            )
        for line in lines_on(files) if as_text else ():
            typer.echo(printable(line))
    if json_lines:
        for file in files:
            typer.echo(json.dumps({"job": run.name, **file}))
    if report is not None and explanations:
        from fidelora.explain.report import html_report

        write_atomically(report / "explain.html", html_report(run.name, explanations).encode())
    if as_json:
        documents = [document_of(one) for one in explanations]
        document: dict[str, Any] = {"job": run.name, "pictures": documents, "written": files}
        typer.echo(json.dumps(document, indent=2))
    elif as_text and report is not None and explanations:
        typer.echo(f"Report: {report / 'explain.html'}")
    if not all(one.is_explained for one in explanations):
        raise typer.Exit(UNEXPLAINED)
    if not all(one.is_same for one in explanations):
        raise typer.Exit(DIFFERENT)


def _read_pictures(
    paths: Sequence[Path],
    model: str,
    program: ProgramOption | None,
    options: Mapping[str, Any],
    clip_skip: int | None,
) -> list[tuple[Picture, Reading]]:
    """Return the pictures and their settings; end the command if one cannot be read.

    Args:
        options: settings given on the command line, which replace those in the files.
        clip_skip: as the program of a picture counts.
    """
    from fidelora.explain.picture import Picture
    from fidelora.explain.programs import clip_skip_layer
    from fidelora.explain.read_picture import read_picture, with_options

    found = []
    for path in paths:
        try:
            content = path.read_bytes()
            reading = _with_program(read_picture(content, path.name), program)
            layer = clip_skip_layer(reading.program, model, clip_skip)
            reading = with_options(reading, {**options, "clip_skip": layer})
            found.append((Picture.read(content, path.name), reading))
        except OSError as error:
            fail(f"{path} cannot be read: {error.strerror or error}.", COMPARISON_FAILED)
        except ImageRecordError as error:
            fail(str(error), COMPARISON_FAILED)
    return found


def _with_program(reading: Reading, program: ProgramOption | None) -> Reading:
    """Return the reading with the program that the user named, unless its file names one."""
    if program is None or reading.program != "unknown":
        return reading
    return replace(reading, program=_PROGRAMS[program.value])  # type: ignore[arg-type]
