"""Endpoints of OpenAI's Images API, for its existing clients."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from fidelora.api import OpenAIModel, check_request
from fidelora.api.openai import (
    FIELD_OF,
    ImageData,
    ImageEvent,
    ImagesBody,
    ImagesRequest,
    OpenAIErrorBody,
    Usage,
    event_of,
    size_of,
)
from fidelora.errors import FideloraError, RequestError, RequestFieldError
from fidelora.families import all_families
from fidelora.jobs.job import Job, Status
from fidelora.server.context import CallerDep, ContextDep, ServerContext
from fidelora.server.outputs import base64_of, convert_preview
from fidelora.server.problem_formats import openai_error
from fidelora.server.problems import problem_of
from fidelora.server.submit import (
    cancel_on_exit,
    job_updates,
    require_success,
    submit,
    wait_until_succeeded,
)

router = APIRouter(tags=["openai"])

_KEEPALIVE_INTERVAL_S = 15.0
"""Seconds after which an idle stream sends a comment, so that proxies do not close it."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": OpenAIErrorBody, "description": "The request is not supported or not valid"},
    "5XX": {
        "model": OpenAIErrorBody,
        "description": "The request failed, or the server is unavailable",
    },
}


@router.get("/v1/models/{model}", responses=_ERRORS)
async def model(model: str) -> OpenAIModel:
    """Return one model family in OpenAI's format."""
    if model not in all_families():
        raise RequestError(
            f"The model {model!r:.100} does not exist.",
            code="MODEL_NOT_FOUND",
            details={"field": "model"},
        )
    return OpenAIModel(id=model)


@router.post(
    "/v1/images/generations",
    response_model=ImagesBody,
    responses=_ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generate_images(
    body: ImagesRequest, context: ContextDep, caller: CallerDep, request: Request
) -> Response:
    """Request images and wait for them. A client that disconnects cancels its request.

    With `stream`, the response is a stream of `image_generation.partial_image` and
    `image_generation.completed` events.
    """
    inference = body.to_inference(context.settings.aliases_of_models, context.settings.base_models)
    try:
        check_request(inference, needs_lora=False)
        job = await submit(context, caller, inference, image_quality=body.image_quality)
    except RequestFieldError as error:
        *_, field = error.loc  # a field of `inference`; reported by its name in this API
        raise RequestFieldError(str(error), loc=(FIELD_OF.get(str(field), field),)) from error
    if body.stream:
        return StreamingResponse(
            _stream(job, body.partial_images or 0, context, request), media_type="text/event-stream"
        )
    job = await wait_until_succeeded(job, context, request)
    urls = body.response_format == "url"
    answer = await run_in_threadpool(_images, job, context, urls)
    return JSONResponse(answer.model_dump(exclude_none=True))


def _images(job: Job, context: ServerContext, urls: bool) -> ImagesBody:
    assert job.finished_at is not None
    url = f"{context.base_url.rstrip('/')}/v1/requests/{job.id}/images"
    data = [
        ImageData(
            url=f"{url}/{index}" if urls else None,
            b64_json=None if urls else base64_of(context.images, output),
            seed=output.seed,
            sha256=output.sha256,
        )
        for index, output in enumerate(job.outputs)
    ]
    created = int(job.finished_at.timestamp())
    return ImagesBody(
        created=created,
        data=data,
        output_format=job.image_format,  # type: ignore[arg-type]
        size=size_of(job),
        request_id=job.id,
        notes=list(job.notes) or None,
    )


async def _stream(
    job: Job, partial_images: int, context: ServerContext, request: Request
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a job; an error becomes the last event."""
    previews, last_sent = _PreviewSelector(partial_images), time.monotonic()
    try:
        async with cancel_on_exit(job, context):
            async for update in job_updates(job, context, request):
                job = update
                if (event := previews.event(job)) is not None:
                    yield _sse(event.type, event.model_dump(exclude_none=True))
                elif time.monotonic() - last_sent < _KEEPALIVE_INTERVAL_S:
                    continue
                else:
                    yield format_sse_event(comment="making images")
                last_sent = time.monotonic()
        for output in require_success(job).outputs:
            content = await run_in_threadpool(base64_of, context.images, output)
            done = event_of(
                "completed", job, content, usage=Usage(), seed=output.seed, sha256=output.sha256
            )
            yield _sse(done.type, done.model_dump(exclude_none=True))
    except FideloraError as error:
        yield _sse("error", openai_error(problem_of(error)))


class _PreviewSelector:
    """Selects the previews of a job to send, up to `limit` per image.

    It divides the steps of an image into `limit` + 1 equal parts, and selects the first new preview
    after the end of each part except the last.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._image = self._sent = 0
        self._last_preview = ""

    def event(self, job: Job) -> ImageEvent | None:
        """Return the event for the job's current preview, or None if none is due."""
        progress = job.progress
        if (
            progress is None
            or job.status is not Status.IN_PROGRESS
            or progress.preview in ("", self._last_preview)
        ):
            return None
        if progress.image != self._image:
            self._image, self._sent = progress.image, 0
        if self._sent == self._limit or progress.step * (self._limit + 1) < progress.steps * (
            self._sent + 1
        ):
            return None
        self._last_preview = progress.preview
        event = event_of(
            "partial_image",
            job,
            convert_preview(progress.preview, job.image_format),
            partial_image_index=self._sent,
        )
        self._sent += 1
        return event


def _sse(event: str, data: Mapping[str, Any]) -> bytes:
    return format_sse_event(event=event, data_str=json.dumps(data))
