"""`fidelora verify`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from fidelora.errors import NothingToCheckError
from fidelora.recipe import short_name
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.training.doctor import Diagnosis
    from fidelora.training.judge import Evidence
    from fidelora.training.run_folder import TrainingRun
    from fidelora.training.verify import CheckedSample

MISMATCH, NOTHING_TO_CHECK, UNDECIDED = 1, 3, 4  # exit codes

FP32_HINT = (
    "To make this proof exact, save LoRAs of future runs in float32: in the trainer's web UI, set "
    "Save > Data Type to FP32 (save.dtype: float32)."
)


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


RunFolder = Annotated[
    Path, typer.Argument(metavar="JOB_DIR", help="Output folder of an AI Toolkit training run.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
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
    changes = {"variant": variant} if variant else {}
    if dtype is not DtypeOption.JOB:
        changes |= {
            "dtype": dtype.value,
            "vae_dtype": dtype.value,
            "text_encoder_dtype": dtype.value,
        }
    if noise is not NoiseOption.AUTO:
        changes["noise"] = noise.value
    if not as_json:
        typer.echo(_TABLE_HEAD)
    with progress_display(as_lines=progress_lines) as show:
        samples = verify_run(
            run,
            engine,
            steps,
            base_model=base_model,
            changes=changes,
            on_sample=None if as_json else lambda sample: typer.echo(_table_row(sample)),
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
    document = _document(run, samples, verdict.value, diagnosis)
    if report is not None:
        from fidelora.training.report import html_report

        write_atomically(report / "report.html", html_report(document, samples).encode())
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_result(samples, verdict.value, diagnosis, report, doctor)
    if verdict in (Verdict.MISMATCH, Verdict.UNDECIDED):
        raise typer.Exit(MISMATCH if verdict is Verdict.MISMATCH else UNDECIDED)


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


_TABLE_HEAD = (
    f"{'step':>6} {'#':>3} {'size':>9} {'seed':>10} "
    f"{'same %':>7} {'max':>4} {'mean':>7} {'PSNR':>6} {'SSIM':>7}  verdict"
)


def _table_row(sample: CheckedSample) -> str:
    recipe, comparison = sample.plan.recipe, sample.comparison
    size = f"{recipe.width}x{recipe.height}"
    start = f"{sample.plan.round:>6} {sample.plan.index:>3} {size:>9} {recipe.seed:>10}"
    if comparison is None:
        return f"{start}  {sample.summary}"
    psnr = "inf" if sample.psnr is None else f"{sample.psnr:.1f}"
    figures = (
        f"{comparison.percent_text:>7} {comparison.max_difference:>4} "
        f"{comparison.mean_difference:>7.4f} {psnr:>6} {sample.ssim:>7.4f}"
    )
    return f"{start} {figures}  {sample.verdict.value}"


def _print_result(
    samples: list[CheckedSample],
    verdict: str,
    diagnosis: Diagnosis | None,
    report: Path | None,
    doctor: bool,
) -> None:
    from fidelora.training.draws import saved_dtype

    for reason in dict.fromkeys(sample.reason for sample in samples if sample.reason):
        typer.echo(printable(reason))
    judged = [sample.plan.recipe for sample in samples if sample.evidence is not None]
    if any(map(saved_dtype, judged)):
        typer.echo(FP32_HINT)
    if report is not None:
        typer.echo(f"Report: {report / 'report.html'}")
    sentences = {
        "identical": "Every pixel of every sample is the same.",
        "rounding": "The samples are consistent with these settings.",
        "undecided": "Too much information was lost to tell whether these settings are right.",
        "mismatch": "At least one sample is different.",
    }
    typer.echo(f"{verdict}: {sentences[verdict]}")
    if diagnosis is not None:
        typer.echo(
            f"Doctor: {printable(diagnosis.cause)} (explains {diagnosis.explains:.0%}). "
            f"{printable(diagnosis.fix)}"
        )
    elif verdict == "mismatch" and not doctor:
        typer.echo("Run the command again with --doctor to find the cause.")


def _document(
    run: TrainingRun, samples: list[CheckedSample], verdict: str, diagnosis: Diagnosis | None
) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    from fidelora.training.selection import incomplete_parts

    first = samples[0]
    recipe = first.plan.recipe
    return {
        "job": run.name,
        "warnings": incomplete_parts(run),
        "model": recipe.model,
        "base_model": short_name(recipe.base_model),
        "base_sha256": first.image.recipe.base_sha256,
        "versions": dict(first.image.environment),
        "settings": {
            "steps": sorted({sample.plan.step for sample in samples}),
            "sampler": recipe.sampler,
            "prediction": recipe.prediction,
            "dtype": recipe.dtype,
            "vae_dtype": recipe.vae_dtype,
            "text_encoder_dtype": recipe.text_encoder_dtype,
            "noise": recipe.noise,
            "variant": recipe.variant,
            "adapter_mode": recipe.adapter_mode,
        },
        "evidence": {
            sample.plan.round: _evidence_document(sample.evidence)
            for sample in samples
            if sample.evidence is not None
        },
        "histories": {
            sample.plan.round: asdict(sample.plan.history)
            for sample in samples
            if sample.plan.history.summary
        },
        "samples": [_sample_document(sample) for sample in samples],
        "verdict": verdict,
        "doctor": None if diagnosis is None else asdict(diagnosis),
    }


def _evidence_document(evidence: Evidence) -> dict[str, Any]:
    """Return the judgement of a step; see docs/cli.md for the fields."""
    return {
        "lost": list(evidence.lost),
        "ratio": evidence.size.ratio,
        "p_value": evidence.size.p_value,
        "changes": [
            {
                "cause": one.change.cause,
                "amount": one.test.amount,
                "p_value": one.test.p_value,
                "tried": one.change.size,
                "detectable": None if math.isinf(one.test.detectable) else one.detectable,
            }
            for one in evidence.tried
        ],
        "found": evidence.found.change.cause if evidence.found else None,
    }


def _sample_document(sample: CheckedSample) -> dict[str, Any]:
    comparison = sample.comparison
    return {
        "step": sample.plan.step,
        "round": sample.plan.round,
        "index": sample.plan.index,
        "seed": sample.plan.recipe.seed,
        "width": sample.plan.recipe.width,
        "height": sample.plan.recipe.height,
        "identical": comparison.identical_percent if comparison else 0.0,
        "max": comparison.max_difference if comparison else 255,
        "mean": comparison.mean_difference if comparison else 255.0,
        "psnr": sample.psnr,
        "ssim": sample.ssim,
        "verdict": sample.verdict.value,
    }
