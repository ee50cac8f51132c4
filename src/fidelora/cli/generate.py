"""`fidelora generate`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fidelora.cli import generate_options as options
from fidelora.cli.console import make_output_folder
from fidelora.cli.engines import image_maker
from fidelora.cli.image_plan import (
    MAX_IMAGES,
    adapter_sets,
    plan_recipes,
    read_prompts,
    read_size,
    resolve_noise,
    size_notes,
    trigger_remarks,
    with_dtypes,
)
from fidelora.cli.options import (
    ConfigFolder,
    Debug,
    Device,
    Fidelity,
    FidelityOption,
    Offload,
    QuantizationOption,
    SpacingOption,
    Variant,
)
from fidelora.cli.output_names import OutputNames, parse_output
from fidelora.cli.rendering import PlannedImage, Report, check_base, print_plan, render
from fidelora.errors import RecipeError
from fidelora.families import get_family
from fidelora.loras.few_step import proposals
from fidelora.recipe import AdapterRef, Recipe


def generate(
    prompt: options.Prompt = None,
    prompts: options.PromptFile = None,
    lora: options.Loras = None,
    trigger: options.Trigger = None,
    seed: options.Seed = None,
    number: options.Number = 1,
    out: options.Output = ".",
    image_format: options.ImageFormat = None,
    as_json: options.ImagesAsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    size: options.Size = None,
    width: options.Width = None,
    height: options.Height = None,
    frames: options.Frames = 1,
    fps: options.Fps = 16,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    guidance_rescale: options.GuidanceRescale = 0.0,
    sampler: options.Sampler = None,
    spacing: options.Spacing = SpacingOption.DEFAULT,
    eta: options.Eta = None,
    negative: options.Negative = "",
    negative_2: options.SecondNegative = None,
    emphasis: options.EmphasisKind = "none",
    model: options.Model = "sd15",
    base_model: options.BaseModel = None,
    variant: Variant = "",
    vae: options.Vae = "",
    vae_tiling: options.VaeTiling = False,
    config: ConfigFolder = "",
    dtype: options.Dtype = "auto",
    vae_dtype: options.VaeDtype = None,
    text_encoder_dtype: options.TextEncoderDtype = None,
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    offload: Offload = "none",
    live: options.Live = False,
    noise: options.Noise = "auto",
    quantization: options.Quantization = QuantizationOption.NONE,
    text_encoder_quantization: options.TextEncoderQuantization = QuantizationOption.NONE,
    training_adapter: options.TrainingAdapter = None,
    debug: Debug = False,
) -> None:
    """Generate images with LoRAs and write files that contain the recipes.

    Several --lora options are applied together, to each image. If an option names a folder or a
    pattern, or there are several prompts, every combination is made, with the same seeds.
    """
    # Check everything that does not need torch first, because loading torch takes seconds.
    report = Report(quiet, as_json)
    texts = read_prompts(prompt, prompts)
    sets = adapter_sets(lora or ())
    if not 1 <= number <= MAX_IMAGES:
        raise RecipeError(f"-n is {number}; it must be from 1 to {MAX_IMAGES}.", field="number")
    optional = {
        "base_model": base_model,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": _choose_seed(seed, report),
        "sampler": sampler,
        "eta": eta,
    }
    asked_size = read_size(size, width, height)
    settings: dict[str, Any] = {
        "negative_prompt": _usable_negative(negative, model, report),
        "negative_prompt_2": negative_2,
        "emphasis": emphasis,
        "guidance_rescale": guidance_rescale,
        "timestep_spacing": spacing.value,
        "model": model,
        "variant": variant,
        "config": config,
        "vae": vae,
        # The trainer never merges adapters into quantised weights.
        "adapter_mode": "live" if live or quantization is not QuantizationOption.NONE else "merged",
        "quantization": quantization.value,
        "text_encoder_quantization": text_encoder_quantization.value,
        "training_adapters": ()
        if training_adapter is None
        else (AdapterRef.from_file(training_adapter.expanduser()),),
        "vae_tiling": vae_tiling,
        "fidelity": fidelity.value,
        "frames": frames,
        "fps": fps,
        **asked_size,
        **{name: value for name, value in optional.items() if value is not None},
    }
    planned = plan_recipes(
        texts, sets, trigger, number, lambda one: resolve_noise(noise, one, model), settings
    )
    report.add(*trigger_remarks(texts, sets, trigger))
    report.add(size_notes(asked_size, planned[0][0]), ())
    names = parse_output(
        out,
        image_format,
        prompts=len(texts),
        adapter_sets=len(sets),
        frames=planned[0][0].frames,
    )
    for adapters in planned:
        report.add([f"note: {sentence}" for sentence in proposals(adapters[0])], ())

    first = None
    if not dry_run:
        # Only an engine on the CPU, whose default is float32, uses `first` for more than imports.
        first = with_dtypes(planned[:1], "float32", dtype, vae_dtype, text_encoder_dtype)[0]
    engine = image_maker(device, offload, first)
    recipes = with_dtypes(planned, engine.auto_dtype, dtype, vae_dtype, text_encoder_dtype)
    images = _with_paths(recipes, names, prompts=len(texts), seeds=number)
    if dry_run:
        check_base(recipes[0], report)
        print_plan(images, report)
        return
    for folder in dict.fromkeys(one.path.parent for one in images):
        make_output_folder(folder)
    render(images, engine, report)


def _usable_negative(text: str, model: str, report: Report) -> str:
    """Return the negative prompt, or an empty one and a note if the family ignores it."""
    family = get_family(model)
    if text and (ignored := family.negative_prompt_note):
        report.note(f"note: {ignored}")
    return text if family.uses_negative_prompt else ""


def _with_paths(
    recipes: Sequence[Recipe], names: OutputNames, *, prompts: int, seeds: int
) -> list[PlannedImage]:
    """Return the images with the files to write, in the order of `plan_recipes`."""
    prompt_indices = [index // seeds % prompts + 1 for index in range(len(recipes))]
    paths = names.paths(
        list(zip(recipes, prompt_indices, strict=True)), datetime.now().astimezone()
    )
    return [PlannedImage(*pair) for pair in zip(recipes, paths, strict=True)]


def _choose_seed(seed: int | None, report: Report) -> int | None:
    """Return the seed; draw one for -1 and report it."""
    if seed == -1:
        seed = secrets.randbelow(2**32)
        report.note(f"seed: {seed}")
    return seed
