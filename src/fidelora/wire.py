"""The HTTP API's bodies, and what they mean: requests into recipes, jobs into answers. Shared by server and client; needs no torch.

The contract is that of the documented `ai-toolkit-inference` API: same fields, ranges and codes. What is added is additive. Nothing
is ignored: a field that the model cannot use, and a field that nobody knows, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from fidelora.errors import RecipeError, RequestError, RequestFieldError, UnknownModelError
from fidelora.jobs.job import Job, Status
from fidelora.models import ModelSpec, all_models, model_spec
from fidelora.recipe import MAX_ALPHA, AdapterRef, Fidelity, Recipe, replace_trigger

MAX_PROMPTS = 64
DEFAULT_SIZE = 1024
"""Pixels of a side that a request leaves out: the documented API's, not the model's own."""

Multiplier = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
ImageFormat = Literal["png", "jpeg", "webp"]

_OF_OTHER_MODELS = ("fps", "resolution", "ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3")


_FIELD_OF = {"steps": "sample_steps", "negative_prompt": "neg", "negative_prompt_2": "neg_2"}
"""What a field of a recipe is called in a prompt item, where the names differ."""


class _Body(BaseModel):
    """Unknown fields are kept, so that they can be named in an error of our own shape and not be dropped."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})


class LoraItem(_Body):
    """One adapter of a request: a file under `WORKFLOWS_BASE_PATH`, a URL, or `hf:owner/name/file.safetensors`."""

    path: str = Field(min_length=1, max_length=2048)
    network_multiplier: Multiplier | None = None
    transformer: Literal["low", "high"] | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="What the file's bytes have to be.")
    alpha: float | None = Field(
        None, ge=0, le=MAX_ALPHA, allow_inf_nan=False, description="Of a DoRA, whose file has none; by default its rank."
    )


class PromptItem(_Body):
    """One image of a request. What is left out has the model's default, sizes 1024."""

    prompt: str
    trigger_word: str | None = None
    width: int | None = Field(None, ge=64, le=4096)
    height: int | None = Field(None, ge=64, le=4096)
    guidance_scale: float | None = Field(None, ge=0, le=20, allow_inf_nan=False)
    sample_steps: int | None = Field(None, ge=1, le=150)
    neg: str | None = None
    neg_2: str | None = Field(None, description="For the second text encoder of models with two; by default as neg.")
    guidance_rescale: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-1, le=2**63 - 1)
    sampler: str | None = None
    network_multiplier: Multiplier | list[Multiplier] | None = None
    num_frames: int | None = Field(None, ge=1, le=1000)
    fps: int | None = Field(None, ge=1, le=120)
    resolution: Literal["Default", "High"] | None = None
    ctrl_img: str | None = None
    ctrl_img_1: str | None = None
    ctrl_img_2: str | None = None
    ctrl_img_3: str | None = None


class InferenceRequest(_Body):
    """The body of `POST /v1/inference`."""

    model: str
    loras: list[LoraItem]
    prompts: list[PromptItem] = Field(min_length=1, max_length=MAX_PROMPTS)
    trigger_word: str | None = None
    hf_token: SecretStr | None = None
    output_format: ImageFormat = "png"
    fidelity: Fidelity | None = Field(
        None, description="exact: to the bit as in training; fast: nearly so. By default what the server is set to."
    )


class Accepted(BaseModel):
    """The answer to `POST /v1/inference`."""

    request_id: str
    status: Literal["queued"] = "queued"
    status_url: str
    result_url: str
    created_at: datetime


class ErrorDetail(BaseModel):
    """What went wrong: a code for programs, a sentence for people, and what the code needs to be acted upon."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorEnvelope(BaseModel):
    """Around the error, as in the documented API."""

    error: ErrorDetail


class ErrorBody(BaseModel):
    """The body of every error but 422, which has FastAPI's own shape."""

    detail: ErrorEnvelope


class ProgressBody(BaseModel):
    """How far a job is; `image` counts from 0, `fraction` is of the whole job."""

    image: int
    images: int
    step: int
    steps: int
    fraction: float
    eta_s: float | None


class StatusBody(BaseModel):
    """The answer to `GET /v1/requests/{id}/status`."""

    request_id: str
    status: Status
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    # Other servers of the documented API do not say these.
    error_code: str | None = None
    progress: ProgressBody | None = None
    queue_position: int | None = None
    preview: str | None = Field(None, description="A rough picture, a small JPEG in base64; in events only, and if asked for.")


class RequestList(BaseModel):
    """The answer to `GET /v1/requests`: newest first; `next_cursor` asks for the rest, and is null on the last page."""

    requests: list[StatusBody]
    next_cursor: str | None


class ImageBody(BaseModel):
    """One finished image."""

    format: str
    width: int
    height: int
    file_path: str
    seed: int
    # Other servers of the documented API do not say these.
    url: str = ""
    sha256: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)


class OutputsBody(BaseModel):
    """What a job made."""

    images: list[ImageBody]
    videos: list[dict[str, Any]]


class MetadataBody(BaseModel):
    """How a job was made: `inference_time` in seconds from its start to its end, `timings` in seconds by part."""

    model: str
    inference_time: float
    timings: dict[str, float]


class ResultBody(BaseModel):
    """The answer to `GET /v1/requests/{id}/result`."""

    request_id: str
    status: Status
    outputs: OutputsBody | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    metadata: MetadataBody | None


class LoraBody(BaseModel):
    """One adapter file under `WORKFLOWS_BASE_PATH`, as its header describes it; `path` is what requests call it."""

    path: str
    sha256: str
    type: str
    ranks: list[int]
    modules: int
    dtypes: list[str]
    text_encoder: bool
    size_bytes: int
    trigger: str
    step: int | None
    epoch: int | None
    base: str
    trainer: str
    uploaded: bool
    problems: list[str]


class LoraList(BaseModel):
    """The answer to `GET /v1/loras`: by path; `next_cursor` asks for the rest, and is null on the last page."""

    loras: list[LoraBody]
    next_cursor: str | None


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


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    models: list[ModelBody]


def check_request(request: InferenceRequest) -> ModelSpec:
    """See that the model is known and can use every field of the request.

    Raises:
        RequestError: with the code of the API and what a client needs to mend it.
    """
    try:
        spec = model_spec(request.model)
    except UnknownModelError as error:
        supported = list(all_models())
        raise RequestError(str(error), code="MODEL_NOT_FOUND", details={"supported_models": supported}) from error
    if not request.loras:
        raise RequestError("At least one LoRA is required.", code="LORA_FILE_REQUIRED")
    if any(lora.transformer for lora in request.loras):
        message = f"{spec.id} has one transformer: a LoRA of it has no `transformer`."
        raise RequestError(message, code="MOE_FORMAT_NOT_SUPPORTED", details={"field": "transformer"})
    for place, field in _unusable_fields(request):
        message = f"{place}{field} means nothing to {spec.id}; leave it out."
        raise RequestError(message, code="FIELD_NOT_SUPPORTED", details={"field": f"{place}{field}"})
    for index, item in enumerate(request.prompts):
        if isinstance(item.network_multiplier, list) and len(item.network_multiplier) != len(request.loras):
            message = (
                f"prompts[{index}].network_multiplier has {len(item.network_multiplier)} numbers for {len(request.loras)} LoRAs."
            )
            raise RequestError(message, code="MULTIPLIERS_DO_NOT_MATCH", details={"field": f"prompts[{index}].network_multiplier"})
    return spec


def recipes_of(
    request: InferenceRequest, adapters: Sequence[AdapterRef], base: Mapping[str, Any], draw_seed: Callable[[], int]
) -> tuple[Recipe, ...]:
    """One complete recipe for each prompt.

    Args:
        request: one that `check_request` has passed.
        adapters: what each of its LoRAs is, in order; their own multipliers are not used.
        base: the recipe fields that the server decides: `base_model`, dtypes, `noise`, ..., and `fidelity` if the request does not.
        draw_seed: called for each prompt whose seed is -1.

    Raises:
        RequestFieldError: a value that only the model's data can refuse, such as an unknown sampler.
    """
    multipliers = [_multipliers(request, item) for item in request.prompts]
    base = {**base, "fidelity": request.fidelity or base.get("fidelity", "exact")}
    # As the trainer does it: one set of multipliers for all images is merged into the weights, several run beside them.
    mode = "merged" if base["fidelity"] == "fast" or len(set(multipliers)) == 1 else "live"
    recipes = []
    for index, item in enumerate(request.prompts):
        given = {
            "negative_prompt_2": item.neg_2,
            "guidance_scale": item.guidance_scale,
            "guidance_rescale": item.guidance_rescale,
            "steps": item.sample_steps,
            "sampler": item.sampler,
            "seed": draw_seed() if item.seed == -1 else item.seed,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if item.seed is None:
            fields["seed"] = model_spec(request.model).default_seed + index
        try:
            recipe = Recipe(
                prompt=replace_trigger(item.prompt, (item.trigger_word or request.trigger_word) or ""),
                negative_prompt=item.neg or "",
                model=request.model,
                width=item.width or DEFAULT_SIZE,
                height=item.height or DEFAULT_SIZE,
                adapters=tuple(
                    AdapterRef(ref.sha256, multiplier, ref.name, ref.path, lora.alpha)
                    for ref, lora, multiplier in zip(adapters, request.loras, multipliers[index], strict=True)
                ),
                adapter_mode=mode,  # type: ignore[arg-type]
                **fields,
                **base,
            )
        except RecipeError as error:
            place = ("prompts", index, _FIELD_OF.get(error.field, error.field))
            raise RequestFieldError(str(error), place=place) from error
        recipes.append(recipe)
    return tuple(recipes)


def request_for(recipes: Sequence[Recipe], lora_path: str) -> dict[str, Any]:
    """The body of the request that makes these images, each with the same one adapter, which the server knows as `lora_path`.

    What the server decides (base model, precision, VAE) is not in it.

    Raises:
        RequestFieldError: a value that the API does not take, such as a guidance scale beyond 20.
    """
    same = {(adapter.sha256, adapter.alpha) for recipe in recipes for adapter in recipe.adapters}
    assert len(same) == 1, "one adapter, and the same in every recipe"
    ((sha256, alpha),) = same
    body = {
        "model": recipes[0].model,
        "fidelity": recipes[0].fidelity,
        "loras": [{"path": lora_path, "sha256": sha256} | ({} if alpha is None else {"alpha": alpha})],
        "prompts": [
            {
                "prompt": recipe.prompt,
                "neg": recipe.negative_prompt,
                "width": recipe.width,
                "height": recipe.height,
                "guidance_scale": recipe.guidance_scale,
                "sample_steps": recipe.steps,
                "sampler": recipe.sampler,
                "seed": recipe.seed,
                "network_multiplier": recipe.adapters[0].multiplier,
            }
            | ({} if recipe.negative_prompt_2 is None else {"neg_2": recipe.negative_prompt_2})
            | ({} if recipe.guidance_rescale == 0 else {"guidance_rescale": recipe.guidance_rescale})
            for recipe in recipes
        ],
    }
    try:
        InferenceRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestFieldError(
            f"The HTTP API does not take {place} {first['input']!r}: {first['msg']}.", place=first["loc"]
        ) from None
    return body


def accepted(job: Job, base_url: str) -> Accepted:
    """The answer to a request that is stored."""
    url = f"{base_url.rstrip('/')}/v1/requests/{job.id}"
    return Accepted(request_id=job.id, status_url=f"{url}/status", result_url=f"{url}/result", created_at=job.created_at)


def status_of(job: Job, queue_position: int | None, *, with_preview: bool = False) -> StatusBody:
    """Where a job is."""
    progress = job.progress
    shown = {name: value for name, value in vars(progress).items() if name != "preview"} if progress else {}
    return StatusBody(
        request_id=job.id,
        status=job.status,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        error=job.error.message if job.error else None,
        error_code=job.error.code if job.error else None,
        progress=ProgressBody(fraction=progress.fraction, **shown) if progress else None,
        queue_position=queue_position,
        preview=(progress.preview or None) if with_preview and progress else None,
    )


def result_of(job: Job, base_url: str) -> ResultBody:
    """What a job made, if it is done."""
    outputs = metadata = None
    if job.status is Status.SUCCEEDED:
        assert job.started_at is not None
        assert job.finished_at is not None
        url = f"{base_url.rstrip('/')}/v1/requests/{job.id}/images"
        images = [
            ImageBody(
                format=output.format,
                width=output.width,
                height=output.height,
                file_path=output.file_path,
                seed=output.seed,
                url=f"{url}/{index}",
                sha256=output.sha256,
                recipe=recipe.to_dict(),
            )
            for index, (output, recipe) in enumerate(zip(job.outputs, job.recipes, strict=True))
        ]
        outputs = OutputsBody(images=images, videos=[])
        seconds = (job.finished_at - job.started_at).total_seconds()
        metadata = MetadataBody(model=job.recipes[0].model, inference_time=seconds, timings=dict(job.timings))
    return ResultBody(
        request_id=job.id,
        status=job.status,
        outputs=outputs,
        error=job.error.message if job.error else None,
        created_at=job.created_at,
        finished_at=job.finished_at,
        metadata=metadata,
    )


def model_bodies() -> list[ModelBody]:
    """Every model family, for `GET /v1/models`."""
    return [
        ModelBody(
            id=spec.id,
            base_model=spec.base_model,
            resolution_divisor=spec.resolution_divisor,
            default_steps=spec.default_steps,
            default_guidance_scale=spec.default_guidance_scale,
        )
        for spec in all_models().values()
    ]


def _multipliers(request: InferenceRequest, item: PromptItem) -> tuple[float, ...]:
    """For each LoRA: the prompt's own multiplier, else the LoRA's, else 1."""
    own = item.network_multiplier
    if isinstance(own, list):
        return tuple(own)
    return tuple(
        own if own is not None else lora.network_multiplier if lora.network_multiplier is not None else 1.0
        for lora in request.loras
    )


def _unusable_fields(request: InferenceRequest) -> Iterator[tuple[str, str]]:
    """Where in the request, and which field: unknown ones, and those of other models."""
    yield from (("", name) for name in request.model_extra or {})
    for index, lora in enumerate(request.loras):
        yield from ((f"loras[{index}].", name) for name in lora.model_extra or {})
    for index, item in enumerate(request.prompts):
        place = f"prompts[{index}]."
        yield from ((place, name) for name in item.model_extra or {})
        yield from ((place, name) for name in _OF_OTHER_MODELS if getattr(item, name) is not None)
        if item.num_frames not in (None, 1):
            yield place, "num_frames"
