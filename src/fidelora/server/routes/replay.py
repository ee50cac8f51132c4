"""Images made again, from what their files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import structlog
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fidelora.api.replay import (
    ChangeBody,
    ReplayAccepted,
    ReplayChoices,
    ReplayRequest,
    replay_accepted,
)
from fidelora.api.requests import MAX_LORAS
from fidelora.errors import (
    AdapterNotFoundError,
    AdaptersMissingError,
    BodyTooLargeError,
    RecipeError,
    RequestError,
    RequestFieldError,
)
from fidelora.families import get_family
from fidelora.images.parameters import Ignored, Parameters, read_parameters
from fidelora.images.read import Origin, read_origin
from fidelora.loras.folder import adapter_named_in_prompt
from fidelora.recipe import AdapterRef, Recipe
from fidelora.server.context import ContextDep, Owner, ServerContext
from fidelora.server.middleware import MAX_BODY_BYTES
from fidelora.server.problems import answers
from fidelora.server.routes.inference import IdempotencyKey
from fidelora.server.submit import defaults_for, enqueue, submission_of

router = APIRouter(prefix="/v1", tags=["inference"])

_BASE_FIELDS = ("base_model", "variant", "config", "vae")
"""What a recipe says of its base model. A recipe from elsewhere must not choose what this machine loads."""

_CHOICES = ReplayChoices.model_json_schema()
_FORM = {
    "type": "object",
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
    }
    | _CHOICES["properties"],
    "required": ["image"],
}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _FORM},
        "application/json": {"schema": ReplayRequest.model_json_schema()},
    },
}


Choices = TypeVar("Choices", bound=ReplayChoices)


@dataclass(frozen=True)
class _Plan:
    """What will be made, and how it came to be that."""

    recipe: Recipe
    source: Literal["fidelora", "a1111"]
    changes: tuple[ChangeBody, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    warnings: tuple[str, ...] = ()


@router.post("/replay", responses=answers(409, 415, 429, 503), openapi_extra={"requestBody": _BODY})
async def replay(
    request: Request, context: ContextDep, owner: Owner, idempotency_key: IdempotencyKey = None
) -> ReplayAccepted:
    """Make an image again: from its file (`multipart/form-data`), or from what it says (`application/json`).

    An image of Fidelora's has its whole recipe; every LoRA of it has to be here with the same bytes, and the server has to have the
    same base model. Of images of other programs, AUTOMATIC1111's parameters are read as far as they go; the answer says what was
    not used.
    """
    context.refuse_if_stopping()
    choices, origin, content = await _read(request, context)
    said = (
        origin.recipe.adapters
        if origin.recipe is not None
        else origin.parameters.loras
        if origin.parameters
        else ()
    )
    if len(said) > MAX_LORAS:
        raise RequestFieldError(
            f"The image has {len(said)} LoRAs; {MAX_LORAS} are the most.", place=("image",)
        )
    submission = submission_of(owner, idempotency_key, content) if idempotency_key else None
    if origin.recipe is not None:
        plan = await run_in_threadpool(_again, origin.recipe, choices, context)
    else:
        assert origin.parameters is not None, "an image that says nothing is an error"
        plan = await _as_far_as_it_goes(origin.parameters, choices, context)
    image_format = choices.output_format or origin.format
    quality = origin.quality if image_format == origin.format else None
    job = await run_in_threadpool(
        enqueue, context, (plan.recipe,), image_format, quality, submission
    )
    structlog.contextvars.bind_contextvars(request_id=job.id)
    return replay_accepted(
        job,
        context.base_url,
        plan.source,
        changes=list(plan.changes),
        ignored=plan.ignored,
        warnings=plan.warnings,
    )


async def _read(request: Request, context: ServerContext) -> tuple[ReplayChoices, Origin, bytes]:
    """The choices, what there is to be made again, and all of the request for comparing it with another one.

    Raises:
        RequestError, RequestValidationError, ImageRecordError, HTTPException: it cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    model = next(iter(context.server_defaults))
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            image = form.get("image")
            if not isinstance(image, UploadFile):
                raise RequestFieldError("The image has to be a file.", place=("image",))
            fields = {name: value for name, value in form.multi_items() if name != "image"}
            choices = _checked(ReplayChoices, fields)
            content, name = await image.read(), image.filename or "The image"
        origin = await run_in_threadpool(read_origin, content, f"{name:.100}", model=model)
        return choices, origin, content + repr(sorted(fields.items())).encode()
    if kind == "application/json":
        body = await request.body()
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLargeError(
                f"The body is too large; {MAX_BODY_BYTES:,} bytes of JSON are allowed here."
            )
        asked = _checked(ReplayRequest, body)
        return asked, _said(asked, model), body
    raise HTTPException(
        415, "Send an image as multipart/form-data, or a recipe as application/json"
    )


def _checked(kind: type[Choices], given: Mapping[str, Any] | bytes) -> Choices:
    try:
        body = (
            kind.model_validate_json(given)
            if isinstance(given, bytes)
            else kind.model_validate(given)
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError(
            [entry | {"loc": ("body", *entry["loc"])} for entry in found]
        ) from error
    if body.model_extra:
        name = next(iter(body.model_extra))[:100]
        raise RequestError(
            f"{name} means nothing here; leave it out.",
            code="FIELD_NOT_SUPPORTED",
            details={"field": name},
        )
    return body


def _said(asked: ReplayRequest, model: str) -> Origin:
    """What a request says in JSON, as an image would say it."""
    if asked.recipe is not None:
        try:
            return Origin("png", 0, 0, recipe=Recipe.from_dict(asked.recipe))
        except RecipeError as error:
            raise RequestFieldError(
                str(error), place=("recipe", error.field) if error.field else ("recipe",)
            ) from error
    return Origin(
        "png", 0, 0, parameters=read_parameters(asked.parameters or "", get_family(model))
    )


def _again(recipe: Recipe, choices: ReplayChoices, context: ServerContext) -> _Plan:
    """The recipe with the bytes of its adapters and the server's base model.

    Raises:
        AdaptersMissingError: some adapters are not here.
        RequestError: the base model is another one.
    """
    here = Recipe(prompt="", model=recipe.model, **context.server_defaults.get(recipe.model, {}))
    differs = {
        name: {"recipe": getattr(recipe, name), "server": getattr(here, name)}
        for name in _BASE_FIELDS
        if getattr(recipe, name) != getattr(here, name)
    }
    if differs and choices.base_model != "server":
        name, values = next(iter(differs.items()))
        raise RequestError(
            f"The image was made with the {name} {values['recipe']!r:.200}, and this server has {values['server']!r:.200}. "
            "Send it to a server with the same, or send base_model=server for an image that may differ.",
            code="BASE_MODEL_DIFFERS",
            details={"differs": differs},
        )
    wanted: dict[str, Any] = {name: getattr(here, name) for name in differs}
    if choices.fidelity not in (None, recipe.fidelity):
        wanted["fidelity"] = choices.fidelity
        if choices.fidelity == "fast" and recipe.adapter_mode == "live":
            wanted["adapter_mode"] = "merged"
    changes = tuple(
        ChangeBody(name=name, was=getattr(recipe, name), now=now) for name, now in wanted.items()
    )
    return _Plan(
        replace(recipe, adapters=_with_bytes(recipe.adapters, context), **wanted),
        "fidelora",
        changes,
    )


def _with_bytes(adapters: tuple[AdapterRef, ...], context: ServerContext) -> tuple[AdapterRef, ...]:
    found = [context.sources.by_hash(ref.sha256, ref.name) for ref in adapters]
    missing = [
        (ref.sha256, ref.name) for ref, here in zip(adapters, found, strict=True) if here is None
    ]
    if missing:
        raise AdaptersMissingError(missing=missing)
    return tuple(
        replace(ref, path=here.path)
        for ref, here in zip(adapters, found, strict=True)
        if here is not None
    )


async def _as_far_as_it_goes(
    parameters: Parameters, choices: ReplayChoices, context: ServerContext
) -> _Plan:
    """The recipe that another program's text comes to here.

    Raises:
        AdaptersMissingError: there is no LoRA of a name that it has.
        RequestFieldError: a value is out of the range that images can have here.
    """
    adapters, missing, warnings = [], [], []
    for lora in parameters.loras:
        try:
            path = await run_in_threadpool(
                adapter_named_in_prompt, context.settings.loras, lora.name
            )
        except AdapterNotFoundError:
            missing.append((lora.hash, lora.name))
            continue
        ref = await context.sources.resolve(path)
        adapters.append(ref)
        if lora.hash and not ref.sha256.startswith(lora.hash):
            warnings.append(
                f"The LoRA {lora.name} had the hash {lora.hash} there; here its sha256 is {ref.sha256[:12]}. "
                "It may be another file, or a hash of another kind."
            )
    if missing:
        raise AdaptersMissingError(missing=missing)
    model = next(iter(context.server_defaults))
    others = {
        name: value
        for name, value in defaults_for(context, model, adapters).items()
        if name not in parameters.fields
    }
    if choices.fidelity is not None:
        others["fidelity"] = choices.fidelity
    try:
        recipe = parameters.recipe(adapters, model=model, **others)
    except RecipeError as error:
        raise RequestFieldError(str(error), place=("parameters", error.field)) from error
    return _Plan(recipe, "a1111", ignored=parameters.ignored, warnings=tuple(warnings))
