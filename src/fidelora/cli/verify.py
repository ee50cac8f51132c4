"""`fidelora verify`"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.atomic import make_folder, write_atomically
from fidelora.cli.console import Debug, Device, fail, failure_is_no_difference, make_engine, warn
from fidelora.errors import NothingToCheckError

if TYPE_CHECKING:
    from fidelora.engine.engine import Engine
    from fidelora.training.doctor import Diagnosis
    from fidelora.training.run_folder import TrainingRun
    from fidelora.training.verify import CheckedSample

MISMATCH, NOTHING_TO_CHECK = 1, 3


class DtypeOption(StrEnum):
    """What `--dtype` takes."""

    JOB = "job"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class NoiseOption(StrEnum):
    """What `--noise` takes."""

    AUTO = "auto"
    MODERN = "modern"
    LEGACY = "legacy"


JobFolder = Annotated[
    Path, typer.Argument(metavar="JOB_DIR", help="The output folder of an AI Toolkit job.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id, diffusers folder or .safetensors checkpoint, in place of the job's."
    ),
]
Step = Annotated[str, typer.Option(help="A step, last, or all; step 0 is the base model.")]


@failure_is_no_difference
def verify(
    job_dir: JobFolder,
    base_model: BaseModel = None,
    step: Step = "last",
    dtype: Annotated[
        DtypeOption, typer.Option(help="job, float32, bfloat16 or float16.")
    ] = DtypeOption.JOB,
    noise: Annotated[
        NoiseOption,
        typer.Option(
            help="auto, modern or legacy: how half-precision noise is drawn; auto asks the weights' file."
        ),
    ] = NoiseOption.AUTO,
    variant: Annotated[
        str,
        typer.Option(
            help="Files of a diffusers folder to use, such as fp16; by default the plain ones."
        ),
    ] = "",
    doctor: Annotated[
        bool, typer.Option("--doctor", help="On a mismatch, find out which setting explains it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write report.html there, one page with all pictures in it."
        ),
    ] = None,
    save_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write our images there, as STEP_INDEX.png.")
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Make a training job's previews again from its weights, and prove that they are the same, or say what differs.

    Exit codes: 0 no mismatch, 1 a mismatch, 2 wrong use or a file that cannot be used, 3 nothing to check.
    """
    from fidelora.training.run_folder import read_run
    from fidelora.training.verify import steps_to_check, unchecked

    try:
        job = read_run(job_dir)
        steps = steps_to_check(job, step)
    except NothingToCheckError as error:
        fail(str(error), NOTHING_TO_CHECK)
    for folder in (report, save_images):
        if folder is not None:
            make_folder(folder)
    for sentence in unchecked(job):
        warn(sentence)

    from fidelora.training.verify import Verdict, overall
    from fidelora.training.verify import verify as make_again

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
        typer.echo(
            f"Job {job.name}: sampler {job.sampler}, {dtype.value if dtype is not DtypeOption.JOB else job.dtype}."
        )
        typer.echo(_HEAD)
    samples = make_again(
        job,
        engine,
        steps,
        base_model=base_model,
        changes=changes,
        on_sample=None if as_json else lambda one: typer.echo(_row(one)),
    )
    if save_images is not None:
        for sample in samples:
            write_atomically(
                save_images / f"{sample.plan.step}_{sample.plan.index}.png",
                sample.image.encode("png"),
            )

    verdict = overall(samples)
    diagnosis = _diagnose(job, samples, engine) if doctor and verdict is Verdict.MISMATCH else None
    document = _document(job, samples, verdict.value, diagnosis)
    if report is not None:
        from fidelora.training.report import html_report

        write_atomically(report / "report.html", html_report(document, samples).encode())
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _say(samples, verdict.value, diagnosis, report, doctor)
    if verdict is Verdict.MISMATCH:
        raise typer.Exit(MISMATCH)


_HEAD = f"{'step':>6} {'#':>3} {'size':>9} {'seed':>10} {'same %':>7} {'max':>4} {'mean':>7} {'PSNR':>6} {'SSIM':>7}  verdict"


def _row(sample: CheckedSample) -> str:
    recipe, found = sample.plan.recipe, sample.comparison
    size = f"{recipe.width}x{recipe.height}"
    start = f"{sample.plan.step:>6} {sample.plan.index:>3} {size:>9} {recipe.seed:>10}"
    if found is None:
        return f"{start}  {sample.in_words}"
    psnr = "inf" if sample.psnr is None else f"{sample.psnr:.1f}"
    figures = f"{found.identical_in_words:>7} {found.max_difference:>4} {found.mean_difference:>7.4f} {psnr:>6} {sample.ssim:>7.4f}"
    return f"{start} {figures}  {sample.verdict.value}"


def _say(
    samples: list[CheckedSample],
    verdict: str,
    diagnosis: Diagnosis | None,
    report: Path | None,
    doctor: bool,
) -> None:
    rounded = [sample for sample in samples if sample.bound and sample.verdict.value == "rounding"]
    if rounded:
        worst = min(
            rounded,
            key=lambda sample: sample.comparison.identical_percent if sample.comparison else 0,
        )
        reason = worst.bound.reason if worst.bound else ""
        typer.echo(
            f"Rounding, at most in sample {worst.plan.index} of step {worst.plan.step}: {reason}."
        )
    halves = {one.plan.recipe.dtype for one in samples if one.verdict.value == "mismatch"} - {
        "float32"
    }
    for dtype in sorted(halves):
        typer.echo(
            f"In {dtype}, only hardware of the kind that painted a preview can judge it: elsewhere most pixels are some levels off."
        )
    if report is not None:
        typer.echo(f"Report: {report / 'report.html'}")
    said = {
        "identical": "Every pixel of every preview is the same.",
        "rounding": "No preview differs by more than rounding explains.",
        "mismatch": "At least one preview came out different.",
    }
    typer.echo(f"{verdict}: {said[verdict]}")
    if diagnosis is not None:
        typer.echo(
            f"Doctor: {diagnosis.cause} (explains {diagnosis.explains:.0%}). {diagnosis.fix}"
        )
    elif verdict == "mismatch" and not doctor:
        typer.echo("Run it again with --doctor to find out why.")


def _diagnose(job: TrainingRun, samples: list[CheckedSample], engine: Engine) -> Diagnosis:
    from fidelora.training.doctor import diagnose

    def show(suspect: Any) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\rtrying {suspect.cause:<22}", nl=False, err=True)

    diagnosis = diagnose(job, samples, engine, show)
    if sys.stderr.isatty():
        typer.echo("\r" + " " * 32 + "\r", nl=False, err=True)
    return diagnosis


def _document(
    job: TrainingRun, samples: list[CheckedSample], verdict: str, diagnosis: Diagnosis | None
) -> dict[str, Any]:
    """What `--json` prints."""
    first = samples[0]
    recipe = first.plan.recipe
    return {
        "job": job.name,
        "model": recipe.model,
        "base_model": recipe.base_model,
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
            "bounds": {
                f"{sample.plan.step}_{sample.plan.index}": asdict(sample.bound)
                for sample in samples
                if sample.bound is not None
            },
        },
        "samples": [_sample(sample) for sample in samples],
        "verdict": verdict,
        "doctor": None if diagnosis is None else asdict(diagnosis),
    }


def _sample(sample: CheckedSample) -> dict[str, Any]:
    found = sample.comparison
    return {
        "step": sample.plan.step,
        "index": sample.plan.index,
        "seed": sample.plan.recipe.seed,
        "width": sample.plan.recipe.width,
        "height": sample.plan.recipe.height,
        "identical": found.identical_percent if found else 0.0,
        "max": found.max_difference if found else 255,
        "mean": found.mean_difference if found else 255.0,
        "psnr": sample.psnr,
        "ssim": sample.ssim,
        "verdict": sample.verdict.value,
    }
