"""`fidelora generate`"""

from __future__ import annotations

import os
import re
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fidelora.atomic import make_folder
from fidelora.cli.console import (
    INTERRUPTED,
    Debug,
    Device,
    Fidelity,
    FidelityOption,
    fail,
    make_engine,
    progress_bar,
    warn,
)
from fidelora.errors import RecipeError
from fidelora.recipe import AdapterRef, Noise, Recipe, replace_trigger

_MAX_IMAGES = 1000


def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to paint; [trigger] stands for the trigger word.")
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:MULT]",
            help="Adapter with its multiplier, -2..2, 1 if not given; applied in order. A file of the whole name goes before that.",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    negative_2: Annotated[
        str | None,
        typer.Option(
            "--negative-2",
            help="The same for the second text encoder of models with two, if it differs.",
        ),
    ] = None,
    trigger: Annotated[
        str, typer.Option(help="The word that [trigger] in the prompt becomes.")
    ] = "",
    width: Annotated[
        int | None, typer.Option(help="Pixels, 64..4096, floored to a multiple of 8.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, as the width.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="1..150; like the other settings, by default what `fidelora models` says."
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 0..100; no guidance at 1 or less.")
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0..1; takes back the overexposure of high guidance.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the first image; -1 takes a random one and says which on stderr."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="One of those that `fidelora models` lists.")
    ] = None,
    number: Annotated[
        int, typer.Option("-n", "--number", help="How many images, with seeds that count up.")
    ] = 1,
    out: Annotated[
        str,
        typer.Option(
            help="A folder (names are chosen and nothing is replaced; end it in / if its name has a dot), or a file (.png, .jpg, "
            ".webp), which is replaced."
        ),
    ] = ".",
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, jpeg (quality 95) or webp (lossless); by default as --out says, else png.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="The model family.")] = "sd15",
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id (owner/name, owner/name@revision), diffusers folder, .safetensors checkpoint or fidelora:miniature; by "
            "default the family's own."
        ),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            help="Files of a diffusers folder to use, such as fp16; by default the plain ones."
        ),
    ] = "",
    vae: Annotated[
        str, typer.Option(help="Another VAE: hub id, folder or file; by default the base's own.")
    ] = "",
    config: Annotated[
        str,
        typer.Option(
            help="Folder with configurations and tokenizer for a .safetensors checkpoint; by default the family's own."
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto goes by the device.")
    ] = "auto",
    vae_dtype: Annotated[str | None, typer.Option(help="As --dtype if not given.")] = None,
    text_encoder_dtype: Annotated[str | None, typer.Option(help="As --dtype if not given.")] = None,
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    offload: Annotated[
        str, typer.Option(help="none, model or sequential: memory of the device against time.")
    ] = "none",
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Run adapters beside the weights, as jobs with several multipliers do."
        ),
    ] = False,
    noise: Annotated[
        str,
        typer.Option(
            help="auto, modern or legacy: how half-precision noise is drawn; auto asks the LoRA's file."
        ),
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Paint images with LoRAs, and write them with their recipe inside."""
    adapters = tuple(_adapter(text) for text in lora or ())
    if not 1 <= number <= _MAX_IMAGES:
        raise RecipeError(f"-n is {number}; it has to be from 1 to {_MAX_IMAGES}.", field="number")
    if trigger and "[trigger]" not in prompt and "[name]" not in prompt:
        warn("--trigger has no effect: the prompt has no [trigger] that it could stand for.")
    if seed == -1:
        seed = secrets.randbelow(2**32)
        typer.echo(f"seed: {seed}", err=True)
    given: dict[str, Any] = {
        "base_model": base_model, "width": width, "height": height, "steps": steps,
        "guidance_scale": guidance, "seed": seed, "sampler": sampler,
    }  # fmt: skip
    # Everything that needs no torch is checked first: a mistake should not cost the seconds that torch takes to load.
    recipe = Recipe(
        prompt=replace_trigger(prompt, trigger),
        negative_prompt=negative,
        negative_prompt_2=negative_2,
        guidance_rescale=guidance_rescale,
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

    engine = make_engine(device, offload)
    main_dtype = engine.auto_dtype if dtype == "auto" else dtype
    server_defaults: dict[str, Any] = {
        "dtype": main_dtype,
        "vae_dtype": vae_dtype or main_dtype,
        "text_encoder_dtype": text_encoder_dtype or main_dtype,
        "noise": _noise(noise, adapters),
    }
    recipes = [replace(one, **server_defaults) for one in recipes]
    target = _target(out, image_format)
    writes: list[Future[Path]] = []
    said = 0
    try:
        # Images are encoded and written by another thread while the next ones are made; leaving the block waits for it.
        with ThreadPoolExecutor(max_workers=1) as writer:
            for first in range(0, number, engine.max_batch(recipe)):
                batch = recipes[first : first + engine.max_batch(recipe)]
                with progress_bar(_title(first, len(batch), number, batch[0].seed)) as on_step:
                    images = engine.generate_batch(batch, on_step)
                for warning in images[0].warnings if first == 0 else ():
                    warn(warning)
                said += _say_where(writes[said:])
                for index, image in enumerate(images, start=first):
                    writes.append(
                        writer.submit(image.save, target.path(image.recipe.seed, index, number))
                    )
            _say_where(writes[said:])
    except KeyboardInterrupt:
        _say_where(writes[said:])
        fail(f"Interrupted; {len(writes)} of {number} images were written.", INTERRUPTED)


def _title(first: int, count: int, number: int, seed: int) -> str:
    which = f"image {first + 1}" if count == 1 else f"images {first + 1} to {first + count}"
    return f"{which} of {number}, seed {seed}"


def _say_where(writes: list[Future[Path]]) -> int:
    """Print the places of written images; what went wrong with one is raised here."""
    for write in writes:
        typer.echo(write.result())
    return len(writes)


@dataclass(frozen=True)
class _Target:
    """Where images go: one file that was named, or names of our choice in a folder."""

    folder: Path
    file: Path | None
    suffix: str

    def path(self, seed: int, index: int, number: int) -> Path:
        """The named file, numbered if there are several; or a name in the folder that is free."""
        if self.file is not None:
            return (
                self.file if number == 1 else self.file.with_stem(f"{self.file.stem}_{index + 1}")
            )
        path, count = self.folder / f"fidelora_{seed}{self.suffix}", 1
        while path.exists():
            count += 1
            path = self.folder / f"fidelora_{seed}_{count}{self.suffix}"
        return path


def _target(out: str, image_format: str | None) -> _Target:
    """What `--out` and `--format` mean; the folder is made, and tried, before any image is computed."""
    from fidelora.images.write import format_of, is_image_format, suffix_of

    if image_format is not None and not is_image_format(image_format):
        raise RecipeError(
            f"--format is {image_format!r}; it has to be png, jpeg or webp.", field="format"
        )
    path = Path(out).expanduser()
    if out.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        make_folder(path)
        return _Target(path, None, suffix_of(image_format or "png"))  # type: ignore[arg-type]
    by_name = format_of(path)
    if image_format not in (None, by_name):
        raise RecipeError(
            f"--format {image_format} and --out {path.name} say different things; give one of them.",
            field="format",
        )
    make_folder(path.parent)
    return _Target(path.parent, path, path.suffix)


def _adapter(text: str) -> AdapterRef:
    """`FILE` or `FILE:MULT`; a colon that no number follows, and the name of a file that exists, are taken as they are."""
    match = re.fullmatch(r"(?P<name>.+):(?P<multiplier>[+-]?(\d+\.?\d*|\.\d+))", text)
    if not text:
        raise RecipeError("--lora needs the name of a file.", field="adapters")
    if match is None or Path(text).expanduser().is_file():
        return AdapterRef.from_file(text)
    return AdapterRef.from_file(match["name"], float(match["multiplier"]))


def _noise(noise: str, adapters: tuple[AdapterRef, ...]) -> Noise:
    """`auto` asks the first adapter's file which trainer, and so which torch, its previews were made with."""
    from fidelora.adapters.tensor_names import noise_of_file

    if noise != "auto":
        return noise  # type: ignore[return-value]  # the recipe checks it
    return noise_of_file(adapters[0].path) if adapters and adapters[0].path else "modern"
