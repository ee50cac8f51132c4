"""`fidelora verify`."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fidelora.atomic import make_folder, write_atomically
from fidelora.cli.console import (
    DEVICE_PANEL,
    MODEL_PANEL,
    Debug,
    Device,
    fail,
    make_engine,
    progress_display,
    reserve_exit_code_1,
    warn,
)
from fidelora.cli.verify_output import TABLE_HEAD, document_of, print_result, table_row
from fidelora.errors import NothingToCheckError
from fidelora.texts import printable

MISMATCH, NOTHING_TO_CHECK, UNDECIDED = 1, 3, 4  # exit codes


class DtypeOption(StrEnum):
    """Values of `--dtype`; `job` stands for the dtype of the training run."""

    JOB = "job"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class NoiseOption(StrEnum):
    """Values of `--noise`."""

    AUTO = "auto"
    MODERN = "modern"
    LEGACY = "legacy"


class ApiOption(StrEnum):
    """Values of `--api`."""

    FIDELORA = "fidelora"
    INFERENCE = "inference"
    A1111 = "a1111"
    COMFYUI = "comfyui"
    OPENAI = "openai"


AGAINST_PANEL = "Samples of a server"
RunFolder = Annotated[
    Path, typer.Argument(metavar="JOB_DIR", help="Output folder of an AI Toolkit training run.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        "--base",
        metavar="BASE",
        help="Hub id, diffusers folder or .safetensors checkpoint; by default the run's.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Step = Annotated[str, typer.Option(help="Training step, last or all; step 0 is the base model.")]


@reserve_exit_code_1
def verify(
    run_folder: RunFolder,
    base_model: BaseModel = None,
    step: Step = "last",
    dtype: Annotated[
        DtypeOption,
        typer.Option(
            help="job (the dtype of the training run), float32, bfloat16 or float16.",
            rich_help_panel=DEVICE_PANEL,
        ),
    ] = DtypeOption.JOB,
    noise: Annotated[
        NoiseOption,
        typer.Option(
            help="Half-precision noise: modern (torch 2.12 and later), legacy (earlier), or auto, "
            "which depends on the trainer version in the checkpoint's metadata.",
            rich_help_panel=DEVICE_PANEL,
        ),
    ] = NoiseOption.AUTO,
    variant: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Variant of the files in a diffusers folder, such as fp16; by default none.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "",
    config: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder with the configurations and the tokenizer of a .safetensors checkpoint; "
            "by default those of the model family.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "",
    training_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File of the assistant LoRA of the run (model.assistant_lora_path), or none to "
            "leave it out; by default that of the configuration.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    trainer_version: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="Release of AI Toolkit that made the samples, such as 0.10.20; by default the one "
            "in the metadata of the checkpoint.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server that makes the samples, instead of this machine. Its key is read from the "
            "environment variable VERIFY_API_KEY.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = None,
    api: Annotated[
        ApiOption | None,
        typer.Option(
            help="API of the server: fidelora, inference (ai-toolkit-inference), a1111, comfyui or "
            "openai; by default, it is detected.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = None,
    server_model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Base model on the server; by default the one with the same name.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = "",
    server_lora: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="LoRA on the server; by default the one with the same name.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="LEVELS",
            help="Accepted mean difference from the expected picture, of 255 levels; by default 1 "
            "for A1111 and ComfyUI, whose pictures are simulated, else 0.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Seconds to wait for each picture of the server.",
            rich_help_panel=AGAINST_PANEL,
        ),
    ] = 600,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="On a mismatch, find the setting that explains it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write report.html, a single file with all images, to this folder."
        ),
    ] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the replayed samples to this folder, as STEP_INDEX.png."
        ),
    ] = None,
    progress_lines: Annotated[
        bool,
        typer.Option(
            "--progress-lines", help="Print the progress to stderr as lines, for other programs."
        ),
    ] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Replay the samples of a training run and compare them with the trainer's.

    With --against, a running server makes the samples.

    Exit codes: 0 the samples are identical or consistent with the settings, 1 a mismatch, 2 a usage
    error or a file that cannot be used, 3 nothing to check, 4 undecided: too much information was
    lost.
    """
    from fidelora.training.run_folder import read_run
    from fidelora.training.selection import incomplete_parts, steps_to_check

    try:
        run = read_run(run_folder)
        if training_adapter is not None:
            location = "" if training_adapter == "none" else training_adapter
            run = run.with_settings(training_adapter=location)
        if trainer_version is not None:
            run = run.with_settings(trainer_version=_version(trainer_version))
        steps = steps_to_check(run, step)
    except NothingToCheckError as error:
        fail(str(error), NOTHING_TO_CHECK)
    for folder in (report, save_images):
        if folder is not None:
            make_folder(folder)
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
            f"{dtype.value if dtype is not DtypeOption.JOB else run.dtype}."
        )
    from fidelora.training.doctor import diagnose
    from fidelora.training.judge import Verdict
    from fidelora.training.verify import verify as verify_run
    from fidelora.training.verify import worst_verdict

    engine = make_engine(device)
    if not as_json:
        typer.echo(TABLE_HEAD)
    with progress_display(as_lines=progress_lines) as show:
        samples = verify_run(
            run,
            engine,
            steps,
            base_model=base_model,
            changes=changes,
            on_sample=None if as_json else lambda sample: typer.echo(table_row(sample)),
            on_progress=show,
        )
    if save_images is not None:
        for sample in samples:
            write_atomically(
                save_images / f"{sample.plan.round}_{sample.plan.index}.png",
                sample.image.encode("png"),
            )

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
    if verdict in (Verdict.MISMATCH, Verdict.UNDECIDED):
        raise typer.Exit(MISMATCH if verdict is Verdict.MISMATCH else UNDECIDED)


def _recipe_changes(
    variant: str, config: str, dtype: DtypeOption, noise: NoiseOption
) -> dict[str, str]:
    """Return the recipe fields that options replace."""
    given = {"variant": variant, "config": config}
    changes = {name: value for name, value in given.items() if value}
    if dtype is not DtypeOption.JOB:
        names = ("dtype", "vae_dtype", "text_encoder_dtype")
        changes |= dict.fromkeys(names, dtype.value)
    if noise is not NoiseOption.AUTO:
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
