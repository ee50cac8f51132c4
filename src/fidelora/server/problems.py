"""Errors into answers: the one place that knows which error has which status and code. `shapes.py` writes them down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fidelora import errors
from fidelora.api import ErrorBody
from fidelora.errors import FideloraError, RequestError, RequestFailedError, RequestFieldError
from fidelora.server.problem_formats import Problem, answer

log = structlog.get_logger(__name__)

# The first that fits counts: from the special to the general.
_ANSWERS: Sequence[tuple[type[FideloraError], int, str]] = (
    (errors.JobNotFoundError, 404, "REQUEST_NOT_FOUND"),
    (errors.ImageNotFoundError, 404, "IMAGE_NOT_FOUND"),
    (errors.ImageGoneError, 410, "IMAGE_GONE"),
    (errors.ImageRecordError, 400, "IMAGE_WITHOUT_RECIPE"),
    (errors.RequestCanceledError, 409, "REQUEST_CANCELED"),
    (errors.PromptSyntaxError, 400, "PROMPT_NOT_SUPPORTED"),
    (errors.CursorError, 400, "CURSOR_NOT_KNOWN"),
    (errors.QueueFullError, 429, "QUEUE_FULL"),
    (errors.IdempotencyConflictError, 409, "IDEMPOTENCY_KEY_REUSED"),
    (errors.BodyTooLargeError, 413, "BODY_TOO_LARGE"),
    (errors.ApiKeyError, 401, "UNAUTHORIZED"),
    (errors.JobStoreError, 503, "STORE_UNAVAILABLE"),
    (errors.ServerStoppingError, 503, "SERVER_STOPPING"),
    (errors.AdapterUrlRefusedError, 400, "LORA_URL_NOT_ALLOWED"),
    (errors.AdapterDownloadError, 400, "LORA_DOWNLOAD_FAILED"),
    (errors.UploadNotFoundError, 404, "UPLOAD_NOT_FOUND"),
    (errors.AdapterExistsError, 409, "LORA_EXISTS"),
    (errors.AdapterInUseError, 409, "LORA_IN_USE"),
    (errors.AdapterNotFoundError, 400, "LORA_NOT_FOUND"),
    (errors.AdapterPlaceError, 400, "LORA_NOT_FOUND"),
    (errors.AdapterChangedError, 400, "LORA_CHANGED"),
    (errors.AdapterError, 400, "LORA_INVALID"),
    (errors.WeightsFileError, 400, "LORA_INVALID"),
)

REQUEST_CODES = {
    "MODEL_NOT_FOUND": "There is no model of this id; `details.supported_models` lists those there are.",
    "LORA_FILE_REQUIRED": "The list of LoRAs is empty.",
    "MOE_FORMAT_NOT_SUPPORTED": "The model has one transformer: a LoRA of it has no `transformer`.",
    "FIELD_NOT_SUPPORTED": "The model cannot use this field, or nobody knows it; `details.field` names it.",
    "MULTIPLIERS_DO_NOT_MATCH": "A prompt has another number of multipliers than there are LoRAs.",
    "BASE_MODEL_DIFFERS": "The image was made with another base model than the server's; `details.differs` has both.",
    "LORA_BYTES_MISSING": "LoRAs that the image was made with are not here; `details.missing` has sha256 and name of each.",
    "HOST_NOT_ALLOWED": "A server without API keys answers only to names of its own machine.",
    "OTHER_SITE": "A browser sent this from a page of another site.",
}
"""The codes of errors that carry their own; all of them are 400."""

_DESCRIPTIONS = {
    400: "Cannot be done as it is written",
    401: "No API key, or an unknown one",
    404: "Not found",
    409: "Contradicts what is there",
    410: "Gone",
    413: "Body too large",
    415: "A body of this type is not read",
    429: "The queue is full",
    503: "Not now",
}

_SECRET_FIELDS = {"hf_token"}


def codes() -> dict[str, tuple[int, str]]:
    """Every code that an error can have, with its status and what it means."""
    own = {code: (400, meaning) for code, meaning in REQUEST_CODES.items()}
    return own | {code: (status, str(kind())) for kind, status, code in reversed(_ANSWERS)}


def answers(*statuses: int, is_json: bool = True) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these errors, besides those that every route can have.

    Args:
        is_json: whether the route's good answer is JSON; the framework believes that errors are of the same type.
    """
    body: dict[str, Any] = {"model": ErrorBody}
    if not is_json:
        body = {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        }
    return {
        status: {**body, "description": _DESCRIPTIONS[status]}
        for status in (400, 401, 413, *statuses)
    }


def problem_of(error: FideloraError) -> Problem:
    """What a client hears of an error."""
    if isinstance(error, RequestFieldError):
        return _invalid([{"type": "value_error", "loc": ["body", *error.place], "msg": str(error)}])
    if isinstance(error, RequestError):
        return Problem(400, error.code, str(error), error.details)
    if isinstance(error, RequestFailedError):
        return Problem(500, error.code, str(error), final=True)
    if isinstance(error, errors.AdaptersMissingError):
        missing = [{"sha256": sha256, "name": name} for sha256, name in error.missing]
        return Problem(400, "LORA_BYTES_MISSING", str(error), {"missing": missing})
    for kind, status, code in _ANSWERS:
        if isinstance(error, kind):
            return Problem(status, code, str(error), final=status == 409)
    log.error("unexpected error", exc_info=error)
    return _UNEXPECTED


def install(app: FastAPI) -> None:
    """Have the application answer every error in these ways."""

    @app.exception_handler(FideloraError)
    async def _ours(request: Request, error: FideloraError) -> JSONResponse:
        return answer(problem_of(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(
            error.__cause__, FideloraError
        ):  # the framework wraps what is raised while it reads a body
            return answer(problem_of(error.__cause__), request.url.path)
        response = answer(
            Problem(error.status_code, HTTPStatus(error.status_code).name, f"{error.detail}."),
            request.url.path,
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_invalid(error.errors()), request.url.path)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=error)
        return answer(_UNEXPECTED, request.url.path)


_UNEXPECTED = Problem(500, "INTERNAL", "The server failed at this request; its log says why.")


def _invalid(found: Sequence[Mapping[str, Any]]) -> Problem:
    """Fields that are wrong. What was given is repeated only where it is one plain value, and no secret."""
    fields = []
    for entry in found:
        shown = {"type": entry["type"], "loc": list(entry["loc"]), "msg": entry["msg"]}
        given = entry.get("input")
        if _SECRET_FIELDS.isdisjoint(map(str, entry["loc"])) and _is_plain(given):
            shown["input"] = given
        fields.append(shown)
    sentences = (
        f"{'.'.join(str(part) for part in entry['loc'] if part != 'body')}: {entry['msg']}"
        for entry in fields
    )
    return Problem(422, "FIELD_INVALID", "; ".join(sentences).strip(": "), fields=fields)


def _is_plain(value: object) -> bool:
    """Whether it is one value that JSON and UTF-8 can write down."""
    if isinstance(value, str):
        return len(value) <= 200 and value.encode("utf-8", "ignore").decode() == value
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
