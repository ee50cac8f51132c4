"""Endpoints for operators: liveness, readiness and metrics."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from fidelora.server.context import ContextDep
from fidelora.server.problems import error_responses
from fidelora.server.public_texts import public_text

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """Response of `GET /health`."""

    status: Literal["healthy"] = "healthy"


class Readiness(BaseModel):
    """Response of `GET /ready`; `reason` tells why a worker cannot start or has paused."""

    status: Literal["ready", "starting", "stopping"]
    reason: str = ""


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """Return 200 while the server is alive."""
    return Health()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"model": Readiness, "description": "Starting or stopping"}})
def ready(context: ContextDep, response: Response) -> Readiness:
    """Return 200 while a worker with a loaded base model takes requests, and 503 otherwise.

    A server without workers of its own (`DEVICE=none`) is ready until it stops.
    """
    if context.stopping.is_set():
        response.status_code = 503
        return Readiness(status="stopping")
    if context.pool is not None and not context.pool.ready:
        response.status_code = 503
        return Readiness(status="starting", reason=public_text(context.unready_reason))
    return Readiness(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses=error_responses(is_json=False)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(context: ContextDep) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(context.metrics.text(), media_type=CONTENT_TYPE_LATEST)
