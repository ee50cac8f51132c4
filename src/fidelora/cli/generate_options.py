"""Options of `fidelora generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from fidelora.cli.options import (
    DEVICE_PANEL,
    MODEL_PANEL,
    NEGATIVE_PANEL,
    SAMPLING_PANEL,
    QuantizationOption,
    SpacingOption,
)
from fidelora.cli.output_names import FIELDS
from fidelora.families import all_families
from fidelora.families.emphasis import Emphasis


def _model_ids() -> list[str]:
    return list(all_families())


def _sampler_names() -> list[str]:
    return list(dict.fromkeys(name for one in all_families().values() for name in one.samplers))


def _dtypes() -> list[str]:
    return ["auto", "float32", "bfloat16", "float16"]


Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="Prompt, or - to read prompts from stdin, one per line. [trigger] is replaced by "
        "the trigger word.",
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text file with one prompt per line, instead of PROMPT; - reads stdin.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:MULT]",
        help="LoRA or embedding file and its multiplier, -5..5, by default 1. LoRAs are "
        "applied in order. "
        "If a file is really named FILE:MULT, that file is used with multiplier 1. "
        "A folder, or a quoted pattern such as 'run/*.safetensors:0.8', selects several files; the "
        "images are made with each of them in turn.",
    ),
]
Trigger = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Trigger word, which replaces [trigger] in the prompt; by default all tokens of "
        "the first embedding, or the trigger word in the LoRA's metadata. An empty word keeps "
        "[trigger] as text, unless an embedding replaces it.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the first image; -1 draws a random seed and prints it to stderr."),
]
Number = Annotated[
    int,
    typer.Option(
        "-n",
        "--number",
        help="Number of images per prompt, with consecutive seeds, 1..1000.",
    ),
]
Output = Annotated[
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
]
ImageFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="png, jpeg (quality 95) or webp (lossless); videos: webp (quality 80, as in "
        "training) or mp4. By default the suffix of --output, or png, or webp for videos.",
        autocompletion=lambda: ["png", "jpeg", "webp", "mp4"],
    ),
]
ImagesAsJson = Annotated[
    bool, typer.Option("--json", help="Print a JSON object with all images and recipes.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", help="Print only warnings and errors: no paths and no progress bar."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything and print the plan, without images."),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="WxH",
        help="Width and height in pixels, such as 768x512, or one number for a square; by "
        "default the size that the base model was trained at.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        help="Width in pixels, 64..4096, rounded down to a multiple of the model family's "
        "divisor (`fidelora models`): 8, 16 or 32.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(help="Height in pixels, like --width.", rich_help_panel=SAMPLING_PANEL),
]
Frames = Annotated[
    int,
    typer.Option(
        help="Frames of a video, 1..1001, rounded to 1, 5, 9, ...; 1 makes a still image. Only "
        "for families that make videos.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Fps = Annotated[
    int,
    typer.Option(help="Frames per second of a video, 1..120.", rich_help_panel=SAMPLING_PANEL),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Sampling steps, 1..150; `fidelora models` lists the defaults of each family.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        "--cfg-scale",
        help="Guidance scale (CFG), 0..100; 1 or less disables guidance, except for flux and "
        "flex1, whose transformers get the scale as an input.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
GuidanceRescale = Annotated[
    float,
    typer.Option(
        help="Guidance rescale, 0..1; reduces overexposure at high guidance.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Sampler; `fidelora models` lists them.",
        rich_help_panel=SAMPLING_PANEL,
        autocompletion=_sampler_names,
    ),
]
Spacing = Annotated[
    SpacingOption,
    typer.Option(
        help="Timestep spacing: default (the trainer's), trailing or sgm_uniform. Most few-step "
        "LoRAs need one of the last two, which only some samplers support.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(
        help="Noise that the sampler adds in each step, 0..1; only for ddim (by default 0) and "
        "tcd (by default 0.3).",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Negative = Annotated[
    str,
    typer.Option(
        "--negative",
        "--negative-prompt",
        metavar="TEXT",
        help="Negative prompt.",
        rich_help_panel=NEGATIVE_PANEL,
    ),
]
SecondNegative = Annotated[
    str | None,
    typer.Option(
        "--negative-2",
        metavar="TEXT",
        help="Negative prompt of the second text encoder, in models with two; by default the "
        "same as --negative.",
        rich_help_panel=NEGATIVE_PANEL,
    ),
]
EmphasisKind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Weighting of words in brackets: none (brackets are text, as in training), or as "
        "in AUTOMATIC1111's web UI: original, no_norm or ignore.",
        rich_help_panel=SAMPLING_PANEL,
        autocompletion=lambda: list(get_args(Emphasis)),
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="Model family; `fidelora models` lists them.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=_model_ids,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        "--base",
        metavar="BASE",
        help="Hub id (owner/name or owner/name@revision), diffusers folder, .safetensors "
        "checkpoint or fidelora:miniature; by default that of the model family.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Vae = Annotated[
    str,
    typer.Option(
        metavar="VAE",
        help="VAE: hub id, folder or file; by default that of the base model.",
        rich_help_panel=MODEL_PANEL,
    ),
]
VaeTiling = Annotated[
    bool,
    typer.Option(
        "--vae-tiling",
        help="Decode in tiles of 256 pixels, as the trainer does with low_vram; only for "
        "Qwen-Image and Wan.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="auto (depends on the device), float32, bfloat16 or float16.",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=_dtypes,
    ),
]
VaeDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Dtype of the VAE; by default that of --dtype.",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=_dtypes,
    ),
]
TextEncoderDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Dtype of the text encoder; by default that of --dtype.",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=_dtypes,
    ),
]
Live = Annotated[
    bool,
    typer.Option(
        "--live",
        help="Keep adapters unmerged, as the trainer does if its samples have different "
        "multipliers.",
        rich_help_panel=DEVICE_PANEL,
    ),
]
Noise = Annotated[
    str,
    typer.Option(
        metavar="NOISE",
        help="Half-precision noise: modern (torch 2.12 and later), legacy (earlier), or auto, "
        "which depends on the trainer version in the LoRA's metadata.",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=lambda: ["auto", "modern", "legacy"],
    ),
]
Quantization = Annotated[
    QuantizationOption,
    typer.Option(
        "--quantize",
        help="Store the weights of the denoiser in float8, as AI Toolkit does with model."
        "quantize; LoRAs then stay unmerged. Only for families that AI Toolkit quantises.",
        rich_help_panel=MODEL_PANEL,
    ),
]
TextEncoderQuantization = Annotated[
    QuantizationOption,
    typer.Option(
        "--quantize-te",
        help="Store the weights of the text encoders in float8, as AI Toolkit does with "
        "model.quantize_te.",
        rich_help_panel=MODEL_PANEL,
    ),
]
TrainingAdapter = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Training adapter of Z-Image Turbo or FLUX.1-schnell, to reproduce the samples of a "
        "training run to the bit.",
        rich_help_panel=MODEL_PANEL,
    ),
]
