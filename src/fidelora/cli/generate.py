"""`fidelora generate`"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fidelora.cli.console import Debug, Device, warn
from fidelora.errors import RecipeError
from fidelora.recipe import AdapterRef, Noise, Recipe, replace_trigger

if TYPE_CHECKING:
    from fidelora.engine.engine import OnStep, Progress
    from fidelora.engine.output import ImageFormat

_MAX_IMAGES = 1000


def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint; [trigger] stands for the trigger word.")],
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:MULT]", help="Adapter with its multiplier; repeatable, in order.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    trigger: Annotated[str, typer.Option(help="The word that [trigger] in the prompt becomes.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels, 64..4096, floored to a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64..4096, floored to a multiple of 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="1..150.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; no guidance at 1 or less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image; -1 takes a random one and says which.")] = None,
    sampler: Annotated[str | None, typer.Option(help="One of those that `fidelora models` lists.")] = None,
    number: Annotated[int, typer.Option("-n", "--number", help="How many images, with seeds that count up.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A folder, or a file (.png, .jpg, .webp) that is replaced.")] = None,
    image_format: Annotated[str | None, typer.Option("--format", help="png, jpeg or webp (lossless).")] = None,
    model: Annotated[str, typer.Option(help="The model family.")] = "sd15",
    base_model: Annotated[str | None, typer.Option(help="Hub id, diffusers folder or .safetensors checkpoint.")] = None,
    variant: Annotated[str, typer.Option(help="Files of a diffusers folder to use, such as fp16.")] = "",
    vae: Annotated[str, typer.Option(help="Another VAE: hub id, folder or file.")] = "",
    config: Annotated[Path | None, typer.Option(help="Folder with configurations for a .safetensors checkpoint.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    vae_dtype: Annotated[str | None, typer.Option(help="As --dtype if not given.")] = None,
    text_encoder_dtype: Annotated[str | None, typer.Option(help="As --dtype if not given.")] = None,
    device: Device = "auto",
    offload: Annotated[str, typer.Option(help="none, model or sequential.")] = "none",
    live: Annotated[
        bool, typer.Option("--live", help="Run adapters beside the weights, as jobs with several multipliers do.")
    ] = False,
    noise: Annotated[str, typer.Option(help="auto, modern or legacy; matters in half precision only.")] = "auto",
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
    given: dict[str, Any] = {
        "base_model": base_model, "width": width, "height": height, "steps": steps,
        "guidance_scale": guidance, "seed": seed, "sampler": sampler,
    }  # fmt: skip
    # Everything that needs no torch is checked first: a mistake should not cost the seconds that torch takes to load.
    recipe = Recipe(
        prompt=replace_trigger(prompt, trigger),
        negative_prompt=negative,
        model=model,
        variant=variant,
        vae=vae,
        adapters=adapters,
        adapter_mode="live" if live else "merged",
        **{name: value for name, value in given.items() if value is not None},
    )
    if offload not in ("none", "model", "sequential"):
        raise RecipeError(f"--offload is {offload!r}; it has to be none, model or sequential.", field="offload")

    from fidelora.engine.engine import Engine
    from fidelora.engine.output import suffix_of

    chosen_format = _format(image_format, out)
    engine = Engine(device=device, offload=offload, config=config)  # type: ignore[arg-type]
    main_dtype = engine.auto_dtype if dtype == "auto" else dtype
    numerics: dict[str, Any] = {
        "dtype": main_dtype,
        "vae_dtype": vae_dtype or main_dtype,
        "text_encoder_dtype": text_encoder_dtype or main_dtype,
        "noise": _noise(noise, adapters),
    }
    recipe = replace(recipe, **numerics)
    for index in range(number):
        one = replace(recipe, seed=recipe.seed + index)
        with _progress(f"image {index + 1} of {number}, seed {one.seed}") as on_step:
            image = engine.generate(one, on_step)
        for warning in image.warnings if index == 0 else ():
            warn(warning)
        path = _place(out, index, number, f"fidelora_{one.seed}", suffix_of(chosen_format))
        image.save(path)
        typer.echo(path)


def _adapter(text: str) -> AdapterRef:
    """`FILE` or `FILE:MULT`; a colon that no number follows is part of the name."""
    name, colon, multiplier = text.rpartition(":")
    try:
        value = float(multiplier) if colon else None
    except ValueError:
        value = None
    return AdapterRef.from_file(name, value) if value is not None else AdapterRef.from_file(text)


def _noise(noise: str, adapters: tuple[AdapterRef, ...]) -> Noise:
    """`auto` asks the first adapter's file which trainer, and so which torch, its previews were made with."""
    from fidelora.adapters.formats import noise_of_trainer
    from fidelora.weights_file import read_header_of

    if noise != "auto":
        return noise  # type: ignore[return-value]  # the recipe checks it
    if not adapters or adapters[0].path is None:
        return "modern"
    return noise_of_trainer(read_header_of(adapters[0].path).metadata)


def _format(image_format: str | None, out: Path | None) -> ImageFormat:
    from fidelora.engine.output import format_of, is_image_format

    if image_format is not None and not is_image_format(image_format):
        raise RecipeError(f"--format is {image_format!r}; it has to be png, jpeg or webp.", field="format")
    if out is None or not out.suffix or out.is_dir():
        return image_format or "png"  # type: ignore[return-value]
    by_name = format_of(out)
    if image_format not in (None, by_name):
        raise RecipeError(f"--format {image_format} and --out {out.name} say different things; give one of them.", field="format")
    return by_name


def _place(out: Path | None, index: int, number: int, stem: str, suffix: str) -> Path:
    """Where an image goes: the file that was named (numbered if there are several), or a free name in a folder."""
    if out is not None and out.suffix and not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        return out if number == 1 else out.with_stem(f"{out.stem}_{index + 1}")
    folder = out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    path, count = folder / f"{stem}{suffix}", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}_{count}{suffix}"
    return path


@contextmanager
def _progress(title: str) -> Iterator[OnStep | None]:
    """A bar with the time that is left; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def on_step(progress: Progress) -> None:
            bar.update(task, completed=progress.step, total=progress.steps)

        yield on_step
