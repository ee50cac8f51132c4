"""`fidelora verify --against`: the samples of a training run through a running server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fidelora.atomic import write_atomically
from fidelora.cli.console import fail, make_engine, progress_display
from fidelora.cli.verify_options import MISMATCH, NOTHING_TO_CHECK
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.cli.verify_options import ApiOption
    from fidelora.remote.check import RemoteSample
    from fidelora.training.plan import PlannedSample
    from fidelora.training.run_folder import TrainingRun

KEY_VARIABLE = "VERIFY_API_KEY"
_SENTENCES = {
    "identical": "Every pixel of every sample is the same.",
    "rounding": "The differences are as small as those of float32 on another processor.",
    "expected": "The server makes the expected pictures, within the tolerance.",
    "mismatch": "At least one picture is not the expected one.",
}


def verify_against(
    run: TrainingRun,
    steps: Sequence[int],
    url: str,
    *,
    api: ApiOption | None,
    model: str,
    lora: str,
    base_model: str | None,
    changes: Mapping[str, str],
    tolerance: float | None,
    timeout_s: float,
    as_json: bool,
    save_images: Path | None,
    progress_lines: bool,
    device: str,
) -> None:
    """Run the comparison, print it, and exit with 1 for a mismatch, 3 if there is nothing to check.

    Args:
        changes: recipe fields that options replace.

    Raises:
        FideloraError: the server cannot be used, or a file cannot be read.
    """
    from fidelora.remote.check import RemoteVerdict, verify_remote, worst
    from fidelora.remote.connection import Connection
    from fidelora.remote.programs import Names, connect

    plans = _plans(run, steps, base_model, changes)
    if not plans:
        fail(f"The training run {run.name} has no samples at these steps.", NOTHING_TO_CHECK)
    key = os.environ.get(KEY_VARIABLE, "")
    with Connection(url, key=key, timeout_s=timeout_s) as connection:
        program = connect(connection, api.value if api else None, Names(model, lora))
        if not as_json:
            typer.echo(f"Training run {printable(run.name)} through {url} ({program.api}).")
            typer.echo(_TABLE_HEAD)
        with progress_display(as_lines=progress_lines) as show:
            samples = verify_remote(
                program,
                plans,
                lambda: make_engine(device),
                tolerance=tolerance,
                on_sample=None if as_json else lambda sample: typer.echo(_row(sample)),
                on_progress=show,
            )
    for sample in samples if save_images is not None else ():
        assert save_images is not None
        name = f"{sample.plan.round}_{sample.plan.index}{_suffix(sample.content)}"
        write_atomically(save_images / name, sample.content)
    verdict = worst(samples)
    if as_json:
        document = {
            "job": run.name,
            "server": url,
            "api": program.api,
            "samples": [_document(sample) for sample in samples],
            "verdict": verdict.value,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        notes = [note for one in samples if one.nearest for note in one.nearest.notes]
        for note in dict.fromkeys(notes):
            typer.echo(printable(f"Note: {note}"))
        typer.echo(f"{verdict.value}: {_SENTENCES[verdict.value]}")
        if verdict is RemoteVerdict.MISMATCH:
            typer.echo(
                "Write the pictures with --save-images DIR, and run fidelora explain to find what "
                "differs."
            )
    if verdict is RemoteVerdict.MISMATCH:
        raise typer.Exit(MISMATCH)


def _plans(
    run: TrainingRun, steps: Sequence[int], base_model: str | None, changes: Mapping[str, str]
) -> list[PlannedSample]:
    from fidelora.training.plan import plan_samples

    values: dict[str, Any] = dict(changes)
    return [
        replace(plan, recipe=replace(plan.recipe, **values))
        for step in steps
        for plan in plan_samples(run, step, base_model=base_model)
        if plan.trainer_image is not None
    ]


_TABLE_HEAD = f"{'step':>6} {'#':>3} {'same %':>7} {'max':>4} {'mean':>8} {'expected':>9}  verdict"


def _row(sample: RemoteSample) -> str:
    start = f"{sample.plan.round:>6} {sample.plan.index:>3}"
    one = sample.comparison
    if one is None:
        height, width = sample.pixels.shape[-3:-1]
        frames = f" with {len(sample.pixels)} frames" if sample.pixels.ndim == 4 else ""
        return f"{start}  mismatch: the server's picture is {width}x{height}{frames}"
    return (
        f"{start} {one.percent_text:>7} {one.max_difference:>4} {one.mean_difference:>8.4f} "
        f"{sample.from_expected:>9.4f}  {sample.verdict.value}"
    )


def _document(sample: RemoteSample) -> dict[str, Any]:
    one, nearest = sample.comparison, sample.nearest
    height, width = sample.pixels.shape[-3:-1]
    return {
        "step": sample.plan.step,
        "round": sample.plan.round,
        "index": sample.plan.index,
        "width": width,
        "height": height,
        "identical": one.identical_percent if one else 0.0,
        "max": one.max_difference if one else 255,
        "mean": one.mean_difference if one else 255.0,
        "sampling": nearest.there.sampling if nearest else None,
        "expected_mean": nearest.there.distance if nearest else 0.0,
        "from_expected": sample.from_expected,
        "notes": list(nearest.notes) if nearest else [],
        "verdict": sample.verdict.value,
    }


def _suffix(content: bytes) -> str:
    """Return the suffix of an image file by its first bytes."""
    if content.startswith(b"\xff\xd8"):
        return ".jpg"
    return ".webp" if content[8:12] == b"WEBP" else ".png"
