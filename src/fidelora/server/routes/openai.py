"""OpenAI's Images API, for clients that speak it already."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from fidelora.api import OpenAIModel, check_request, recipes_of
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
from fidelora.server.context import ContextDep, ServerContext
from fidelora.server.outputs import base64_of, preview_as
from fidelora.server.problem_formats import openai_error
from fidelora.server.problems import problem_of
from fidelora.server.submit import (
    canceled_on_exit,
    draw_seed,
    finished,
    job_updates,
    submit,
    succeeded,
)

router = APIRouter(tags=["openai"])

_SIGN_OF_LIFE_S = 15.0
"""Between comments in a stream in which nothing happens: what stands between may close it otherwise."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": OpenAIErrorBody, "description": "Cannot be done as it is asked for"},
    "5XX": {"model": OpenAIErrorBody, "description": "There are no images, or not now"},
}


@router.get("/v1/models/{model}", responses=_ERRORS)
async def model(model: str) -> OpenAIModel:
    """One model family, as OpenAI describes models."""
    if model not in all_families():
        raise RequestError(
            f"There is no model {model!r:.100}.", code="MODEL_NOT_FOUND", details={"field": "model"}
        )
    return OpenAIModel(id=model)


@router.post(
    "/v1/images/generations",
    response_model=ImagesBody,
    responses=_ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generate_images(body: ImagesRequest, context: ContextDep, request: Request) -> Response:
    """Ask for images, and wait for them. A client that goes away cancels its request.

    With `stream`, the answer is a stream of events `image_generation.partial_image` and `image_generation.completed`.
    """
    asked = body.to_inference()
    try:
        check_request(asked, needs_lora=False)
        job = await submit(
            context,
            asked.model,
            asked.loras,
            partial(recipes_of, asked, draw_seed=draw_seed),
            hub_token=body.hf_token.get_secret_value() if body.hf_token else None,
            image_format=body.format,
            image_quality=body.output_compression,
        )
    except (
        RequestFieldError
    ) as error:  # it names a field of the request that this one was made into
        *_, field = error.place
        raise RequestFieldError(str(error), place=(FIELD_OF.get(str(field), field),)) from error
    if body.stream:
        return StreamingResponse(
            _stream(job, body.partial_images or 0, context, request), media_type="text/event-stream"
        )
    job = await finished(job, context, request)
    urls = body.response_format == "url"
    answer = await run_in_threadpool(_images, job, context, urls)
    return JSONResponse(answer.model_dump(exclude_none=True))


def _images(job: Job, context: ServerContext, urls: bool) -> ImagesBody:
    assert job.finished_at is not None
    url = f"{context.base_url.rstrip('/')}/v1/requests/{job.id}/images"
    data = [
        ImageData(
            url=f"{url}/{index}" if urls else None,
            b64_json=None if urls else base64_of(output),
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
    )


async def _stream(
    job: Job, partial_images: int, context: ServerContext, request: Request
) -> AsyncIterator[bytes]:
    """The job as events; what goes wrong once the answer has begun is the last of them."""
    pictures, said = _Partials(partial_images), time.monotonic()
    try:
        async with canceled_on_exit(job, context):
            async for now in job_updates(job, context, request):
                job = now
                if (event := pictures.of(job)) is not None:
                    yield _sse(event.type, event.model_dump(exclude_none=True))
                elif time.monotonic() - said < _SIGN_OF_LIFE_S:
                    continue
                else:
                    yield format_sse_event(comment="making images")
                said = time.monotonic()
        for output in succeeded(job).outputs:
            content = await run_in_threadpool(base64_of, output)
            done = event_of(
                "completed", job, content, usage=Usage(), seed=output.seed, sha256=output.sha256
            )
            yield _sse(done.type, done.model_dump(exclude_none=True))
    except FideloraError as error:
        yield _sse("error", openai_error(problem_of(error)))


class _Partials:
    """Which previews of a job are sent: for each image the first new one after each of `most` + 1 equal parts of its steps."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._image = self._sent = 0
        self._last = ""

    def of(self, job: Job) -> ImageEvent | None:
        """The event for the job as it is now, if one is due."""
        progress = job.progress
        if (
            progress is None
            or job.status is not Status.IN_PROGRESS
            or progress.preview in ("", self._last)
        ):
            return None
        if progress.image != self._image:
            self._image, self._sent = progress.image, 0
        if self._sent == self._most or progress.step * (self._most + 1) < progress.steps * (
            self._sent + 1
        ):
            return None
        self._last = progress.preview
        event = event_of(
            "partial_image",
            job,
            preview_as(progress.preview, job.image_format),
            partial_image_index=self._sent,
        )
        self._sent += 1
        return event


def _sse(event: str, data: Mapping[str, Any]) -> bytes:
    return format_sse_event(event=event, data_str=json.dumps(data))
