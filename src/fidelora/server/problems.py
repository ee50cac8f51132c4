"""Mapping of errors to HTTP statuses and codes; `problem_formats.py` builds the bodies."""

from __future__ import annotations

import errno
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
from fidelora.atomic import is_full
from fidelora.errors import (
    FideloraError,
    RequestError,
    RequestFailedError,
    RequestFieldError,
    StorageFullError,
)
from fidelora.field_sentences import field_sentence
from fidelora.server.problem_formats import (
    MAX_SHOWN,
    Problem,
    problem_response,
)
from fidelora.server.unknown_routes import unknown_route

log = structlog.get_logger(__name__)

# The first match counts, so subclasses come before their base classes.
_STATUS_AND_CODE: Sequence[tuple[type[FideloraError], int, str]] = (
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
    (errors.PeerNotAllowedError, 403, "CALLER_NOT_ALLOWED"),
    (errors.AdminKeyRequiredError, 403, "ADMIN_KEY_REQUIRED"),
    (errors.JobStoreError, 503, "STORE_UNAVAILABLE"),
    (errors.StorageFullError, 507, "STORAGE_FULL"),
    (errors.StorageError, 503, "STORAGE_UNAVAILABLE"),
    (errors.ServerStoppingError, 503, "SERVER_STOPPING"),
    (errors.ServerNotReadyError, 503, "SERVER_NOT_READY"),
    (errors.StreamsFullError, 503, "TOO_MANY_STREAMS"),
    (errors.AdapterUrlRefusedError, 400, "LORA_URL_NOT_ALLOWED"),
    (errors.AdapterDownloadError, 400, "LORA_DOWNLOAD_FAILED"),
    (errors.UploadNotFoundError, 404, "UPLOAD_NOT_FOUND"),
    (errors.UploadQuotaError, 507, "UPLOAD_QUOTA"),
    (errors.AdapterExistsError, 409, "LORA_EXISTS"),
    (errors.AdapterInUseError, 409, "LORA_IN_USE"),
    (errors.AdapterNotFoundError, 400, "LORA_NOT_FOUND"),
    (errors.UploadNameError, 400, "UPLOAD_NAME_INVALID"),
    (errors.AdapterNameError, 400, "LORA_NOT_FOUND"),
    (errors.AdapterChangedError, 400, "LORA_CHANGED"),
    (errors.AdapterError, 400, "LORA_INVALID"),
    (errors.WeightsFileError, 400, "LORA_INVALID"),
)

REQUEST_CODES = {
    "MODEL_NOT_FOUND": "The model does not exist; `details.supported_models` lists all models.",
    "LORA_FILE_REQUIRED": "The list of LoRAs is empty.",
    "MOE_FORMAT_NOT_SUPPORTED": "The model has one transformer; remove the LoRA's `transformer`.",
    "MOE_FORMAT_REQUIRED": "The model has two transformers; set the LoRA's `transformer`.",
    "FIELD_NOT_SUPPORTED": "The field in `details.field` is unknown or not supported by the model.",
    "MULTIPLIERS_DO_NOT_MATCH": "A prompt does not have one multiplier per LoRA.",
    "BASE_MODEL_DIFFERS": "The image was made with another base model; see `details.differs`.",
    "EXPLANATION_FAILED": "The picture or the training run of `POST /v1/explain` cannot be used.",
    "LORA_BYTES_MISSING": (
        "The server lacks LoRAs of the image; `details.missing` has the sha256 and name of each."
    ),
    "IMAGE_TOO_LARGE": "The image has more pixels than the server allows.",
    "REQUEST_TOO_LARGE": "The request would take longer than the server allows.",
    "HOST_NOT_ALLOWED": "A server without API keys accepts only hostnames of its own machine.",
    "NAME_INVALID": "A name in the request is too long for a file, or not supported by the disk.",
    "OTHER_SITE": "A browser sent this call from a page of another site.",
}
"""Codes of errors that `_STATUS_AND_CODE` does not list. The status is 400, except 404 for
MODEL_NOT_FOUND on OpenAI's paths."""

_DESCRIPTIONS = {
    400: "The request is not supported or not valid",
    401: "API key missing or unknown",
    403: "Not allowed from another machine, or without an admin key",
    404: "Not found",
    409: "Conflicts with the current state",
    410: "Gone",
    413: "Body too large",
    415: "Content type not supported",
    429: "The queue is full",
    503: "Temporarily unavailable",
    507: "The disk, or the space for uploads, is full",
}

_SECRET_FIELDS = {"hf_token"}


def codes() -> dict[str, tuple[int, str]]:
    """Return the codes of `REQUEST_CODES` and `_STATUS_AND_CODE`, with status and meaning."""
    request_codes = {code: (400, meaning) for code, meaning in REQUEST_CODES.items()}
    return request_codes | {
        code: (status, str(kind())) for kind, status, code in reversed(_STATUS_AND_CODE)
    }


def error_responses(*statuses: int, is_json: bool = True) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` argument of a route: these statuses and those common to all routes.

    Args:
        is_json: False if the route's success response is not JSON. The media type of errors is
            then given explicitly, because FastAPI would document the success response's type.
    """
    body: dict[str, Any] = {"model": ErrorBody}
    if not is_json:
        body = {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        }
    return {
        status: {**body, "description": _DESCRIPTIONS[status]}
        for status in (400, 401, 403, 413, *statuses)
    }


def problem_of(error: FideloraError) -> Problem:
    """Return the error response for an error."""
    if isinstance(error, RequestFieldError):
        return _invalid([{"type": "value_error", "loc": ["body", *error.loc], "msg": str(error)}])
    if isinstance(error, RequestError):
        return Problem(400, error.code, str(error), error.details)
    if isinstance(error, RequestFailedError):
        return Problem(500, error.code, str(error), final=True)
    if isinstance(error, errors.AdaptersMissingError):
        missing = [{"sha256": sha256, "name": name} for sha256, name in error.missing]
        return Problem(400, "LORA_BYTES_MISSING", str(error), {"missing": missing})
    for kind, status, code in _STATUS_AND_CODE:
        if isinstance(error, kind):
            return Problem(status, code, str(error), final=status == 409)
    log.error("unexpected error", exc_info=error)
    return _UNEXPECTED


def install(app: FastAPI) -> None:
    """Register the error handlers on the application."""

    @app.exception_handler(FideloraError)
    async def handle_fidelora_error(request: Request, error: FideloraError) -> JSONResponse:
        return problem_response(problem_of(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI wraps errors that are raised while it reads a body.
        if isinstance(error.__cause__, FideloraError):
            return problem_response(problem_of(error.__cause__), request.url.path)
        if isinstance(error.__cause__, OSError) and is_full(error.__cause__):
            return problem_response(problem_of(StorageFullError()), request.url.path)
        message = f"{str(error.detail).rstrip('.')}."
        if error.status_code == 404 and error.detail == HTTPStatus.NOT_FOUND.phrase:
            message = unknown_route(request.url.path)  # the router found no route
        response = problem_response(
            Problem(error.status_code, HTTPStatus(error.status_code).name, message),
            request.url.path,
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(
        request: Request, error: RequestValidationError
    ) -> JSONResponse:
        return problem_response(_invalid(error.errors()), request.url.path)

    @app.exception_handler(OSError)
    async def handle_os_error(request: Request, error: OSError) -> JSONResponse:
        if is_full(error):  # for example the folder for temporary files
            log.error("disk full", exc_info=error)
            return problem_response(problem_of(StorageFullError()), request.url.path)
        if error.errno in _NAME_ERRORS:
            return problem_response(_NAME_INVALID, request.url.path)
        return await handle_unexpected_error(request, error)

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=error)
        return problem_response(_UNEXPECTED, request.url.path)


_UNEXPECTED = Problem(
    500, "INTERNAL", "The server failed to handle this call; see its log for the reason."
)


_NAME_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ}
"""Errors of the operating system about file names. The server's own names are valid, so the invalid
name comes from the client."""
_NAME_INVALID = Problem(
    400,
    "NAME_INVALID",
    "A name in the request is not a valid file name: it is too long, has characters that the file "
    "system does not support, or is a symbolic link to itself. Use another name.",
)


def _invalid(found: Sequence[Mapping[str, Any]]) -> Problem:
    """Return the problem for invalid fields; short values that are not secret are included."""
    fields = []
    for entry in found:
        loc = [part[:MAX_SHOWN] if isinstance(part, str) else part for part in entry["loc"]]
        field = {"type": entry["type"], "loc": loc, "msg": field_sentence(entry)}
        value = entry.get("input")
        if _SECRET_FIELDS.isdisjoint(map(str, entry["loc"])) and _is_plain(value):
            field["input"] = value
        fields.append(field)
    sentences = (
        f"{'.'.join(str(part) for part in entry['loc'] if part != 'body')}: {entry['msg']}"
        for entry in fields
    )
    return Problem(422, "FIELD_INVALID", " ".join(sentences).strip(": "), fields=fields)


def _is_plain(value: object) -> bool:
    """True for a short scalar that JSON and UTF-8 can represent."""
    if isinstance(value, str):
        return len(value) <= 200 and value.encode("utf-8", "ignore").decode() == value
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
