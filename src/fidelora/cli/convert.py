"""`fidelora convert`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fidelora.atomic import write_atomically
from fidelora.cli.console import warn
from fidelora.cli.options import AsJson, Debug
from fidelora.errors import AdapterExistsError, AdapterNameError

_SUFFIX = ".safetensors"


class FormatOption(StrEnum):
    """Values of `--to`."""

    KOHYA = "kohya"
    PEFT = "peft"
    DIFFUSERS = "diffusers"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Adapter file, such as a LoRA.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="New file, whose name ends in .safetensors.")
    ],
    to: Annotated[
        FormatOption,
        typer.Option(
            help="kohya (for AUTOMATIC1111, Forge, ComfyUI), or peft (for diffusers, PEFT); "
            "diffusers is another name of peft."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model family of the adapter; by default, the modules in the file determine it. "
            "`fidelora models` lists the families."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter with the tensor names of another program; its tensors are copied unchanged.

    Exit codes: 0 done, 1 the adapter cannot be read or converted, 2 a usage error.
    """
    from fidelora.engine.convert import convert_adapter

    source, target = source.expanduser(), target.expanduser()
    if target.suffix.lower() != _SUFFIX:
        raise AdapterNameError(
            f"{target.name} does not end in {_SUFFIX}; choose another name for OUT."
        )
    if target.exists() and not force:
        raise AdapterExistsError(
            f"{target} exists; choose another name, or add --force to replace it."
        )
    to = FormatOption.PEFT if to is FormatOption.DIFFUSERS else to
    result = convert_adapter(source, to.value, model)  # type: ignore[arg-type]
    write_atomically(target, result.content)
    for note in result.notes:
        warn(note)
    if as_json:
        document = {
            "input": source.name,
            "input_sha256": result.source_sha256,
            "output": str(target),
            "output_sha256": result.sha256,
            "to": to.value,
            "model": result.model,
            "type": result.kind,
            "modules": result.modules,
            "notes": list(result.notes),
        }
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        typer.echo(str(target))
