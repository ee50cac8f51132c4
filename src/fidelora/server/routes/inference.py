"""Models, and requests for images."""

from __future__ import annotations

from functools import partial
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
    recipes_of,
)
from fidelora.jobs.job import Job
from fidelora.jobs.store import Submission
from fidelora.server.context import ContextDep, Owner, ServerContext
from fidelora.server.problems import answers
from fidelora.server.submit import draw_seed, submission_of, submit

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1", tags=["inference"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Repeating a request under its key makes no second one.",
    ),
]


@router.get("/models", responses=answers())
async def models() -> ModelList:
    """Every model family, with its defaults."""
    return model_list()


@router.post("/inference", responses=answers(409, 429, 503))
async def inference(
    body: InferenceRequest,
    context: ContextDep,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> Accepted:
    """Ask for images: one for each prompt, all with the same LoRAs. The request is on disk before the answer comes."""
    check_request(body)
    submission = _submission(body, owner, idempotency_key) if idempotency_key else None
    before = await run_in_threadpool(context.store.submitted, submission) if submission else None
    job = before or await take(body, context, submission)
    structlog.contextvars.bind_contextvars(request_id=job.id)
    return accepted(job, context.base_url)


async def take(
    body: InferenceRequest, context: ServerContext, submission: Submission | None = None
) -> Job:
    """Put a request that `check_request` has passed into the queue.

    Raises:
        as `submit`, and `recipes_of`.
    """
    return await submit(
        context,
        body.model,
        body.loras,
        partial(recipes_of, body, draw_seed=draw_seed),
        hub_token=body.hf_token.get_secret_value() if body.hf_token else None,
        image_format=body.output_format,
        submission=submission,
    )


def _submission(body: InferenceRequest, owner: str, key: str) -> Submission:
    """A token is no part of what was asked for."""
    return submission_of(owner, key, body.model_dump_json(exclude={"hf_token"}).encode())
