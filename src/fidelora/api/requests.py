"""Request bodies. The ranges of size, steps and guidance are those of `ai-toolkit-inference`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from fidelora.families.emphasis import Emphasis
from fidelora.recipe import MAX_ALPHA, MAX_FPS, MAX_FRAMES, MAX_MULTIPLIER, Fidelity
from fidelora.sampling.spacings import TimestepSpacing

MAX_PROMPTS = 64  # images per request
MAX_LORAS = 64
"""LoRAs per request of the OpenAI and AUTOMATIC1111 APIs, and per replayed image. In the
`ai-toolkit-inference` API, `MAX_LORAS_TIMES_PROMPTS` limits their number."""

Multiplier = Annotated[float, Field(ge=-MAX_MULTIPLIER, le=MAX_MULTIPLIER, allow_inf_nan=False)]
ImageFormat = Literal["png", "jpeg", "webp"]
OutputFormat = Literal["png", "jpeg", "webp", "mp4"]
DeviceKind = Literal["cpu", "cuda", "mps"]
ABOUT_DEVICE = (
    "Each kind rounds in its own way, so the same bits need the same kind. The request waits for a "
    "worker with such a device."
)

_ABOUT_TRIGGER = (
    "Replaces [trigger] in prompts. Null uses the trigger word in the LoRA's metadata, which the "
    "response then names in `notes`. An empty text leaves [trigger] as it is, unless an embedding "
    "replaces it."
)


class RequestBody(BaseModel):
    """Body that keeps unknown fields, so that an error can name them."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})


class LoraItem(RequestBody):
    """One adapter of a request.

    `path` is a file under `WORKFLOWS_BASE_PATH`, a URL, or `hf:owner/name/file.safetensors`.
    """

    path: str = Field(min_length=1, max_length=2048)
    network_multiplier: Multiplier | None = None
    transformer: Literal["low", "high"] | None = None
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Expected sha256 of the file."
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=MAX_ALPHA,
        allow_inf_nan=False,
        description="Alpha of a DoRA of AI Toolkit, whose file does not contain it; by default the "
        "rank.",
    )


class PromptItem(RequestBody):
    """One image or video of a request.

    Sizes default to 1024, other fields to the model's defaults.
    """

    prompt: str
    trigger_word: str | None = Field(None, description=_ABOUT_TRIGGER)
    width: int | None = Field(None, ge=64, le=4096)
    height: int | None = Field(None, ge=64, le=4096)
    guidance_scale: float | None = Field(None, ge=0, le=20, allow_inf_nan=False)
    sample_steps: int | None = Field(None, ge=1, le=150)
    neg: str | None = None
    neg_2: str | None = Field(
        None,
        description="Negative prompt of the second text encoder, if there is one; by default neg.",
    )
    guidance_rescale: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    emphasis: Emphasis | None = Field(
        None,
        description="Weighting of words in brackets: none (the default) treats brackets as text; "
        "original, no_norm and ignore are those of AUTOMATIC1111's web UI.",
    )
    seed: int | None = Field(None, ge=-1, le=2**63 - 1)
    sampler: str | None = None
    timestep_spacing: TimestepSpacing | None = Field(
        None,
        description="Rule by which the sampler's timesteps are chosen; most few-step LoRAs need "
        "`trailing` or `sgm_uniform`.",
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Strength of the noise that the samplers `ddim` and `tcd` add in each step.",
    )
    vae_tiling: bool | None = Field(
        None,
        description="Decode in tiles of 256 pixels, as the trainer does with `low_vram`; by "
        "default false.",
    )
    network_multiplier: Multiplier | list[Multiplier] | None = None
    num_frames: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="Frames of a video, rounded to 1, 5, 9, ...; 1 makes a still image. By default "
        "41 for models that make videos.",
    )
    fps: int | None = Field(
        None, ge=1, le=MAX_FPS, description="Frames per second of a video; by default 16."
    )
    resolution: Literal["Default", "High"] | None = None
    ctrl_img: str | None = None
    ctrl_img_1: str | None = None
    ctrl_img_2: str | None = None
    ctrl_img_3: str | None = None


class InferenceRequest(RequestBody):
    """Body of `POST /v1/inference`."""

    model: str
    loras: list[LoraItem]
    prompts: list[PromptItem] = Field(min_length=1, max_length=MAX_PROMPTS)
    trigger_word: str | None = Field(None, description=_ABOUT_TRIGGER)
    hf_token: SecretStr | None = None
    output_format: OutputFormat | None = Field(
        None,
        description="By default png for images and mp4 for videos, or webp if a request has both.",
    )
    device: DeviceKind | None = Field(
        None, description="Kind of device that makes the images; by default any. " + ABOUT_DEVICE
    )
    fidelity: Fidelity | None = Field(
        None,
        description="exact: bit-identical to training; fast: nearly identical. "
        "By default the server's setting.",
    )
    match: Literal["trainer"] | None = Field(
        None,
        description="trainer: use the default number of steps and the size divisor of AI Toolkit's "
        "samples instead of those in `GET /v1/models`.",
    )
