"""`fidelora recipe`"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.api import request_for
from fidelora.cli.console import Debug, warn
from fidelora.errors import JobFolderError
from fidelora.recipe import AdapterRef

if TYPE_CHECKING:
    from fidelora.recipe import Recipe
    from fidelora.training.run_folder import TrainingRun


def recipe(
    job_dir: Annotated[
        Path, typer.Argument(metavar="JOB_DIR", help="The output folder of an AI Toolkit job.")
    ],
    step: Annotated[str, typer.Option(help="A step whose weights are there, or last.")] = "last",
    index: Annotated[
        int | None,
        typer.Option(
            min=0, help="One sample of the job, from 0; without it, all of them in one request."
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="What the server calls the LoRA; by default its file's name, below WORKFLOWS_BASE_PATH."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the request (JSON, for POST /v1/inference) that makes a job's samples again. What the server needs goes to stderr."""
    from fidelora.training.plan import plan_samples
    from fidelora.training.run_folder import read_run

    job = read_run(job_dir)
    number = _step(job, step)
    recipes = [plan.recipe for plan in plan_samples(job, number)]
    if not recipes:
        raise JobFolderError(f"The job {job.name} has no sample prompts.")
    live = recipes[0].adapter_mode == "live"
    if index is not None:
        if index >= len(recipes):
            raise JobFolderError(
                f"The job {job.name} has {len(recipes)} samples, so the last --index is {len(recipes) - 1}."
            )
        recipes = recipes[index : index + 1]
    if number == 0:
        recipes = _of_base_alone(job, recipes)
    file = recipes[0].adapters[0].path
    assert file is not None
    typer.echo(json.dumps(request_for(recipes, lora or file.name), indent=2, ensure_ascii=False))
    typer.echo(
        f"The server: fidelora serve --base-model {job.model}={job.base_model}, with FIDELORA_DTYPE={job.dtype}, and {file} in "
        "its folder of LoRAs or uploaded.",
        err=True,
    )
    if len({one.adapters[0].multiplier for one in recipes}) == 1 and live:
        warn(
            "The job's samples have several multipliers, so the trainer ran the LoRA beside the model; a request with one of them "
            "merges it, which differs by rounding. Leave out --index to get the request that does as the trainer did."
        )
    if (
        job.prediction != "epsilon"
        or job.vae
        or {job.vae_dtype, job.text_encoder_dtype} != {job.dtype}
    ):
        warn(
            "The job has a prediction type, a VAE or separate precisions that no server setting has; its images will differ."
        )


def _step(job: TrainingRun, wanted: str) -> int:
    if wanted.isdigit():
        return int(wanted)
    if wanted != "last":
        raise JobFolderError(f"{wanted!r} is no step; give a number or last.")
    if not job.checkpoints:
        raise JobFolderError(
            f"The job {job.name} has saved no weights yet, and a request needs a LoRA."
        )
    return max(job.checkpoints)


def _of_base_alone(job: TrainingRun, recipes: list[Recipe]) -> list[Recipe]:
    """The API always wants a LoRA: any of the job's with multiplier 0 leaves the base model as it is."""
    if not job.checkpoints:
        raise JobFolderError(
            f"The job {job.name} has saved no weights yet, and a request needs a LoRA."
        )
    unused = AdapterRef.from_file(next(iter(job.checkpoints.values())), 0.0)
    return [replace(one, adapters=(unused,), adapter_mode="merged") for one in recipes]
