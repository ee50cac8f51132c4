"""`fidelora inspect`"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.cli.console import Debug

if TYPE_CHECKING:
    from fidelora.engine.examine import Examination

UNUSABLE = 1


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A LoRA, LoKr or LoHa file (.safetensors).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say everything that an adapter's file tells: what it is, how it was trained, what it fits, and what is wrong with it.

    Exit codes: 0 it can be used, 1 it cannot, 2 wrong use.
    """
    from fidelora.engine.examine import examine_adapter

    found = examine_adapter(file.expanduser())
    facts = _facts(file, found)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(file, facts, found)
    if not found.usable:
        raise typer.Exit(UNUSABLE)


def _facts(file: Path, found: Examination) -> dict[str, Any]:
    """What `--json` prints."""
    summary = found.summary
    return {
        "file": file.name,
        "sha256": found.sha256,
        "size_bytes": summary.size_bytes,
        "type": summary.kind,
        "modules": summary.modules,
        "text_encoder": summary.text_encoder,
        "ranks": list(summary.ranks),
        "alphas": [
            alpha if math.isfinite(alpha) else str(alpha) for alpha in found.alphas
        ],  # JSON has no infinity
        "dtype": "+".join(summary.dtypes),
        "step": summary.step,
        "epoch": summary.epoch,
        "trigger": summary.trigger,
        "base_model_version": summary.base,
        "trainer_version": summary.trainer,
        "model": found.model or None,
        "modules_matched": found.matched,
        "modules_of_same_shape": found.same_shapes,
        "problems": [
            {"code": problem.code, "message": problem.message, "unusable": problem.unusable}
            for problem in found.problems
        ],
    }


def _print(file: Path, facts: dict[str, Any], found: Examination) -> None:
    unknown = "-"
    where = "text encoder and UNet" if facts["text_encoder"] else "UNet"
    rows = {
        "type": f"{facts['type']}, {facts['modules']} modules ({where})"
        if facts["type"]
        else unknown,
        "rank": ", ".join(map(str, facts["ranks"])) or unknown,
        "alpha": ", ".join(f"{alpha:g}" for alpha in found.alphas) or unknown,
        "dtype": facts["dtype"] or unknown,
        "step": unknown if facts["step"] is None else facts["step"],
        "epoch": unknown if facts["epoch"] is None else facts["epoch"],
        "trigger": facts["trigger"] or unknown,
        "base model": facts["base_model_version"] or unknown,
        "trainer": facts["trainer_version"] or unknown,
        "fits": f"{found.model}: {found.matched} modules by name, {found.same_shapes} in the shapes of its own base"
        if found.model
        else unknown,
        "size": f"{facts['size_bytes']:,} bytes",
        "sha256": facts["sha256"],
    }
    typer.echo(file.name)
    for name, value in rows.items():
        typer.echo(f"  {name:<11} {value}")
    for problem in found.problems:
        typer.echo(f"  {'problem' if problem.unusable else 'note':<11} {problem.message}")
    if not found.problems:
        typer.echo("  No problems were found.")
