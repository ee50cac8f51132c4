"""Generate docs/models/index.md: every model family, from the data in `fidelora.families`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fidelora.adapters.formats import KINDS
from fidelora.families import Family, NoiseSampler, all_families
from fidelora.training.run_folder import read_run

_ABOUT = """
The model families, as listed by `fidelora models` and `GET /v1/models`, with the defaults for
fields that a recipe or request leaves out. (Over HTTP the default size is 1024x1024, as in the API
of `ai-toolkit-inference`.)
""".strip()
_ABOUT_BASES = """
A base model is a hub id, a diffusers folder or one `.safetensors` checkpoint. One base model is
part of the package: [`fidelora:miniature`](miniature.md), a Stable Diffusion 1.5 model of 19 MB for
tests and first steps.
""".strip()

_ABOUT_EVIDENCE = """
## Evidence

The golden training runs were made by AI Toolkit on a CPU, with small base models of the real
classes and file layouts and with random weights. The tests replay them. The page of each family
states how many pixels are identical, and on which processors. Published weights and GPUs were not
tried. The last column is what `match: trainer` changes in a request: without it, the default number
of steps and the size divisor are those of `ai-toolkit-inference`.
""".strip()

_KIND_TITLES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "lokr": "LoKr",
    "loha": "LoHa",
    "glora": "GLoRA",
    "oft": "OFT and BOFT",
    "ia3": "(IA)^3",
    "full": "differences of weights and biases",
    "norm": "norms",
}


def catalog_page(note: str, folder: Path, goldens: Path) -> str:
    """Return the catalog of families with their defaults, components, samplers and adapters.

    Args:
        note: note that the page is generated.
        goldens: folder with the golden training runs.
        folder: contains a page for each family, named by its id. Families with the same
            implementation can share the page of one of them.

    Raises:
        ValueError: a family has no page.
    """
    lines = ["# Models", "", note, "", _ABOUT, ""]
    lines += [
        "| id | family | base model | size | steps | guidance | sampler |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in all_families().values():
        lines.append(
            f"| `{spec.id}` | [{spec.title}]({_page_of(spec, folder)}) | `{spec.base_model}` "
            f"| {spec.default_size} | {spec.default_steps} | {spec.default_guidance_scale:g} "
            f"| `{spec.default_sampler}` |"
        )
    lines += ["", _ABOUT_BASES, "", _ABOUT_EVIDENCE, "", *_evidence(goldens), ""]
    for spec in all_families().values():
        lines += _family(spec, _page_of(spec, folder))
    return "\n".join(lines).rstrip() + "\n"


def _evidence(goldens: Path) -> Iterator[str]:
    runs: dict[str, list[str]] = {}
    for folder in sorted(one for one in goldens.iterdir() if (one / "config.yaml").is_file()):
        runs.setdefault(read_run(folder).model, []).append(f"`{folder.name}`")
    yield "| id | golden training runs | with `match: trainer` |"
    yield "|---|---|---|"
    for spec in all_families().values():
        names = ", ".join(runs.get(spec.id, ()))
        if not names:
            alike = [one for one in all_families().values() if one.denoiser == spec.denoiser]
            same = next((one.id for one in alike if one.id in runs), "")
            names = f"none; the code is that of `{same}`" if same else "none"
        changes = []
        if spec.trainer_sampling.default_steps != spec.default_steps:
            changes.append(
                f"{spec.trainer_sampling.default_steps} steps instead of {spec.default_steps}"
            )
        if spec.request_divisor != spec.resolution_divisor:
            changes.append(
                f"multiples of {spec.resolution_divisor} instead of {spec.request_divisor}"
            )
        yield f"| `{spec.id}` | {names} | {', '.join(changes) or 'nothing'} |"


def _page_of(spec: Family, folder: Path) -> str:
    """Return the file name of the page about a family's samples."""
    alike = [one.id for one in all_families().values() if one.denoiser == spec.denoiser]
    for name in (spec.id, *alike):
        if (folder / f"{name}.md").is_file():
            return f"{name}.md"
    raise ValueError(
        f"docs/models/{spec.id}.md is missing: every family needs a page about its samples"
    )


def _family(spec: Family, page: str) -> Iterator[str]:
    also = (
        f" (also as {', '.join(f'`{name}`' for name in spec.base_aliases)})"
        if spec.base_aliases
        else ""
    )
    yield from [f"## {spec.title}", ""]
    yield f"* id `{spec.id}`; [how its samples are made and reproduced]({page})"
    yield f"* base model: `{spec.base_model}`{also}"
    over_http = f" (over HTTP: of {spec.api_divisor})" if spec.api_divisor else ""
    yield (
        f"* size: {spec.default_size}x{spec.default_size}; width and height are rounded down to "
        f"multiples of {spec.resolution_divisor}{over_http}"
    )
    if spec.makes_videos:
        yield (
            "* videos and still images; over HTTP, the defaults are "
            f"{spec.default_frames} frames and {spec.default_fps} frames per second"
        )
    yield (
        f"* {spec.default_steps} steps, guidance {spec.default_guidance_scale:g}, "
        f"seed {spec.default_seed}, sampler `{spec.default_sampler}`"
    )
    kinds = ", ".join(_KIND_TITLES.get(kind, kind) for kind in KINDS)
    yield (
        f"* adapters: [{kinds}](adapter-formats.md), in `.safetensors` files with these prefixes "
        "of tensor names:"
    )
    for component in spec.parts:
        if component.adapter_prefixes:
            prefixes = ", ".join(
                f"`{prefix}`" if prefix else "no prefix" for prefix in component.adapter_prefixes
            )
            yield f"    * {prefixes}: {component.name.replace('_', ' ')}"
    versions = ", ".join(f"`{version}`" for version in spec.adapter_base_versions)
    yield f"* base model in the adapter's metadata (`ss_base_model_version`): {versions}"
    parts = (f"{part.name} (`{part.class_name}` of {part.library})" for part in spec.parts)
    yield f"* components: {', '.join(parts)}"
    yield from [
        "",
        "| sampler | scheduler of diffusers | maximum | timestep spacings | eta |",
        "|---|---|---|---|---|",
    ]
    common = spec.samplers[spec.default_sampler].config
    for sampler in spec.samplers.values():
        own = {name: value for name, value in sampler.config.items() if common.get(name) != value}
        options = ", ".join(f"`{name}={value}`" for name, value in own.items())
        if isinstance(sampler, NoiseSampler):
            computed_by = f"`{sampler.scheduler}`"
        elif sampler.config.get("scheduler", True):
            computed_by = "`FlowMatchEulerDiscreteScheduler`"
        else:
            computed_by = "none"
        scheduler = f"{computed_by}{f' with {options}' if options else ''}"
        spacings = ", ".join(f"`{one}`" for one in ("default", *sorted(sampler.spacings)))
        eta = "" if sampler.eta is None else f"0..1, by default {sampler.eta:g}"
        yield f"| `{sampler.name}` | {scheduler} | {sampler.max_steps} steps | {spacings} | {eta} |"
    yield ""
