"""Output of `fidelora verify`: table, verdict and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fidelora.recipe import short_name
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.training.doctor import Diagnosis
    from fidelora.training.evidence import Evidence
    from fidelora.training.run_folder import TrainingRun
    from fidelora.training.verify import CheckedSample

FP32_HINT = (
    "To make the samples of future runs reproducible to the bit, save LoRAs in float32: in the "
    "trainer's web UI, set Save > Data Type to FP32 (save.dtype: float32)."
)

TABLE_HEAD = (
    f"{'step':>6} {'#':>3} {'size':>9} {'seed':>10} "
    f"{'same %':>7} {'max':>4} {'mean':>7} {'PSNR':>6} {'SSIM':>7}  verdict"
)


def table_row(sample: CheckedSample) -> str:
    """Return the line of a sample, under `TABLE_HEAD`."""
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


def print_result(
    samples: list[CheckedSample],
    verdict: str,
    diagnosis: Diagnosis | None,
    report: Path | None,
    doctor: bool,
) -> None:
    """Print the verdict, its reasons, and the doctor's diagnosis.

    Args:
        doctor: True if the doctor was asked for.
    """
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


def document_of(
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
                "value": one.change.value if one.change.size else None,
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
