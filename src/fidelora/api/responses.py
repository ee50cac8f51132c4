"""Response bodies: jobs, models, LoRAs and errors."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from fidelora.families import all_families
from fidelora.jobs.job import Job, Status


def _is_empty(notes: list[str]) -> bool:
    return not notes


class Accepted(BaseModel):
    """Response of `POST /v1/inference`."""

    request_id: str
    status: Literal["queued"] = "queued"
    status_url: str
    result_url: str
    created_at: datetime
    # Addition to the `ai-toolkit-inference` API; other servers omit it.
    notes: list[str] = Field(
        default_factory=list,
        exclude_if=_is_empty,
        description="Sentences about values that the server chose or changed, such as the LoRA's "
        "own trigger word or a rounded size. Omitted if there are none.",
    )


class ErrorDetail(BaseModel):
    """An error: a code for programs, a message for users, and details that depend on the code."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorEnvelope(BaseModel):
    """Envelope of an error, as in the `ai-toolkit-inference` API."""

    error: ErrorDetail


class ErrorBody(BaseModel):
    """Body of error responses, except 422, which has FastAPI's default shape.

    The paths of OpenAI's and AUTOMATIC1111's APIs have their own error bodies.
    """

    detail: ErrorEnvelope


class ProgressBody(BaseModel):
    """Progress of a request; `image` counts from 0, `fraction` refers to the whole request."""

    image: int
    images: int
    step: int
    steps: int
    fraction: float
    eta_s: float | None


class StatusBody(BaseModel):
    """Response of `GET /v1/requests/{id}/status`."""

    request_id: str
    status: Status
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    # Additions to the `ai-toolkit-inference` API; other servers omit them.
    error_code: str | None = None
    progress: ProgressBody | None = None
    queue_position: int | None = None
    waiting_reason: str | None = Field(
        None,
        description="Error that keeps the workers from starting or makes them pause, while the "
        "request is queued.",
    )
    preview: str | None = Field(
        None,
        description="Preview, a small JPEG in base64; only in events requested with `previews`.",
    )


class RequestList(BaseModel):
    """Response of `GET /v1/requests`: newest first; `next_cursor` is null on the last page."""

    requests: list[StatusBody]
    next_cursor: str | None


class ImageBody(BaseModel):
    """One finished image."""

    format: str
    width: int
    height: int
    file_path: str
    seed: int
    # Additions to the `ai-toolkit-inference` API; other servers omit them.
    url: str = ""
    sha256: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)


class VideoBody(ImageBody):
    """One finished video."""

    num_frames: int
    fps: int


class OutputsBody(BaseModel):
    """Outputs of a request, in the order of its prompts."""

    images: list[ImageBody]
    videos: list[VideoBody]


class MetadataBody(BaseModel):
    """Timing of a request: seconds from start to end (`inference_time`), and by phase."""

    model: str
    inference_time: float
    timings: dict[str, float]


class ResultBody(BaseModel):
    """Response of `GET /v1/requests/{id}/result`."""

    request_id: str
    status: Status
    outputs: OutputsBody | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    metadata: MetadataBody | None
    # Addition to the `ai-toolkit-inference` API; other servers omit it.
    notes: list[str] = Field(
        default_factory=list,
        exclude_if=_is_empty,
        description="As in the response of `POST /v1/inference`.",
    )


class LoraBody(BaseModel):
    """One adapter file under `WORKFLOWS_BASE_PATH`; requests refer to it by `path`.

    Most other fields are read from the file's header.
    """

    path: str
    sha256: str
    type: str
    ranks: list[int]
    modules: int
    tokens: int
    dtypes: list[str]
    text_encoder: bool
    size_bytes: int
    trigger: str
    step: int | None
    epoch: int | None
    base: str
    trainer: str
    uploaded: bool
    models: list[str] = Field(
        description="Those of the server's configured models that it fits; empty for none of them."
    )
    problems: list[str]


class LoraList(BaseModel):
    """Response of `GET /v1/loras`: sorted by path; `next_cursor` is null on the last page."""

    loras: list[LoraBody]
    next_cursor: str | None


class WorkerBody(BaseModel):
    """A live worker in `GET /v1/workers`."""

    name: str
    device: str = Field(description="Such as cpu or cuda:0.")
    version: str = Field(description="Fidelora's version.")
    request_id: str | None = Field(None, description="The request whose images it makes.")
    idle_s: float | None = Field(
        None, description="Seconds since it finished its last request; null while it is busy."
    )
    models: list[str] = Field(
        description="Ids of the models in its memory, the most recently used one first."
    )
    adapters: list[str] = Field(description="sha256 of the LoRAs in its memory.")
    merged_adapters: list[str] = Field(description="sha256 of the LoRAs merged into its model.")
    reported_at: datetime | None = Field(None, description="Time of its last report.")


class WorkerList(BaseModel):
    """Response of `GET /v1/workers`."""

    workers: list[WorkerBody]


class ModelBody(BaseModel):
    """One model family in `GET /v1/models`."""

    id: str
    base_model: str
    resolution_divisor: int
    default_steps: int
    default_guidance_scale: float
    requires_control_image: bool = False
    is_video_model: bool = False
    default_num_frames: int | None = None
    default_fps: int | None = None
    # An addition to the `ai-toolkit-inference` API; other servers omit it.
    configured: bool = Field(
        default=True,
        description="False if the server was not started with a base model for this model: it "
        "downloads `base_model` at the first request.",
    )


class OpenAIModel(BaseModel):
    """One model family in the shape of OpenAI's API; `created` is not known and always 0."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "fidelora"


class ModelList(BaseModel):
    """Response of `GET /v1/models`: `models` as in `ai-toolkit-inference`, `data` as in OpenAI.

    `data` has only the models that the server was started with, because chat front ends offer them
    for selection.
    """

    models: list[ModelBody]
    # Additions to the `ai-toolkit-inference` API; other servers omit them.
    object: Literal["list"] = "list"
    data: list[OpenAIModel] = Field(default_factory=list)


def accepted(job: Job, base_url: str) -> Accepted:
    """Return the response for a queued request."""
    url = f"{base_url.rstrip('/')}/v1/requests/{job.id}"
    return Accepted(
        request_id=job.id,
        status_url=f"{url}/status",
        result_url=f"{url}/result",
        created_at=job.created_at,
        notes=list(job.notes),
    )


def status_of(
    job: Job,
    queue_position: int | None,
    *,
    waiting_reason: str | None = None,
    with_preview: bool = False,
) -> StatusBody:
    """Return the status of a job."""
    progress = job.progress
    progress_fields = (
        {name: value for name, value in vars(progress).items() if name != "preview"}
        if progress
        else {}
    )
    return StatusBody(
        request_id=job.id,
        status=job.status,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        error=job.error.message if job.error else None,
        error_code=job.error.code if job.error else None,
        progress=ProgressBody(fraction=progress.fraction, **progress_fields) if progress else None,
        queue_position=queue_position,
        waiting_reason=waiting_reason,
        preview=(progress.preview or None) if with_preview and progress else None,
    )


def result_of(job: Job, base_url: str) -> ResultBody:
    """Return the result of a job; outputs and metadata are null unless it succeeded."""
    outputs = metadata = None
    if job.status is Status.SUCCEEDED:
        assert job.started_at is not None
        assert job.finished_at is not None
        url = f"{base_url.rstrip('/')}/v1/requests/{job.id}/images"
        outputs = OutputsBody(images=[], videos=[])
        for index, (output, recipe) in enumerate(zip(job.outputs, job.recipes, strict=True)):
            body = ImageBody(
                format=output.format,
                width=output.width,
                height=output.height,
                file_path=output.file_path,
                seed=output.seed,
                url=f"{url}/{index}",
                sha256=output.sha256,
                recipe=recipe.to_dict(),
            )
            if recipe.frames == 1:
                outputs.images.append(body)
            else:
                video = VideoBody(**body.model_dump(), num_frames=recipe.frames, fps=recipe.fps)
                outputs.videos.append(video)
        seconds = (job.finished_at - job.started_at).total_seconds()
        metadata = MetadataBody(
            model=job.recipes[0].model, inference_time=seconds, timings=dict(job.timings)
        )
    return ResultBody(
        request_id=job.id,
        status=job.status,
        outputs=outputs,
        error=job.error.message if job.error else None,
        created_at=job.created_at,
        finished_at=job.finished_at,
        metadata=metadata,
        notes=list(job.notes),
    )


def model_list(configured: Collection[str]) -> ModelList:
    """Return every model family, for `GET /v1/models`.

    Args:
        configured: ids of the models that the server was started with; the default model first.
    """
    return ModelList(
        models=_model_bodies(configured), data=[OpenAIModel(id=model) for model in configured]
    )


def _model_bodies(configured: Collection[str]) -> list[ModelBody]:
    return [
        ModelBody(
            id=spec.id,
            base_model=spec.base_model,
            resolution_divisor=spec.request_divisor,
            default_steps=spec.default_steps,
            default_guidance_scale=spec.default_guidance_scale,
            is_video_model=spec.makes_videos,
            default_num_frames=spec.default_frames,
            default_fps=spec.default_fps,
            configured=spec.id in configured,
        )
        for spec in all_families().values()
    ]
