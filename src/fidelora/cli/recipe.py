"""`fidelora recipe`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import warn
from fidelora.cli.options import Debug, RunFolder
from fidelora.errors import TrainingRunError
from fidelora.families import get_family
from fidelora.recipe import AdapterRef

if TYPE_CHECKING:
    from fidelora.recipe import Recipe
    from fidelora.training.run_folder import TrainingRun


def recipe(
    run_folder: RunFolder,
    step: Annotated[str, typer.Option(help="Training step with a checkpoint, or last.")] = "last",
    index: Annotated[
        int | None,
        typer.Option(
            min=0, help="Index of a single sample, from 0; by default all samples, in one request."
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Path of the LoRA below the server's WORKFLOWS_BASE_PATH; by default its file "
            "name."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the request that replays the samples of a training run, as JSON for POST /v1/inference.

    The settings that the server needs are printed to stderr.
    """
    from fidelora.api import request_for
    from fidelora.training.base_advice import BUNDLED_BASES
    from fidelora.training.notes import notes_on
    from fidelora.training.plan import RANDOM_SEED, plan_samples
    from fidelora.training.run_folder import read_run

    run = read_run(run_folder)
    if run.full_models:
        raise TrainingRunError(
            f"The checkpoints of the training run {run.name} are base models, but a request "
            "requires a LoRA. Use fidelora verify, or fidelora generate with --base-model and the "
            "path of a checkpoint."
        )
    for sentence in notes_on(run):
        warn(sentence)
    number = _read_step(run, step)
    # Requests do not name the training adapter, so it need not exist on this machine.
    plans = plan_samples(run.with_settings(training_adapter=""), number)
    recipes = [plan.recipe for plan in plans]
    if not recipes:
        raise TrainingRunError(f"The training run {run.name} has no sample prompts.")
    unmerged = recipes[0].adapter_mode == "live"
    if index is not None:
        if index >= len(recipes):
            raise TrainingRunError(
                f"The training run {run.name} has {len(recipes)} samples; "
                f"--index must be at most {len(recipes) - 1}."
            )
        plans, recipes = plans[index : index + 1], recipes[index : index + 1]
    if number == 0:
        recipes = _with_zero_multiplier(run, recipes)
    files = [ref.path for ref in recipes[0].adapters if ref.path is not None]
    # The file of an embedding is expected beside that of the LoRA.
    first = PurePosixPath(lora or files[0].name)
    paths = [str(first), *(str(first.with_name(file.name)) for file in files[1:])]
    request = request_for(recipes, paths)
    for plan, prompt in zip(plans, request["prompts"], strict=True):
        if plan.has_random_seed:
            prompt["seed"] = RANDOM_SEED
    typer.echo(json.dumps(request, indent=2, ensure_ascii=False))
    base = BUNDLED_BASES.get(run.base_model, run.base_model)
    where = ""
    if not _is_known(base, run.model):
        where = (
            f", where BASE is the base model of the run (a diffusers folder, a .safetensors "
            f"checkpoint or a hub id; the trainer's name of it, {base}, was not found on this "
            "machine),"
        )
        base = "BASE"
    adapter = run.training_adapter
    if adapter and not Path(adapter).expanduser().is_file():
        where = f"{where or ','} where ADAPTER is your copy of {adapter},".replace(",,", ",")
        adapter = "ADAPTER"
    them = "it" if len(files) == 1 else "them"
    typer.echo(
        f"Start the server with `fidelora serve --base-model {run.model}={base}`{where} and "
        f"{_variables(run, adapter)}. Upload {' and '.join(map(str, files))} or copy {them} to the "
        "server's LoRA folder.",
        err=True,
    )
    if (
        unmerged
        and run.quantization == "none"
        and len({planned.adapters[0].multiplier for planned in recipes}) == 1
    ):
        warn(
            "The samples of this training run have several multipliers, so the trainer left the "
            "LoRA unmerged. A request with one multiplier merges it, which rounds differently. "
            "Leave out --index to request all samples with the unmerged LoRA."
        )
    if (
        run.prediction != "epsilon"
        or run.vae
        or {run.vae_dtype, run.text_encoder_dtype} != {run.dtype}
    ):
        warn(
            "The server has no settings for the prediction type, the VAE or the separate dtypes of "
            "this training run; its images will differ."
        )


def _is_known(base: str, model: str) -> bool:
    """True if a base model is on this machine, or the one from the hub that a family uses."""
    from fidelora.training.base_advice import BUNDLED_BASES
    from fidelora.weights.locate import cached, is_local

    spec = get_family(model)
    on_hub = base in (spec.base_model, *spec.base_aliases)
    # Any other name with one slash may be a path of the trainer's machine.
    return is_local(base) or on_hub or base in BUNDLED_BASES.values() or cached(base) is not None


def _variables(run: TrainingRun, adapter: str) -> str:
    """Return the environment variables of a server that makes the run's samples, as a phrase."""
    values = {
        "DTYPE": run.dtype,
        "QUANTIZATION": run.quantization,
        "TEXT_ENCODER_QUANTIZATION": run.text_encoder_quantization,
        "TRAINING_ADAPTER": adapter and f"{run.model}={adapter}",
    }
    texts = [
        f"FIDELORA_{name}={value}" for name, value in values.items() if value not in ("", "none")
    ]
    noun = "variable" if len(texts) == 1 else "variables"
    return f"the environment {noun} {' '.join(texts)}"


def _read_step(run: TrainingRun, text: str) -> int:
    if text.isdigit():
        return int(text)
    if text != "last":
        raise TrainingRunError(f"{text!r} is not a step; set a number or last.")
    if not run.checkpoints:
        raise TrainingRunError(
            f"The training run {run.name} has no checkpoints, but a request requires a LoRA."
        )
    return max(run.checkpoints)


def _with_zero_multiplier(run: TrainingRun, recipes: list[Recipe]) -> list[Recipe]:
    """Add a LoRA with multiplier 0, which has no effect: the API requires at least one LoRA."""
    if not run.checkpoints:
        raise TrainingRunError(
            f"The training run {run.name} has no checkpoints, but a request requires a LoRA."
        )
    if run.embedding is not None:
        raise TrainingRunError(
            f"Step 0 of the training run {run.name} has the initial embedding, which the trainer "
            "does not save, so no request can reproduce it. Choose another step."
        )
    adapter = AdapterRef.from_file(next(iter(run.checkpoints.values())), 0.0)
    return [replace(recipe, adapters=(adapter,), adapter_mode="merged") for recipe in recipes]
