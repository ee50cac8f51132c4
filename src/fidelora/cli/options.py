"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fidelora.cli.console import set_debug


class FidelityOption(StrEnum):
    """Values of `--fidelity`."""

    EXACT = "exact"
    FAST = "fast"


class QuantizationOption(StrEnum):
    """Values of `--quantize` and `--quantize-te`."""

    NONE = "none"
    QFLOAT8 = "qfloat8"
    FLOAT8 = "float8"


class SpacingOption(StrEnum):
    """Values of `--spacing`."""

    DEFAULT = "default"
    TRAILING = "trailing"
    SGM_UNIFORM = "sgm_uniform"


SAMPLING_PANEL = "Sampling"
NEGATIVE_PANEL = "Negative prompt"
MODEL_PANEL = "Base model"
DEVICE_PANEL = "Precision and device"
"""Titles of groups of options in `--help`; options without a group are under "Options"."""

OPTION_OF_SETTING = {
    "host": "--host",
    "port": "--port",
    "device": "--device",
    "base_model": "--base-model",
    "store_url": "--store",
    "output_base_path": "--outputs",
    "lora_cache_dir": "--adapters",
    "debug": "--debug",
}
"""Options of `serve`, `worker`, `workers`, `db` and `keys` that set a server setting, by field."""

Debug = Annotated[
    bool, typer.Option("--debug", callback=set_debug, help="Show the traceback of an error.")
]
Fidelity = Annotated[
    FidelityOption,
    typer.Option(
        help="exact: bit-identical to training; fast: faster, with small differences "
        "(docs/performance.md).",
        rich_help_panel=DEVICE_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device: auto, cpu, cuda, cuda:N or mps.",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="Offload mode: none, model (less device memory, slower) or sequential (least, "
        "slowest).",
        rich_help_panel=DEVICE_PANEL,
        autocompletion=lambda: ["none", "model", "sequential"],
    ),
]
Variant = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Variant of the files in a diffusers folder, such as fp16; by default none.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ConfigFolder = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="Folder with the configurations and the tokenizer of a .safetensors checkpoint; "
        "by default those of the model family.",
        rich_help_panel=MODEL_PANEL,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="JOB_DIR", help="Output folder of an AI Toolkit training run.")
]
