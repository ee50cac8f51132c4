"""Error bodies in the format of `ai-toolkit-inference`, OpenAI or AUTOMATIC1111, by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from fidelora.server.public_texts import public_text
from fidelora.server.unknown_routes import OPENAI_ROUTES
from fidelora.texts import shortened

RETRY_AFTER_S = 10
"""Value of the `Retry-After` header of 429 and 503 responses."""
OPENAI_PATHS = ("/v1/images/", "/v1/models/", *OPENAI_ROUTES)
A1111_PATHS = ("/sdapi/",)


MAX_SHOWN = 200
"""Maximum length in bytes of names from the request that an error repeats."""
MAX_FIELDS = 20
"""Maximum number of invalid fields that an error lists."""


@dataclass(frozen=True)
class Problem:
    """An error response, independent of the format of its body.

    Attributes:
        fields: the invalid fields in FastAPI's format; empty for all other errors.
        final: True if a retry cannot succeed, although the status code suggests a retry.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, object] = field(default_factory=dict)
    fields: Sequence[Mapping[str, Any]] = ()
    final: bool = False

    def __post_init__(self) -> None:
        message, left_out = public_text(self.message), len(self.fields) - MAX_FIELDS
        if left_out > 0:
            message = f"{message} ({left_out:,} more fields are invalid.)"
        fields = [{**field, "msg": public_text(field["msg"])} for field in self.fields[:MAX_FIELDS]]
        object.__setattr__(self, "message", message)
        object.__setattr__(self, "details", _public(self.details))
        object.__setattr__(self, "fields", fields)


def _public(value: Any) -> Any:
    """Return the details of an error without paths, and with short texts."""
    if isinstance(value, str):
        return shortened(public_text(value), MAX_SHOWN)
    if isinstance(value, Mapping):
        return {name: _public(one) for name, one in value.items()}
    return [_public(one) for one in value] if isinstance(value, list | tuple) else value


def problem_response(problem: Problem, path: str) -> JSONResponse:
    """Return the response for a call of `path`."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if problem.status in (429, 503) else {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Basic" if path.startswith(A1111_PATHS) else "Bearer"
    if path.startswith(OPENAI_PATHS):
        headers |= {"x-should-retry": "false"} if problem.final else {}
        status = (
            400 if problem.fields else 404 if problem.code == "MODEL_NOT_FOUND" else problem.status
        )
        return JSONResponse(openai_error(problem), status, headers)
    if problem.fields:  # FastAPI's format, which A1111 uses too
        return JSONResponse({"detail": list(problem.fields)}, problem.status, headers)
    if path.startswith(A1111_PATHS):
        body = {
            "error": problem.code,
            "detail": problem.message,
            "body": "",
            "errors": problem.message,
        }
        return JSONResponse(body, problem.status, headers)
    error = {"code": problem.code, "message": problem.message, "details": dict(problem.details)}
    return JSONResponse({"detail": {"error": error}}, problem.status, headers)


_OPENAI_CODES = {
    "UNAUTHORIZED": "invalid_api_key",
    "MODEL_NOT_FOUND": "model_not_found",
    "QUEUE_FULL": "rate_limit_exceeded",
}
"""OpenAI's error codes, by this API's codes, where they differ."""


def openai_error(problem: Problem) -> dict[str, Any]:
    """Return an error body of OpenAI's API, used for responses and for error events in streams."""
    kind = (
        "rate_limit_error"
        if problem.status == 429
        else "server_error"
        if problem.status >= 500
        else "invalid_request_error"
    )
    param = problem.details.get("field")
    if problem.fields:
        param = ".".join(str(part) for part in problem.fields[0]["loc"] if part != "body") or None
    code = _OPENAI_CODES.get(problem.code, problem.code)
    return {"error": {"message": problem.message, "type": kind, "param": param, "code": code}}
