"""Bodies of OpenAI's Images API, compatible with the Python package `openai`.

https://platform.openai.com/docs/api-reference/images. Clients send fields that OpenAI does not have
(LoRAs, seed, steps, ...) in `extra_body`. Unsupported fields are rejected, or accepted only with
the value that has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, SecretStr, model_validator

from fidelora.api.requests import (
    MAX_LORAS,
    ImageFormat,
    InferenceRequest,
    LoraItem,
    PromptItem,
    RequestBody,
)
from fidelora.checks import MAX_PROMPT_CHARACTERS
from fidelora.errors import RequestError
from fidelora.families import all_families
from fidelora.jobs.job import Job
from fidelora.recipe import MAX_SEED, MAX_SIZE, MIN_SIZE, Fidelity
from fidelora.sampling.spacings import TimestepSpacing

MAX_IMAGES = 10  # images per request, as in OpenAI's API
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class ImagesRequest(RequestBody):
    """Body of `POST /v1/images/generations`.

    `quality`, `style` and `moderation` have no effect: they are for OpenAI's own models.
    `background` is accepted only with values that have no effect.
    `user` and `safety_identifier` identify the user and do not affect the image.
    """

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = Field(
        None,
        description="A model of `GET /v1/models`; by default the first one in "
        "`FIDELORA_BASE_MODEL`, or the first of the list.",
    )
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description="WIDTHxHEIGHT, or auto for the model's default.",
    )
    output_format: ImageFormat | None = None
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP files."
    )
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Number of previews of each image, in a stream."
    )
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)

    loras: list[LoraItem] = Field(default_factory=list, max_length=MAX_LORAS)
    trigger_word: str | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(
        None, ge=-1, le=MAX_SEED, description="Seed of the first image; by default random."
    )
    steps: int | None = Field(None, ge=1, le=150)
    guidance_scale: float | None = Field(None, ge=0, le=20, allow_inf_nan=False)
    sampler: str | None = None
    timestep_spacing: TimestepSpacing | None = None
    eta: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    fidelity: Fidelity | None = None
    hf_token: SecretStr | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.size not in (None, "auto") and not all(
            MIN_SIZE <= side <= MAX_SIZE for side in _sides(self.size)
        ):
            raise ValueError(
                f"size: width and height have to be from {MIN_SIZE} to {MAX_SIZE} pixels"
            )
        # 100 asks for no compression, and some clients always send it.
        if self.output_compression not in (None, 100) and self.format == "png":
            raise ValueError(
                "output_compression: not supported for png; set output_format to jpeg or webp"
            )
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: supported only in a stream; set stream to true")
        if self.seed is not None and self.seed + (self.n or 1) - 1 > MAX_SEED:
            raise ValueError(
                f"seed: the last image's seed would exceed {MAX_SEED}; choose a smaller one"
            )
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream supports only b64_json")
        return self

    @property
    def format(self) -> ImageFormat:
        """Format of the files."""
        return self.output_format or "png"

    @property
    def image_quality(self) -> int | None:
        """Quality of JPEG and WebP files, 0..100; None for the default and for PNG."""
        return None if self.format == "png" else self.output_compression

    def to_inference(
        self,
        model_aliases: Mapping[str, str] | None = None,
        base_models: Mapping[str, str] | None = None,
    ) -> InferenceRequest:
        """Convert to a `POST /v1/inference` body, where seed -1 means a random seed per image.

        Args:
            model_aliases: model ids, by the names that clients send instead.
            base_models: base models, by model id; by default those of the model families. The first
                model is used if the request does not name one, and the size `auto` is the size that
                the base model was trained at.

        Raises:
            RequestError: the model does not exist, or a field is unknown.
        """
        if self.model_extra:
            name = next(iter(self.model_extra))
            advice = (
                "this API makes still images; request videos with POST /v1/inference"
                if name in ("num_frames", "fps", "seconds")
                else "leave it out"
            )
            raise RequestError(
                f"{name} is not supported; {advice}.",
                code="FIELD_NOT_SUPPORTED",
                details={"field": name},
            )
        model = self.model or next(iter(base_models or all_families()))
        model = (model_aliases or {}).get(model, model)
        if model not in all_families():
            supported = ", ".join(all_families())
            raise RequestError(
                f"The model {model!r:.100} does not exist; use one of {supported}. If the client "
                "cannot change it, map it with the server's setting FIDELORA_MODEL_ALIASES.",
                code="MODEL_NOT_FOUND",
                details={"field": "model"},
            )
        family = all_families()[model]
        default = family.size_of((base_models or {}).get(model, family.base_model))
        width, height = (default, default) if self.size in (None, "auto") else _sides(self.size)
        item: dict[str, Any] = {
            "prompt": self.prompt,
            "neg": self.negative_prompt,
            "width": width,
            "height": height,
            "sample_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "timestep_spacing": self.timestep_spacing,
            "eta": self.eta,
        }
        seeds = [
            -1 if self.seed is None or self.seed == -1 else self.seed + index
            for index in range(self.n or 1)
        ]
        return InferenceRequest(
            model=model,
            loras=self.loras,
            prompts=[PromptItem(**item, seed=seed, num_frames=1) for seed in seeds],
            trigger_word=self.trigger_word,
            hf_token=self.hf_token,
            output_format=self.format,
            match=None,
            device=None,
            fidelity=self.fidelity,
        )


class ImageData(BaseModel):
    """One image, in base64 or as a URL; the URL requires the API key, like every call."""

    b64_json: str | None = None
    url: str | None = None
    # Additions to OpenAI's API.
    seed: int
    sha256: str


class ImagesBody(BaseModel):
    """Response of `POST /v1/images/generations`."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    # Additions to OpenAI's API: id of the request for `/v1/requests`, whose result has the recipes,
    # and values that the server chose, such as the LoRA's own trigger word.
    request_id: str
    notes: list[str] | None = None


class TokensByKind(BaseModel):
    """Token counts, which are always 0."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Token counts, which are always 0."""

    input_tokens: int = 0
    input_tokens_details: TokensByKind = Field(default_factory=TokensByKind)
    output_tokens: int = 0
    total_tokens: int = 0


class ImageEvent(BaseModel):
    """One event of a stream: a preview or a finished image.

    `size` is the size of the finished image; a preview can be smaller.
    """

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    size: str
    partial_image_index: int | None = Field(
        None, description="Index of a preview, from 0 for each image."
    )
    usage: Usage | None = Field(None, description="Only for a finished image.")
    # Additions to OpenAI's API.
    request_id: str
    seed: int | None = None
    sha256: str | None = None


class OpenAIErrorDetail(BaseModel):
    """An error in OpenAI's shape; `code` is this API's if OpenAI has no equivalent."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """Error body of OpenAI's paths."""

    error: OpenAIErrorDetail


FIELD_OF = {"sample_steps": "steps", "neg": "negative_prompt"}
"""Names of prompt item fields in this API, where they differ."""


def size_of(job: Job) -> str:
    """Return WIDTHxHEIGHT of a job's images, which all have the same size."""
    return f"{job.recipes[0].width}x{job.recipes[0].height}"


def event_of(
    kind: Literal["partial_image", "completed"], job: Job, b64_json: str, **fields: Any
) -> ImageEvent:
    """Return an event of a stream, with the fields that all events have."""
    assert job.started_at is not None, "events are sent only for jobs that have started"
    moment = job.finished_at or job.started_at
    return ImageEvent(
        type=f"image_generation.{kind}",  # type: ignore[arg-type]
        b64_json=b64_json,
        created_at=int(moment.timestamp()),
        output_format=job.image_format,  # type: ignore[arg-type]
        size=size_of(job),
        request_id=job.id,
        **fields,
    )


def _sides(size: str | None) -> tuple[int, int]:
    match = _SIZE.fullmatch(size or "")
    assert match is not None, "the pattern of the field allows nothing else"
    return int(match[1]), int(match[2])
