"""`fidelora generate`."""

from __future__ import annotations

import secrets
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fidelora.atomic import make_folder
from fidelora.cli.console import (
    DEVICE_PANEL,
    MODEL_PANEL,
    NEGATIVE_PANEL,
    SAMPLING_PANEL,
    Debug,
    Device,
    Fidelity,
    FidelityOption,
    Offload,
    QuantizationOption,
    SpacingOption,
)
from fidelora.cli.engines import image_maker
from fidelora.cli.image_plan import (
    MAX_IMAGES,
    adapter_sets,
    plan_recipes,
    read_prompts,
    read_size,
    resolve_noise,
    trigger_remarks,
    with_dtypes,
)
from fidelora.cli.output_names import FIELDS, parse_output
from fidelora.cli.rendering import PlannedImage, Report, check_base, print_plan, render
from fidelora.errors import RecipeError
from fidelora.families import all_families, get_family
from fidelora.families.emphasis import Emphasis
from fidelora.loras.few_step import proposals
from fidelora.recipe import AdapterRef


def _model_ids() -> list[str]:
    return list(all_families())


def _sampler_names() -> list[str]:
    return list(dict.fromkeys(name for one in all_families().values() for name in one.samplers))


def _dtypes() -> list[str]:
    return ["auto", "float32", "bfloat16", "float16"]


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Prompt, or - to read prompts from stdin, one per line. [trigger] is replaced by "
            "the trigger word.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text file with one prompt per line, instead of PROMPT; - reads stdin.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:MULT]",
            help="LoRA or embedding file and its multiplier, -5..5, by default 1. LoRAs are "
            "applied in order. "
            "If there is a file with the whole name FILE:MULT, it is used with multiplier 1. "
            "For a folder, or a quoted pattern such as 'run/*.safetensors:0.8', the images are "
            "made with each of its .safetensors files in turn.",
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="Trigger word, which replaces [trigger] in the prompt; by default all tokens of "
            "the first embedding, or the trigger word in the LoRA's metadata. An empty one leaves "
            "[trigger] as it is, unless an embedding replaces it.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; -1 draws a random seed and prints it to stderr."
        ),
    ] = None,
    number: Annotated[
        int,
        typer.Option(
            "-n",
            "--number",
            help="Number of images per prompt, with consecutive seeds, 1..1000.",
        ),
    ] = 1,
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            "--out",
            metavar="PATH",
            help="Output folder or file (.png, .jpg, .webp or .mp4). If the name of a folder has "
            "a dot, add / at the end. A name with fields, such as {lora}_{seed}.png, gives each "
            f"image a name of its own; the fields are {', '.join(FIELDS)}. An existing file is "
            "replaced only if PATH is a file name without fields; otherwise a number is added to "
            "the name.",
        ),
    ] = ".",
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="png, jpeg (quality 95) or webp (lossless); videos: webp (quality 80, as in "
            "training) or mp4. By default the suffix of --output, or png, or webp for videos.",
            autocompletion=lambda: ["png", "jpeg", "webp", "mp4"],
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object with all images and recipes.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "-q", "--quiet", help="Print only warnings and errors: no paths and no progress bar."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and print the plan, without images."),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels, such as 768x512, or one number for a square; by "
            "default the size that the base model was trained at.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Width in pixels, 64..4096, rounded down to a multiple of the model family's "
            "divisor (`fidelora models`): 8, 16 or 32.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Height in pixels, like --width.", rich_help_panel=SAMPLING_PANEL),
    ] = None,
    frames: Annotated[
        int,
        typer.Option(
            help="Frames of a video, 1..1000, rounded to 1, 5, 9, ...; 1 makes a still image. Only "
            "for families that make videos.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = 1,
    fps: Annotated[
        int,
        typer.Option(help="Frames per second of a video, 1..120.", rich_help_panel=SAMPLING_PANEL),
    ] = 16,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Sampling steps, 1..150; `fidelora models` lists the defaults of each family.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            "--cfg-scale",
            help="Guidance scale (CFG), 0..100; 1 or less disables guidance.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    guidance_rescale: Annotated[
        float,
        typer.Option(
            help="Guidance rescale, 0..1; reduces overexposure at high guidance.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = 0.0,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Sampler; `fidelora models` lists them.",
            rich_help_panel=SAMPLING_PANEL,
            autocompletion=_sampler_names,
        ),
    ] = None,
    spacing: Annotated[
        SpacingOption,
        typer.Option(
            help="Timestep spacing: default (the trainer's), trailing or sgm_uniform. Few-step "
            "LoRAs need one of the last two, which only some samplers support.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = SpacingOption.DEFAULT,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Noise that the sampler adds in each step, 0..1; only for ddim (by default 0) and "
            "tcd (by default 0.3).",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    negative: Annotated[
        str,
        typer.Option(
            "--negative",
            "--negative-prompt",
            metavar="TEXT",
            help="Negative prompt.",
            rich_help_panel=NEGATIVE_PANEL,
        ),
    ] = "",
    negative_2: Annotated[
        str | None,
        typer.Option(
            "--negative-2",
            metavar="TEXT",
            help="Negative prompt of the second text encoder, in models with two; by default the "
            "same as --negative.",
            rich_help_panel=NEGATIVE_PANEL,
        ),
    ] = None,
    emphasis: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Weighting of words in brackets: none (brackets are text, as in training), or as "
            "in AUTOMATIC1111's web UI: original, no_norm or ignore.",
            rich_help_panel=SAMPLING_PANEL,
            autocompletion=lambda: list(get_args(Emphasis)),
        ),
    ] = "none",
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Model family; `fidelora models` lists them.",
            rich_help_panel=MODEL_PANEL,
            autocompletion=_model_ids,
        ),
    ] = "sd15",
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Hub id (owner/name or owner/name@revision), diffusers folder, .safetensors "
            "checkpoint or fidelora:miniature; by default that of the model family.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Variant of the files in a diffusers folder, such as fp16; by default none.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "",
    vae: Annotated[
        str,
        typer.Option(
            metavar="VAE",
            help="VAE: hub id, folder or file; by default that of the base model.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "",
    vae_tiling: Annotated[
        bool,
        typer.Option(
            "--vae-tiling",
            help="Decode in tiles of 256 pixels, as the trainer does with low_vram; only for "
            "Qwen-Image and Wan.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    config: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder with the configurations and the tokenizer of a .safetensors checkpoint; "
            "by default those of the model family.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="auto (depends on the device), float32, bfloat16 or float16.",
            rich_help_panel=DEVICE_PANEL,
            autocompletion=_dtypes,
        ),
    ] = "auto",
    vae_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the VAE; by default that of --dtype.",
            rich_help_panel=DEVICE_PANEL,
            autocompletion=_dtypes,
        ),
    ] = None,
    text_encoder_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the text encoder; by default that of --dtype.",
            rich_help_panel=DEVICE_PANEL,
            autocompletion=_dtypes,
        ),
    ] = None,
    fidelity: Fidelity = FidelityOption.EXACT,
    device: Device = "auto",
    offload: Offload = "none",
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Keep adapters unmerged, as the trainer does if its samples have different "
            "multipliers.",
            rich_help_panel=DEVICE_PANEL,
        ),
    ] = False,
    noise: Annotated[
        str,
        typer.Option(
            metavar="NOISE",
            help="Half-precision noise: modern (torch 2.12 and later), legacy (earlier), or auto, "
            "which depends on the trainer version in the LoRA's metadata.",
            rich_help_panel=DEVICE_PANEL,
            autocompletion=lambda: ["auto", "modern", "legacy"],
        ),
    ] = "auto",
    quantization: Annotated[
        QuantizationOption,
        typer.Option(
            "--quantize",
            help="Store the weights of the denoiser in float8, as AI Toolkit does with model."
            "quantize; LoRAs are then unmerged. Only for families that AI Toolkit quantises.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = QuantizationOption.NONE,
    text_encoder_quantization: Annotated[
        QuantizationOption,
        typer.Option(
            "--quantize-te",
            help="Store the weights of the text encoders in float8, as AI Toolkit does with "
            "model.quantize_te.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = QuantizationOption.NONE,
    training_adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Training adapter of Z-Image Turbo, to reproduce the samples of a training run to "
            "the bit.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Generate images with LoRAs and write files that contain the recipes.

    With several prompts or LoRAs, every combination is made, with the same seeds.
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
    family = get_family(model)
    if negative and (ignored := family.negative_prompt_note):
        report.note(f"note: {ignored}")
    settings: dict[str, Any] = {
        "negative_prompt": negative if family.uses_negative_prompt else "",
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
        **read_size(size, width, height),
        **{name: value for name, value in optional.items() if value is not None},
    }
    planned = plan_recipes(
        texts, sets, trigger, number, lambda one: resolve_noise(noise, one, model), settings
    )
    report.add(*trigger_remarks(texts, sets, trigger))
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
    prompt_indices = [index // number % len(texts) + 1 for index in range(len(recipes))]
    paths = names.paths(
        list(zip(recipes, prompt_indices, strict=True)), datetime.now().astimezone()
    )
    images = [PlannedImage(*pair) for pair in zip(recipes, paths, strict=True)]
    if dry_run:
        check_base(recipes[0], report)
        print_plan(images, report)
        return
    for folder in dict.fromkeys(path.parent for path in paths):
        make_folder(folder)
    render(images, engine, report)


def _choose_seed(seed: int | None, report: Report) -> int | None:
    """Return the seed; draw one for -1 and report it."""
    if seed == -1:
        seed = secrets.randbelow(2**32)
        report.note(f"seed: {seed}")
    return seed
