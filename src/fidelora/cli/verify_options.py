"""Options and exit codes of `fidelora verify`; `fidelora explain` shares some of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fidelora.cli.options import DEVICE_PANEL, MODEL_PANEL

MISMATCH, NOTHING_TO_CHECK, UNDECIDED = 1, 3, 4  # exit codes


class DtypeOption(StrEnum):
    """Values of `--dtype`; `job` stands for the dtype of the training run."""

    JOB = "job"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class NoiseOption(StrEnum):
    """Values of `--noise`."""

    AUTO = "auto"
    MODERN = "modern"
    LEGACY = "legacy"


class ApiOption(StrEnum):
    """Values of `--api`."""

    FIDELORA = "fidelora"
    INFERENCE = "inference"
    A1111 = "a1111"
    COMFYUI = "comfyui"
    OPENAI = "openai"


AGAINST_PANEL = "Samples of a server"
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        "--base",
        metavar="BASE",
        help="Hub id, diffusers folder or .safetensors checkpoint; by default the run's.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Step = Annotated[str, typer.Option(help="Training step, last or all; step 0 is the base model.")]
Dtype = Annotated[
    DtypeOption,
    typer.Option(
        help="job (the dtype of the training run), float32, bfloat16 or float16.",
        rich_help_panel=DEVICE_PANEL,
    ),
]
Noise = Annotated[
    NoiseOption,
    typer.Option(
        help="Half-precision noise: modern (torch 2.12 and later), legacy (earlier), or auto, "
        "which depends on the trainer version in the checkpoint's metadata.",
        rich_help_panel=DEVICE_PANEL,
    ),
]
TrainingAdapter = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="File of the assistant LoRA of the run (model.assistant_lora_path), or none to "
        "leave it out; by default that of the configuration.",
        rich_help_panel=MODEL_PANEL,
    ),
]
TrainerVersion = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION",
        help="Release of AI Toolkit that made the samples, such as 0.10.20; by default the one "
        "in the metadata of the checkpoint.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Server that makes the samples, instead of this machine. Its key is read from the "
        "environment variable VERIFY_API_KEY.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
Api = Annotated[
    ApiOption | None,
    typer.Option(
        help="API of the server: fidelora, inference (ai-toolkit-inference), a1111, comfyui or "
        "openai; by default, it is detected.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
ServerModel = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Base model on the server; by default the one with the same name.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
ServerLora = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="LoRA on the server; by default the one with the same name.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="LEVELS",
        help="Largest accepted mean difference from the expected picture, in levels (0..255); by "
        "default 1 for A1111 and ComfyUI, whose pictures are simulated, and 0 otherwise.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="Seconds to wait for each picture of the server.",
        rich_help_panel=AGAINST_PANEL,
    ),
]
Doctor = Annotated[
    bool, typer.Option("--doctor", help="On a mismatch, find the setting that explains it.")
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write report.html, a single file with all images, to this folder."
    ),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write the replayed samples to this folder, as STEP_INDEX.png; with --against, in the "
        "server's format.",
    ),
]
ProgressLines = Annotated[
    bool,
    typer.Option(
        "--progress-lines", help="Print the progress to stderr as lines, for other programs."
    ),
]
