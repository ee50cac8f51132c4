"""docs/models/index.md: every model family, from the data in `fidelora.families`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fidelora.adapters import tensor_names as keys
from fidelora.families import Family, NoiseSampler, all_families

_ABOUT = """
The families of models, as `fidelora models` and `GET /v1/models` list them, with what is used for whatever a recipe or a request
leaves out. (Over HTTP the size is 1024x1024 if it is left out, as that API documents.)
""".strip()
_ABOUT_BASES = """
A base model of a family is a hub id, a folder in the layout of diffusers or one `.safetensors` checkpoint. One comes along:
[`fidelora:miniature`](miniature.md), a Stable Diffusion 1.5 of 19 MB, for tests and first steps.
""".strip()

_KIND_TITLES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "dora": "DoRA"}


def catalog_page(made: str, folder: Path) -> str:
    """Every family with its defaults, its parts, its samplers and what its adapters look like.

    Args:
        folder: where each family has a page of its own, named by its id.

    Raises:
        ValueError: one has none.
    """
    lines = ["# Models", "", made, "", _ABOUT, ""]
    lines += [
        "| id | family | base model | size | steps | guidance | sampler |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in all_families().values():
        if not (folder / f"{spec.id}.md").is_file():
            raise ValueError(
                f"docs/models/{spec.id}.md is missing: a family has a page that says what its previews are"
            )
        lines.append(
            f"| `{spec.id}` | [{spec.title}]({spec.id}.md) | `{spec.base_model}` | {spec.default_size} | {spec.default_steps} "
            f"| {spec.default_guidance_scale:g} | `{spec.default_sampler}` |"
        )
    lines += ["", _ABOUT_BASES, ""]
    for spec in all_families().values():
        lines += _family(spec)
    return "\n".join(lines).rstrip() + "\n"


def _family(spec: Family) -> Iterator[str]:
    also = (
        f" (also as {', '.join(f'`{name}`' for name in spec.base_aliases)})"
        if spec.base_aliases
        else ""
    )
    yield from [f"## {spec.title}", ""]
    yield f"* id `{spec.id}`; [what its previews are, and how near we come]({spec.id}.md)"
    yield f"* base model: `{spec.base_model}`{also}"
    yield f"* size: {spec.default_size}x{spec.default_size}; width and height are floored to multiples of {spec.resolution_divisor}"
    yield (
        f"* {spec.default_steps} steps, guidance {spec.default_guidance_scale:g}, seed {spec.default_seed}, sampler "
        f"`{spec.default_sampler}`"
    )
    kinds = ", ".join(_KIND_TITLES.get(kind, kind) for kind in dict.fromkeys(keys._KINDS.values()))
    yield f"* adapters: {kinds}, in `.safetensors` files whose modules begin with"
    for part in spec.parts:
        if part.adapter_prefixes:
            yield f"    * {', '.join(f'`{prefix}`' for prefix in part.adapter_prefixes)}: {part.name.replace('_', ' ')}"
    versions = ", ".join(f"`{version}`" for version in spec.adapter_base_versions)
    yield f"* such a file calls its base model (`ss_base_model_version`) {versions}"
    yield f"* parts: {', '.join(f'{part.name} (`{part.class_name}` of {part.library})' for part in spec.parts)}"
    yield from ["", "| sampler | computed by, of diffusers | at most |", "|---|---|---|"]
    common = spec.samplers[spec.default_sampler].config
    for sampler in spec.samplers.values():
        own = {name: value for name, value in sampler.config.items() if common.get(name) != value}
        options = ", ".join(f"`{name}={value}`" for name, value in own.items())
        scheduler = sampler.scheduler if isinstance(sampler, NoiseSampler) else "FlowSchedule"
        yield f"| `{sampler.name}` | `{scheduler}`{f' with {options}' if options else ''} | {sampler.max_steps} steps |"
    yield ""
