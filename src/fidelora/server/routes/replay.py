"""Replay: make an image again from its file, its recipe or its parameters text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fidelora.api import output_format_of
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
from fidelora.images.parameter_pairs import Ignored
from fidelora.images.parameters import Parameters, read_parameters
from fidelora.images.read import Origin, read_origin
from fidelora.loras.folder import adapter_named_in_prompt, adapter_path
from fidelora.loras.hashes import has_hash
from fidelora.recipe import LOCATIONS, AdapterRef, Recipe, short_name
from fidelora.server.access import Caller
from fidelora.server.context import CallerDep, ContextDep, ServerContext
from fidelora.server.middleware import MAX_BODY_BYTES
from fidelora.server.problems import error_responses
from fidelora.server.routes.inference import IdempotencyKey
from fidelora.server.submit import defaults_for, enqueue, submission_of

router = APIRouter(prefix="/v1", tags=["inference"])

_CHOICES = ReplayChoices.model_json_schema()
_FORM = {
    "type": "object",
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP or MP4."}
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
    """The recipe of the replay, and its differences from the received recipe or parameters."""

    recipe: Recipe
    source: Literal["fidelora", "a1111"]
    changes: tuple[ChangeBody, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    warnings: tuple[str, ...] = ()


@router.post(
    "/replay",
    responses=error_responses(409, 415, 429, 503, 507),
    openapi_extra={"requestBody": _BODY},
)
async def replay(
    request: Request, context: ContextDep, caller: CallerDep, idempotency_key: IdempotencyKey = None
) -> ReplayAccepted:
    """Make an image again from its file (`multipart/form-data`) or recipe (`application/json`).

    Images made by Fidelora contain their complete recipe. The server must have the same base model
    and LoRA files with the same content. For images made by other programs, the supported part of
    AUTOMATIC1111's parameters is used; the response lists the rest in `ignored`.
    """
    context.refuse_if_unavailable()
    choices, origin, content = await _read_request(request, context)
    if (count := _lora_count(origin)) > MAX_LORAS:
        raise RequestFieldError(
            f"The image has {count} LoRAs; at most {MAX_LORAS} are allowed.", loc=("image",)
        )
    submission = submission_of(caller, idempotency_key, content) if idempotency_key else None
    if origin.recipe is not None:
        plan = await run_in_threadpool(_plan_from_recipe, origin.recipe, choices, context, caller)
    else:
        assert origin.parameters is not None, "read_origin raises for an image that has neither"
        plan = await _plan_from_parameters(origin.parameters, choices, context, caller)
    image_format = output_format_of(choices.output_format or origin.format or None, (plan.recipe,))
    quality = origin.quality if image_format == origin.format else None
    job = await enqueue(
        context,
        caller,
        (plan.recipe,),
        image_format,
        quality,
        submission,
        device=choices.device,
    )
    return replay_accepted(
        job,
        context.base_url,
        plan.source,
        changes=list(plan.changes),
        ignored=plan.ignored,
        warnings=plan.warnings,
    )


def _lora_count(origin: Origin) -> int:
    if origin.recipe is not None:
        return len(origin.recipe.adapters)
    return len(origin.parameters.loras) if origin.parameters else 0


async def _read_request(
    request: Request, context: ServerContext
) -> tuple[ReplayChoices, Origin, bytes]:
    """Return the choices, the recipe or parameters, and the content to hash for idempotency.

    Raises:
        RequestError, RequestValidationError, ImageRecordError, HTTPException: the request is not
            valid.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    model = context.default_model
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            image = form.get("image")
            if not isinstance(image, UploadFile):
                raise RequestFieldError(
                    "The form field `image` is not a file; send the image as a file.",
                    loc=("image",),
                )
            fields = {name: value for name, value in form.multi_items() if name != "image"}
            choices = _validate(ReplayChoices, fields)
            content, name = await image.read(), image.filename or "The image"
        origin = await run_in_threadpool(
            read_origin,
            content,
            f"{name:.100}",
            model=model,
            with_emphasis=bool(choices.emphasis),
        )
        return choices, origin, content + repr(sorted(fields.items())).encode()
    if kind == "application/json":
        body = await request.body()
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLargeError(
                f"The body is too large; at most {MAX_BODY_BYTES:,} bytes of JSON are allowed."
            )
        replay_request = _validate(ReplayRequest, body)
        return replay_request, _origin_from_json(replay_request, model), body
    raise HTTPException(
        415, "Send an image as multipart/form-data, or a recipe as application/json"
    )


def _validate(kind: type[Choices], content: Mapping[str, Any] | bytes) -> Choices:
    try:
        body = (
            kind.model_validate_json(content)
            if isinstance(content, bytes)
            else kind.model_validate(content)
        )
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError(
            [entry | {"loc": ("body", *entry["loc"])} for entry in found]
        ) from error
    if body.model_extra:
        name = next(iter(body.model_extra))[:100]
        raise RequestError(
            f"The field {name} is not supported here; remove it.",
            code="FIELD_NOT_SUPPORTED",
            details={"field": name},
        )
    return body


def _origin_from_json(body: ReplayRequest, model: str) -> Origin:
    """Return the recipe or parameters of a JSON body in the form that `read_origin` returns."""
    if body.recipe is not None:
        try:
            return Origin("", 0, 0, recipe=Recipe.from_dict(body.recipe))
        except RecipeError as error:
            raise RequestFieldError(
                str(error), loc=("recipe", error.field) if error.field else ("recipe",)
            ) from error
    parameters = read_parameters(
        body.parameters or "", get_family(model), with_emphasis=bool(body.emphasis)
    )
    return Origin("", 0, 0, parameters=parameters)


def _plan_from_recipe(
    recipe: Recipe, choices: ReplayChoices, context: ServerContext, caller: Caller
) -> _Plan:
    """Return the plan for a recipe, with its adapter files and the server's base model.

    Raises:
        AdaptersMissingError: the server does not have all adapter files.
        RequestError: the server has another base model, which the request does not accept.
    """
    defaults = context.server_defaults.get(recipe.model, {})
    local = Recipe(
        prompt="",
        model=recipe.model,
        base_sha256=context.base_models.sha256(recipe.model),
        **defaults,
    )
    differs = _base_differences(recipe, local)
    if differs and choices.base_model != "server":
        raise RequestError(
            f"The image was made with {_base(recipe)}, but this server uses {_base(local)}. "
            "Use a server with the same base model, or send base_model=server to accept an image "
            "that may differ.",
            code="BASE_MODEL_DIFFERS",
            details={
                "differs": {
                    name: {"recipe": was, "server": now} for name, (was, now) in differs.items()
                }
            },
        )
    changes = [ChangeBody(name=name, was=was, now=now) for name, (was, now) in differs.items()]
    # The server sets the base model, because an uploaded recipe must not choose files to load.
    overrides: dict[str, Any] = {name: getattr(local, name) for name in LOCATIONS}
    if differs:
        overrides["base_sha256"] = local.base_sha256
    chosen: dict[str, Any] = {}
    if choices.fidelity not in (None, recipe.fidelity):
        chosen["fidelity"] = choices.fidelity
        if choices.fidelity == "fast" and recipe.adapter_mode == "live":
            chosen["adapter_mode"] = "merged"
    changes += [
        ChangeBody(name=name, was=getattr(recipe, name), now=now) for name, now in chosen.items()
    ]
    adapters = _locate_adapters(recipe.adapters, context, caller)
    return _Plan(
        replace(recipe, adapters=adapters, **overrides, **chosen), "fidelora", tuple(changes)
    )


def _base_differences(recipe: Recipe, local: Recipe) -> dict[str, tuple[str, str]]:
    """Return the fields in which two recipes name different base models, with both values.

    If both have a hash, equal hashes mean the same base model. If only `recipe` has one, the short
    names are compared here, and the worker compares the hash. Recipes of format 1 contain full
    paths instead of a hash, so the paths are compared.
    """
    if recipe.base_sha256 and local.base_sha256:
        if recipe.base_sha256 == local.base_sha256:
            return {}
        names: tuple[str, ...] = ("base_sha256", *LOCATIONS)
    else:
        names = LOCATIONS
    values = {name: (getattr(recipe, name), getattr(local, name)) for name in names}
    shown = {
        name: (short_name(was), short_name(now)) if name in LOCATIONS else (was, now)
        for name, (was, now) in values.items()
    }
    compared = shown if recipe.base_sha256 else values
    return {name: shown[name] for name in names if compared[name][0] != compared[name][1]}


def _base(recipe: Recipe) -> str:
    """Return a short description of a recipe's base model for messages."""
    name = short_name(recipe.base_model)
    details = [
        f"{field} {short_name(value)!r:.200}"
        for field in LOCATIONS[1:]
        if (value := getattr(recipe, field))
    ]
    if recipe.base_sha256:
        details.append(f"sha256 {recipe.base_sha256[:12]}")
    elif name != recipe.base_model:
        details.append("content hash unknown")
    return f"the base model {name!r:.200}" + (f" ({', '.join(details)})" if details else "")


def _locate_adapters(
    adapters: tuple[AdapterRef, ...], context: ServerContext, caller: Caller
) -> tuple[AdapterRef, ...]:
    owner = caller.visible_owner
    found = [context.resolver.by_hash(ref.sha256, ref.name, owner=owner) for ref in adapters]
    missing = [
        (ref.sha256, ref.name) for ref, local in zip(adapters, found, strict=True) if local is None
    ]
    if missing:
        raise AdaptersMissingError(missing=missing)
    return tuple(
        replace(ref, path=local.path)
        for ref, local in zip(adapters, found, strict=True)
        if local is not None
    )


async def _plan_from_parameters(
    parameters: Parameters, choices: ReplayChoices, context: ServerContext, caller: Caller
) -> _Plan:
    """Return the plan for the parameters text of another program.

    Raises:
        AdaptersMissingError: the text names LoRAs that the server does not have.
        RequestFieldError: a value is out of range.
    """
    adapters, missing, warnings = [], [], []
    for lora in parameters.loras:
        try:
            path = await run_in_threadpool(
                adapter_named_in_prompt,
                context.settings.loras,
                lora.name,
                context.cache.sha256_of,
                owner=caller.key_id,
            )
        except AdapterNotFoundError:
            missing.append((lora.hash, lora.name))
            continue
        ref = await context.resolver.resolve(path, owner=caller.visible_owner)
        adapters.append(ref)
        file = adapter_path(context.settings.loras, path)
        if lora.hash and not await run_in_threadpool(has_hash, file, ref.sha256, lora.hash):
            warnings.append(
                f"The LoRA {lora.name} has the hash {lora.hash} in the image, which is not a hash "
                "of the server's file. The file may be a different LoRA."
            )
    if missing:
        raise AdaptersMissingError(missing=missing)
    model = context.default_model
    fields = {
        name: value
        for name, value in defaults_for(context, model, adapters).items()
        if name not in parameters.fields
    }
    if choices.fidelity is not None:
        fields["fidelity"] = choices.fidelity
    try:
        recipe = parameters.recipe(adapters, model=model, **fields)
    except RecipeError as error:
        raise RequestFieldError(str(error), loc=("parameters", error.field)) from error
    return _Plan(recipe, "a1111", ignored=parameters.ignored, warnings=tuple(warnings))
