"""For those who run the server: is it alive, is it ready, what does it do."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from fidelora.server.context import ContextDep
from fidelora.server.problems import answers

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """The answer to `GET /health`."""

    status: Literal["healthy"] = "healthy"


class Readiness(BaseModel):
    """The answer to `GET /ready`; `reason` says why a worker cannot start, if it cannot."""

    status: Literal["ready", "starting", "stopping"]
    reason: str = ""


@router.get("/health")
async def health() -> Health:
    """Whether the server is alive."""
    return Health()


@router.get(
    "/ready", responses={503: {"model": Readiness, "description": "Not yet, or not any more"}}
)
def ready(context: ContextDep, response: Response) -> Readiness:
    """Whether requests are worked on: a worker has loaded the base model, and the server is not about to stop."""
    if context.stopping.is_set():
        response.status_code = 503
        return Readiness(status="stopping")
    if context.pool is not None and not context.pool.ready:
        response.status_code = 503
        return Readiness(status="starting", reason=context.pool.trouble)
    return Readiness(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses=answers(is_json=False)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(context: ContextDep) -> Response:
    """Counters for Prometheus."""
    return Response(context.metrics.text(), media_type=CONTENT_TYPE_LATEST)
