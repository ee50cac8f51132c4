"""`fidelora verify`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fidelora.atomic import write_atomically
from fidelora.cli import verify_options as options
from fidelora.cli.console import (
    fail,
    make_engine,
    make_output_folder,
    progress_display,
    reserve_exit_code_1,
    warn,
)
from fidelora.cli.options import AsJson, ConfigFolder, Debug, Device, RunFolder, Variant
from fidelora.cli.verify_output import TABLE_HEAD, document_of, print_result, table_row
from fidelora.errors import NothingToCheckError
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.training.run_folder import TrainingRun
    from fidelora.training.verify import CheckedSample


@reserve_exit_code_1
def verify(
    run_folder: RunFolder,
    base_model: options.BaseModel = None,
    step: options.Step = "last",
    dtype: options.Dtype = options.DtypeOption.JOB,
    noise: options.Noise = options.NoiseOption.AUTO,
    variant: Variant = "",
    config: ConfigFolder = "",
    training_adapter: options.TrainingAdapter = None,
    trainer_version: options.TrainerVersion = None,
    against: options.Against = None,
    api: options.Api = None,
    server_model: options.ServerModel = "",
    server_lora: options.ServerLora = "",
    tolerance: options.Tolerance = None,
    timeout: options.Timeout = 600,
    doctor: options.Doctor = False,
    as_json: AsJson = False,
    report: options.ReportFolder = None,
    save_images: options.ImageFolder = None,
    progress_lines: options.ProgressLines = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Replay the samples of a training run and compare them with the trainer's.

    With --against, a running server makes the samples.

    Exit codes: 0 the samples are identical or consistent with the settings, 1 a mismatch, 2 a usage
    error or a file that cannot be used, 3 nothing to check, 4 undecided: too much information was
    lost.
    """
    from fidelora.training.selection import incomplete_parts

    run, steps = _read_run(run_folder, step, training_adapter, trainer_version)
    for folder in (report, save_images):
        if folder is not None:
            make_output_folder(folder)
    for sentence in incomplete_parts(run):
        warn(sentence)

    changes = _recipe_changes(variant, config, dtype, noise)
    if against is not None:
        if doctor or report is not None:
            raise typer.BadParameter("--against cannot be combined with --doctor or --report.")
        from fidelora.cli.verify_against import verify_against

        verify_against(
            run,
            steps,
            against,
            api=api,
            model=server_model,
            lora=server_lora,
            base_model=base_model,
            changes=changes,
            tolerance=tolerance,
            timeout_s=timeout,
            as_json=as_json,
            save_images=save_images,
            progress_lines=progress_lines,
            device=device,
        )
        return
    if not as_json:
        typer.echo(
            f"Training run {printable(run.name)}: sampler {run.sampler}, "
            f"{dtype.value if dtype is not options.DtypeOption.JOB else run.dtype}."
        )
    from fidelora.training.base_advice import advice_on_base
    from fidelora.training.doctor import diagnose
    from fidelora.training.evidence import Verdict
    from fidelora.training.verify import verify as verify_run
    from fidelora.training.verify import worst_verdict

    engine = make_engine(device)
    rows = 0

    def print_row(sample: CheckedSample) -> None:
        nonlocal rows
        if not rows:
            typer.echo(TABLE_HEAD)
        rows += 1
        typer.echo(table_row(sample))

    with progress_display(as_lines=progress_lines) as show, advice_on_base(run, base_model):
        samples = verify_run(
            run,
            engine,
            steps,
            base_model=base_model,
            changes=changes,
            on_sample=None if as_json else print_row,
            on_progress=show,
        )
    if save_images is not None:
        _write_images(samples, save_images)

    verdict = worst_verdict(samples)
    diagnosis = None
    if doctor and verdict is Verdict.MISMATCH:
        with progress_display(as_lines=progress_lines) as show:
            diagnosis = diagnose(run, samples, engine, show)
    document = document_of(run, samples, verdict.value, diagnosis)
    if report is not None:
        from fidelora.training.report import html_report

        write_atomically(report / "report.html", html_report(document, samples).encode())
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        print_result(samples, verdict.value, diagnosis, report, doctor)
    if verdict is Verdict.MISMATCH:
        raise typer.Exit(options.MISMATCH)
    if verdict is Verdict.UNDECIDED:
        raise typer.Exit(options.UNDECIDED)


def _read_run(
    folder: Path, step: str, training_adapter: str | None, trainer_version: str | None
) -> tuple[TrainingRun, list[int]]:
    """Return the training run, with the settings that options replace, and the steps to check.

    The process exits if there is nothing to check.
    """
    from fidelora.training.run_folder import read_run
    from fidelora.training.selection import steps_to_check

    try:
        run = read_run(folder)
        if training_adapter is not None:
            location = "" if training_adapter == "none" else training_adapter
            run = run.with_settings(training_adapter=location)
        if trainer_version is not None:
            run = run.with_settings(trainer_version=_version(trainer_version))
        return run, steps_to_check(run, step)
    except NothingToCheckError as error:
        fail(str(error), options.NOTHING_TO_CHECK)


def _write_images(samples: Sequence[CheckedSample], folder: Path) -> None:
    """Write the replayed samples as STEP_INDEX.png."""
    for sample in samples:
        path = folder / f"{sample.plan.round}_{sample.plan.index}.png"
        write_atomically(path, sample.image.encode("png"))


def _recipe_changes(
    variant: str, config: str, dtype: options.DtypeOption, noise: options.NoiseOption
) -> dict[str, str]:
    """Return the recipe fields that options replace."""
    given = {"variant": variant, "config": config}
    changes = {name: value for name, value in given.items() if value}
    if dtype is not options.DtypeOption.JOB:
        names = ("dtype", "vae_dtype", "text_encoder_dtype")
        changes |= dict.fromkeys(names, dtype.value)
    if noise is not options.NoiseOption.AUTO:
        changes["noise"] = noise.value
    return changes


def _version(text: str) -> tuple[int, ...]:
    """Parse the number of a release.

    Raises:
        BadParameter: it is not made of numbers and dots.
    """
    if not re.fullmatch(r"\d+(\.\d+){1,2}", text):
        raise typer.BadParameter(
            f"{text} is not a release; use a number such as 0.10.20.",
            param_hint="--trainer-version",
        )
    return tuple(map(int, text.split(".")))
