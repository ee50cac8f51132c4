"""How errors are written down: in the shape of the documented API, and of the APIs of OpenAI and AUTOMATIC1111 on their paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

RETRY_AFTER_S = 10
OPENAI_PATHS = ("/v1/images/", "/v1/models/")
A1111_PATHS = ("/sdapi/",)


@dataclass(frozen=True)
class Problem:
    """What is wrong, before it has a shape.

    Attributes:
        fields: which ones are wrong, as FastAPI describes them; empty if that is not what is wrong.
        final: whether sending the same again is of no use although the status would let a client think so.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, object] = field(default_factory=dict)
    fields: Sequence[Mapping[str, Any]] = ()
    final: bool = False


def answer(problem: Problem, path: str) -> JSONResponse:
    """The answer to a call of `path`."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if problem.status in (429, 503) else {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Basic" if path.startswith(A1111_PATHS) else "Bearer"
    if path.startswith(OPENAI_PATHS):
        headers |= {"x-should-retry": "false"} if problem.final else {}
        status = (
            400 if problem.fields else 404 if problem.code == "MODEL_NOT_FOUND" else problem.status
        )
        return JSONResponse(openai_error(problem), status, headers)
    if problem.fields:  # in FastAPI's own shape, which A1111 has, too
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
"""What OpenAI calls what we have other names for."""


def openai_error(problem: Problem) -> dict[str, Any]:
    """The body of an error of OpenAI's API; the data of an event that ends a stream, too."""
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
