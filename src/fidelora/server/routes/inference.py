"""Models, and requests for images."""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Header
from starlette.concurrency import run_in_threadpool

from fidelora.api import (
    Accepted,
    InferenceRequest,
    ModelList,
    accepted,
    check_request,
    model_list,
)
from fidelora.jobs.store import Submission
from fidelora.server.access import Caller
from fidelora.server.context import CallerDep, ContextDep
from fidelora.server.problems import error_responses
from fidelora.server.submit import submission_of, submit

router = APIRouter(prefix="/v1", tags=["inference"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="A repeated call with the same key returns the same request.",
    ),
]


@router.get("/models", responses=error_responses())
async def models(context: ContextDep) -> ModelList:
    """List the model families with their defaults."""
    return model_list(context.configured_models)


@router.post("/inference", responses=error_responses(409, 429, 503, 507))
async def inference(
    body: InferenceRequest,
    context: ContextDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
) -> Accepted:
    """Request images: one for each prompt, all with the same LoRAs.

    The request is stored on disk before the response is sent.
    """
    check_request(body)
    submission = _submission(body, caller, idempotency_key) if idempotency_key else None
    job = await run_in_threadpool(context.store.submitted, submission) if submission else None
    if job is None:
        job = await submit(context, caller, body, submission=submission)
    structlog.contextvars.bind_contextvars(request_id=job.id)
    return accepted(job, context.base_url)


def _submission(body: InferenceRequest, caller: Caller, key: str) -> Submission:
    """Return the submission of a request; its hash does not cover `hf_token`."""
    return submission_of(caller, key, body.model_dump_json(exclude={"hf_token"}).encode())
