"""`fidelora models`."""

from __future__ import annotations

import json

import typer

from fidelora.cli.options import Debug
from fidelora.families import Family, all_families


def list_models(
    as_json: bool = typer.Option(False, "--json", help="Print a JSON array."), debug: Debug = False
) -> None:
    """List the model families with their base models, defaults and samplers."""
    if as_json:
        typer.echo(json.dumps([_document(spec) for spec in all_families().values()], indent=2))
        return
    for spec in all_families().values():
        typer.echo(f"{spec.id}  {spec.title}")
        aliases = f" (also: {', '.join(spec.base_aliases)})" if spec.base_aliases else ""
        typer.echo(f"    base model  {spec.base_model}{aliases}")
        typer.echo(
            f"    defaults    {spec.default_size}x{spec.default_size}, {spec.default_steps} steps, "
            f"guidance {spec.default_guidance_scale:g}, seed {spec.default_seed}, "
            f"sampler {spec.default_sampler}"
        )
        typer.echo(f"    sizes       multiples of {spec.resolution_divisor}")
        if spec.makes_videos:
            step = spec.frames_per_latent
            typer.echo(f"    frames      1 (default), {1 + step}, {1 + 2 * step}, ...")
        typer.echo(f"    samplers    {' '.join(spec.samplers)}")
        for title, names in _options_of_samplers(spec).items():
            typer.echo(f"    {title:<11} {' '.join(names)}")


def _document(spec: Family) -> dict[str, object]:
    """Return the entry of a family in the output of `--json`."""
    return {
        "id": spec.id,
        "title": spec.title,
        "base_model": spec.base_model,
        "base_aliases": list(spec.base_aliases),
        "resolution_divisor": spec.resolution_divisor,
        "default_size": spec.default_size,
        "default_steps": spec.default_steps,
        "default_guidance_scale": spec.default_guidance_scale,
        "default_seed": spec.default_seed,
        "default_sampler": spec.default_sampler,
        "makes_videos": spec.makes_videos,
        "samplers": list(spec.samplers),
        "samplers_with": _options_of_samplers(spec),
    }


def _options_of_samplers(spec: Family) -> dict[str, list[str]]:
    """Return the samplers that support `trailing`, `sgm_uniform` and `eta`, by these names."""
    found: dict[str, list[str]] = {}
    for spacing in ("trailing", "sgm_uniform"):
        found[spacing] = [name for name, one in spec.samplers.items() if spacing in one.spacings]
    found["eta"] = [name for name, one in spec.samplers.items() if one.eta is not None]
    return {title: names for title, names in found.items() if names}
