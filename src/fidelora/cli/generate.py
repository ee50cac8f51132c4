"""`fidelora generate`."""

from __future__ import annotations

import os
import re
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fidelora.adapters.tensor_names import trigger_text
from fidelora.atomic import make_folder
from fidelora.cli.console import (
    INTERRUPTED,
    Debug,
    Device,
    Fidelity,
    FidelityOption,
    SpacingOption,
    fail,
    make_engine,
    progress_bar,
    warn,
)
from fidelora.errors import RecipeError
from fidelora.families import get_family
from fidelora.loras.few_step import proposals
from fidelora.recipe import AdapterRef, Noise, Recipe, replace_trigger

_MAX_IMAGES = 1000


def generate(
    prompt: Annotated[
        str, typer.Argument(help="Prompt; [trigger] is replaced by the trigger word.")
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:MULT]",
            help="LoRA or embedding file and its multiplier, -5..5, by default 1. LoRAs are "
            "applied in order. "
            "If there is a file with the whole name FILE:MULT, it is used with multiplier 1.",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    negative_2: Annotated[
        str | None,
        typer.Option(
            "--negative-2",
            help="Negative prompt of the second text encoder, in models with two; by default the "
            "same as --negative.",
        ),
    ] = None,
    trigger: Annotated[
        str,
        typer.Option(
            help="Trigger word, which replaces [trigger] in the prompt; by default all tokens of "
            "the first embedding."
        ),
    ] = "",
    width: Annotated[
        int | None, typer.Option(help="Width in pixels, 64..4096, rounded down to a multiple of 8.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels, like --width.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Sampling steps, 1..150; `fidelora models` lists the defaults of each family."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale (CFG), 0..100; 1 or less disables guidance."),
    ] = None,
    guidance_rescale: Annotated[
        float,
        typer.Option(help="Guidance rescale, 0..1; reduces overexposure at high guidance."),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; -1 draws a random seed and prints it to stderr."
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Sampler; `fidelora models` lists them.")
    ] = None,
    spacing: Annotated[
        SpacingOption,
        typer.Option(
            help="Timestep spacing: default (the trainer's), trailing or sgm_uniform. Few-step "
            "LoRAs need one of the last two, which only some samplers support."
        ),
    ] = SpacingOption.DEFAULT,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Noise that the sampler adds in each step, 0..1; only for ddim (by default 0) and "
            "tcd (by default 0.3)."
        ),
    ] = None,
    number: Annotated[
        int,
        typer.Option("-n", "--number", help="Number of images, with consecutive seeds, 1..1000."),
    ] = 1,
    out: Annotated[
        str,
        typer.Option(
            help="Output folder, in which no file is replaced, or output file (.png, .jpg or "
            ".webp), which is replaced. If the name of a folder has a dot, add / at the end."
        ),
    ] = ".",
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, jpeg (quality 95) or webp (lossless); by default the suffix of --out, or "
            "png.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model family; `fidelora models` lists them.")
    ] = "sd15",
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id (owner/name or owner/name@revision), diffusers folder, .safetensors "
            "checkpoint or fidelora:miniature; by default that of the model family."
        ),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            help="Variant of the files in a diffusers folder, such as fp16; by default none."
        ),
    ] = "",
    vae: Annotated[
        str, typer.Option(help="VAE: hub id, folder or file; by default that of the base model.")
    ] = "",
    config: Annotated[
        str,
        typer.Option(
            help="Folder with the configurations and the tokenizer of a .safetensors checkpoint; "
            "by default those of the model family."
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="auto (depends on the device), float32, bfloat16 or float16.")
    ] = "auto",
    vae_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the VAE; by default that of --dtype.")
    ] = None,
    text_encoder_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the text encoder; by default that of --dtype.")
    ] = None,
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    offload: Annotated[
        str,
        typer.Option(
            help="Offload mode: none, model (less device memory, slower) or sequential (least, "
            "slowest)."
        ),
    ] = "none",
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Keep adapters unmerged, as the trainer does if its samples have different "
            "multipliers.",
        ),
    ] = False,
    noise: Annotated[
        str,
        typer.Option(
            help="Half-precision noise: modern (torch 2.12 and later), legacy (earlier), or auto, "
            "which depends on the trainer version in the LoRA's metadata."
        ),
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Generate images with LoRAs and write files that contain the recipes."""
    adapters = tuple(_adapter(text) for text in lora or ())
    if not 1 <= number <= _MAX_IMAGES:
        raise RecipeError(f"-n is {number}; it must be from 1 to {_MAX_IMAGES}.", field="number")
    if trigger and "[trigger]" not in prompt and "[name]" not in prompt:
        warn("--trigger has no effect because the prompt does not contain [trigger].")
    if seed == -1:
        seed = secrets.randbelow(2**32)
        typer.echo(f"seed: {seed}", err=True)
    given: dict[str, Any] = {
        "base_model": base_model, "width": width, "height": height, "steps": steps,
        "guidance_scale": guidance, "seed": seed, "sampler": sampler, "eta": eta,
    }  # fmt: skip
    # Check everything that does not need torch first, because loading torch takes seconds.
    recipe = Recipe(
        prompt=replace_trigger(prompt, trigger_text(adapters, trigger)),
        negative_prompt=negative,
        negative_prompt_2=negative_2,
        guidance_rescale=guidance_rescale,
        timestep_spacing=spacing.value,
        model=model,
        variant=variant,
        config=config,
        vae=vae,
        adapters=adapters,
        adapter_mode="live" if live else "merged",
        fidelity=fidelity.value,
        **{name: value for name, value in given.items() if value is not None},
    )
    recipes = [replace(recipe, seed=recipe.seed + index) for index in range(number)]
    for sentence in proposals(recipe):
        typer.echo(f"note: {sentence}", err=True)

    engine = make_engine(device, offload)
    main_dtype = engine.auto_dtype if dtype == "auto" else dtype
    device_settings: dict[str, Any] = {
        "dtype": main_dtype,
        "vae_dtype": vae_dtype or main_dtype,
        "text_encoder_dtype": text_encoder_dtype or main_dtype,
        "noise": _resolve_noise(noise, adapters, model),
    }
    recipes = [replace(recipe, **device_settings) for recipe in recipes]
    target = _parse_out(out, image_format)
    writes: list[Future[Path]] = []
    printed = 0
    try:
        # A thread encodes and writes images while the next ones are generated; the end of the
        # block waits for it.
        with ThreadPoolExecutor(max_workers=1) as writer:
            for first in range(0, number, engine.max_batch(recipe)):
                batch = recipes[first : first + engine.max_batch(recipe)]
                with progress_bar(_title(first, len(batch), number, batch[0].seed)) as on_step:
                    images = engine.generate_batch(batch, on_step)
                for warning in images[0].warnings if first == 0 else ():
                    warn(warning)
                printed += _print_paths(writes[printed:])
                for index, image in enumerate(images, start=first):
                    writes.append(
                        writer.submit(image.save, target.path(image.recipe.seed, index, number))
                    )
            _print_paths(writes[printed:])
    except KeyboardInterrupt:
        _print_paths(writes[printed:])
        fail(f"Interrupted; {len(writes)} of {number} images were written.", INTERRUPTED)


def _title(first: int, count: int, number: int, seed: int) -> str:
    images = f"image {first + 1}" if count == 1 else f"images {first + 1} to {first + count}"
    return f"{images} of {number}, seed {seed}"


def _print_paths(writes: list[Future[Path]]) -> int:
    """Print the paths of written images and return their number; raise errors of failed writes."""
    for write in writes:
        typer.echo(write.result())
    return len(writes)


@dataclass(frozen=True)
class _OutputNames:
    """Names of the output files: a given file, or generated names in a folder."""

    folder: Path
    file: Path | None
    suffix: str

    def path(self, seed: int, index: int, number: int) -> Path:
        """Return the given file, numbered if there are several images, or an unused name."""
        if self.file is not None:
            return (
                self.file if number == 1 else self.file.with_stem(f"{self.file.stem}_{index + 1}")
            )
        path, count = self.folder / f"fidelora_{seed}{self.suffix}", 1
        while path.exists():
            count += 1
            path = self.folder / f"fidelora_{seed}_{count}{self.suffix}"
        return path


def _parse_out(out: str, image_format: str | None) -> _OutputNames:
    """Parse `--out` and `--format`; create the folder and check that it is writable."""
    from fidelora.images.write import format_of, is_image_format, suffix_of

    if image_format is not None and not is_image_format(image_format):
        raise RecipeError(
            f"--format is {image_format!r}; it must be png, jpeg or webp.", field="format"
        )
    path = Path(out).expanduser()
    if out.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        make_folder(path)
        return _OutputNames(path, None, suffix_of(image_format or "png"))  # type: ignore[arg-type]
    format_of_name = format_of(path)
    if image_format not in (None, format_of_name):
        raise RecipeError(
            f"--format {image_format} does not match --out {path.name}; set only one of them.",
            field="format",
        )
    make_folder(path.parent)
    return _OutputNames(path.parent, path, path.suffix)


def _adapter(text: str) -> AdapterRef:
    """Parse `FILE` or `FILE:MULT`; an existing file with the whole name takes precedence."""
    match = re.fullmatch(r"(?P<name>.+):(?P<multiplier>[+-]?(\d+\.?\d*|\.\d+))", text)
    if not text:
        raise RecipeError("--lora is empty; set the name of a file.", field="adapters")
    if match is None or Path(text).expanduser().is_file():
        return AdapterRef.from_file(text)
    return AdapterRef.from_file(match["name"], float(match["multiplier"]))


def _resolve_noise(noise: str, adapters: tuple[AdapterRef, ...], model: str) -> Noise:
    """Return the noise mode; `auto` depends on the trainer version in the first adapter's file."""
    from fidelora.adapters.tensor_names import noise_of_adapter

    if noise != "auto":
        return noise  # type: ignore[return-value]  # checked by the recipe
    if "noise" not in get_family(model).uses:
        return "modern"
    return noise_of_adapter(adapters[0]) if adapters else "modern"
