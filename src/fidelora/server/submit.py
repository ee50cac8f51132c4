"""The one way of a request into the queue, whoever brings it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from fidelora.adapters.keys import noise_of_file
from fidelora.jobs.job import Job, new_job
from fidelora.jobs.store import Submission
from fidelora.recipe import AdapterRef, Noise
from fidelora.server.parts import Parts
from fidelora.wire import InferenceRequest, check_request, recipes_of


async def submit(body: InferenceRequest, parts: Parts, submission: Submission | None = None) -> Job:
    """Check a request, fetch its LoRAs, and put its images into the queue; on disk when this returns.

    Args:
        submission: the key under which the same request may come again.

    Raises:
        FideloraError: it cannot be taken; `server/problems.py` knows what clients are told.
    """
    check_request(body)
    before = await run_in_threadpool(parts.store.submitted, submission) if submission else None
    if before:
        return before
    parts.refuse_if_stopping()
    token = body.hf_token.get_secret_value() if body.hf_token else None
    adapters = [await parts.sources.resolve(lora.path, sha256=lora.sha256, hub_token=token) for lora in body.loras]
    return await run_in_threadpool(_store, body, adapters, parts, submission)


def _store(body: InferenceRequest, adapters: Sequence[AdapterRef], parts: Parts, submission: Submission | None) -> Job:
    # As on the command line: the first adapter's file says which trainer, and so which noise, its previews were made with.
    numerics = {**parts.numerics[body.model], "noise": noise_of(parts.cache.path(adapters[0].sha256))}
    recipes = recipes_of(body, adapters, numerics, draw_seed=lambda: secrets.randbelow(2**32))
    job = new_job(recipes, datetime.now(UTC), image_format=body.output_format)
    stored = parts.store.add(job, submission=submission, capacity=parts.settings.queue_size)
    if parts.pool is not None:
        parts.pool.wake()
    return stored


@lru_cache(maxsize=1000)
def noise_of(path: Path) -> Noise:
    """`noise_of_file` of a file in the cache, whose name is its content."""
    return noise_of_file(path)
