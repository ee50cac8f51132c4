"""Models, and requests for images."""

from __future__ import annotations

import hashlib
from typing import Annotated

import structlog
from fastapi import APIRouter, Header

from fidelora.jobs.store import Submission
from fidelora.server.parts import Owner, PartsOf
from fidelora.server.problems import answers
from fidelora.server.submit import submit
from fidelora.wire import Accepted, InferenceRequest, ModelList, accepted, model_bodies

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1", tags=["inference"])

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="Repeating a request under its key makes no second one.")
]


@router.get("/models", responses=answers())
async def models() -> ModelList:
    """Every model family, with its defaults."""
    return ModelList(models=model_bodies())


@router.post("/inference", responses=answers(409, 429, 503))
async def inference(body: InferenceRequest, parts: PartsOf, owner: Owner, idempotency_key: IdempotencyKey = None) -> Accepted:
    """Ask for images: one for each prompt, all with the same LoRAs. The request is on disk before the answer comes."""
    job = await submit(body, parts, _submission(body, owner, idempotency_key) if idempotency_key else None)
    structlog.contextvars.bind_contextvars(request_id=job.id)
    return accepted(job, parts.base_url)


def _submission(body: InferenceRequest, owner: str, key: str) -> Submission:
    """Keys of different clients are different keys. A token is no part of what was asked for."""
    content = body.model_dump_json(exclude={"hf_token"})
    return Submission(_sha256(f"{owner}\0{key}"), _sha256(content))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
