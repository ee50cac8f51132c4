"""Models, and requests for images."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import structlog
from fastapi import APIRouter, Header
from starlette.concurrency import run_in_threadpool

from fidelora.adapters.keys import noise_of_file
from fidelora.jobs.job import Job, new_job
from fidelora.jobs.store import Submission
from fidelora.recipe import AdapterRef, Noise
from fidelora.server.parts import Owner, Parts, PartsOf
from fidelora.server.problems import answers
from fidelora.wire import Accepted, InferenceRequest, ModelList, accepted, check_request, model_bodies, recipes_of

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
    check_request(body)
    submission = _submission(body, owner, idempotency_key) if idempotency_key else None
    before = await run_in_threadpool(parts.store.submitted, submission) if submission else None
    job = before or await _new(body, parts, submission)
    structlog.contextvars.bind_contextvars(request_id=job.id)
    return accepted(job, parts.base_url)


async def _new(body: InferenceRequest, parts: Parts, submission: Submission | None) -> Job:
    parts.refuse_if_stopping()
    token = body.hf_token.get_secret_value() if body.hf_token else None
    adapters = [await parts.sources.resolve(lora.path, sha256=lora.sha256, hub_token=token) for lora in body.loras]
    return await run_in_threadpool(_store, body, adapters, parts, submission)


def _store(body: InferenceRequest, adapters: Sequence[AdapterRef], parts: Parts, submission: Submission | None) -> Job:
    # As on the command line: the first adapter's file says which trainer, and so which noise, its previews were made with.
    numerics = {**parts.numerics.get(body.model, {}), "noise": _noise(parts.cache.path(adapters[0].sha256))}
    recipes = recipes_of(body, adapters, numerics, draw_seed=lambda: secrets.randbelow(2**32))
    job = new_job(recipes, datetime.now(UTC), image_format=body.output_format)
    stored = parts.store.add(job, submission=submission, capacity=parts.settings.queue_size)
    if parts.pool is not None:
        parts.pool.wake()
    return stored


@lru_cache(maxsize=1000)
def _noise(path: Path) -> Noise:
    """`noise_of_file` of a file in the cache, whose name is its content."""
    return noise_of_file(path)


def _submission(body: InferenceRequest, owner: str, key: str) -> Submission:
    """Keys of different clients are different keys. A token is no part of what was asked for."""
    content = body.model_dump_json(exclude={"hf_token"})
    return Submission(_sha256(f"{owner}\0{key}"), _sha256(content))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
