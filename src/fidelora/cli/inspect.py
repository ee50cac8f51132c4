"""`fidelora inspect`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.adapter_ref import stage_in_name
from fidelora.cli.options import AsJson, Debug
from fidelora.families import get_family
from fidelora.loras.few_step import Recognised, proposal, recognise_few_step_lora
from fidelora.recipe import short_name
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.engine.examine import Examination

UNUSABLE = 1  # exit code


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="LoRA, LoKr, LoHa or embedding file.")
    ],
    base_model: Annotated[
        str,
        typer.Option(
            "--base-model",
            "--base",
            metavar="BASE",
            help="Compare the adapter with this base model: hub id, diffusers folder, .safetensors "
            "checkpoint or fidelora:miniature; by default with those of all model families.",
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Model family of --base-model; by default the adapter's."
        ),
    ] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describe an adapter file: its type, training, matching model and problems.

    Exit codes: 0 the file can be used, 1 it cannot be used, 2 a usage error.
    """
    from fidelora.engine.examine import examine_adapter

    if model and not base_model:
        raise typer.BadParameter("--model is the family of --base-model; give both.")
    result = examine_adapter(file.expanduser(), base_model, model)
    few_step = recognise_few_step_lora(file.stem, result.sha256)
    document = _document(file, result, few_step)
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _print(file, document, result, base_model)
        if few_step is not None:
            typer.echo(f"  {'few steps':<11} {printable(proposal(file.stem, few_step))}")
    if not result.usable:
        raise typer.Exit(UNUSABLE)


def _document(file: Path, result: Examination, few_step: Recognised | None) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    summary = result.summary
    return {
        "file": file.name,
        "sha256": result.sha256,
        "size_bytes": summary.size_bytes,
        "type": summary.kind,
        "modules": summary.modules,
        "tokens": summary.tokens,
        "text_encoder": summary.text_encoder,
        "ranks": list(summary.ranks),
        # JSON does not support infinity.
        "alphas": [alpha if math.isfinite(alpha) else str(alpha) for alpha in result.alphas],
        "dtype": "+".join(summary.dtypes),
        "step": summary.step,
        "epoch": summary.epoch,
        "trigger": summary.trigger,
        "base_model_version": summary.base,
        "trainer_version": summary.trainer,
        "model": result.model or None,
        "stage": stage_in_name(file.stem) if _has_stages(result) else None,
        "modules_matched": result.matched,
        "modules_of_same_shape": result.same_shapes,
        "few_step": None
        if few_step is None
        else {
            "name": few_step.lora.name,
            "recognised_by": few_step.by,
            "recommended": asdict(few_step.lora.settings),
        },
        "problems": [
            {"code": problem.code, "message": problem.message, "unusable": problem.unusable}
            for problem in result.problems
        ],
    }


def _print(file: Path, document: dict[str, Any], result: Examination, base_model: str) -> None:
    unknown = "-"
    rows = {
        "type": _contents(document) or unknown,
        "rank": ", ".join(map(str, document["ranks"])) or unknown,
        "alpha": ", ".join(f"{alpha:g}" for alpha in result.alphas) or unknown,
        "dtype": document["dtype"] or unknown,
        "step": unknown if document["step"] is None else document["step"],
        "epoch": unknown if document["epoch"] is None else document["epoch"],
        "trigger": document["trigger"] or unknown,
        "base model": document["base_model_version"] or unknown,
        "trainer": document["trainer_version"] or unknown,
        "fits": _fit(document, result, base_model) or unknown,
        **({"stage": _stage(document["stage"])} if _has_stages(result) else {}),
    }
    if not document["type"]:  # not an adapter: nothing else is known about it
        rows = {}
    rows |= {"size": f"{document['size_bytes']:,} bytes", "sha256": document["sha256"]}
    typer.echo(printable(file.name))
    for name, value in rows.items():
        typer.echo(f"  {name:<11} {printable(str(value))}")
    for problem in result.problems:
        kind = "problem" if problem.unusable else "note"
        typer.echo(f"  {kind:<11} {printable(problem.message)}")
    if not result.problems:
        typer.echo("  No problems were found.")


def _has_stages(result: Examination) -> bool:
    return bool(result.model) and bool(get_family(result.model).stages)


def _stage(stage: str | None) -> str:
    if stage is None:
        return "unknown: the file name contains neither high_noise nor low_noise"
    return f"{stage} noise, by the file name"


def _fit(document: dict[str, Any], result: Examination, base_model: str) -> str:
    """Return the number of matching modules as a phrase; empty if no family has any of them."""
    if not result.model:
        return ""
    total = document["modules"] or result.matched
    things = "modules" if document["modules"] else "tensors"
    base = short_name(base_model) if base_model else f"{result.model}'s default base model"
    if result.same_shapes == total:
        return f"{base}: all {total} {things}"
    return (
        f"not {base}: {result.matched} of {total} {things} have its names, "
        f"{result.same_shapes or 'none'} also its shapes"
    )


def _contents(document: dict[str, Any]) -> str:
    """Return type, number of modules and tokens as a phrase; empty if it is not an adapter."""
    if not document["type"]:
        return ""
    parts = _denoiser(document["model"])
    if document["text_encoder"]:
        parts = f"text encoder and {parts}"
    phrases = [document["type"]]
    if document["modules"]:
        phrases.append(f"{document['modules']} modules ({parts})")
    if document["tokens"]:
        phrases.append(f"{document['tokens']} tokens")
    return ", ".join(phrases)


def _denoiser(model: str | None) -> str:
    """Return the name of the part that an adapter changes in this family."""
    if model is None:
        return "UNet or transformer"
    return get_family(model).part("denoiser").title
