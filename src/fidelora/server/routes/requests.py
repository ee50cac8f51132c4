"""Accepted requests: their status, results, images and cancellation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from fidelora.api import RequestList, ResultBody, StatusBody, result_of, status_of
from fidelora.errors import ImageNotFoundError
from fidelora.images.formats import media_type
from fidelora.jobs.job import Job, Status
from fidelora.server.context import CallerDep, ContextDep, ServerContext
from fidelora.server.job_watcher import Watch
from fidelora.server.outputs import content_of
from fidelora.server.problems import error_responses
from fidelora.server.public_texts import public_text
from fidelora.server.ranges import ranged_response

router = APIRouter(prefix="/v1/requests", tags=["requests"])

_IMAGES = {
    media_type(name): {"schema": {"type": "string", "format": "binary"}}
    for name in ("png", "jpeg", "webp", "mp4")
}

_IMAGE_NOT_FOUND_MESSAGES = {
    Status.IN_QUEUE: "The request is in the queue, so its images do not exist yet; wait until its"
    " status is succeeded.",
    Status.IN_PROGRESS: "The request is in progress, so its images do not exist yet; wait until its"
    " status is succeeded.",
    Status.FAILED: "The request failed, so it has no images; its status has the error.",
    Status.CANCELED: "The request was canceled, so it has no images; send it again.",
}
"""Messages for unsuccessful requests; the default message is for a wrong index."""

# Databases differ in how they treat a NUL, which no id contains.
_ID: dict[str, Any] = {"min_length": 1, "max_length": 64, "pattern": r"^[^\x00]*$"}
RequestId = Annotated[str, Path(**_ID)]


def _job_of(request_id: RequestId, context: ContextDep, caller: CallerDep) -> Job:
    return context.job(request_id, caller)


JobDep = Annotated[Job, Depends(_job_of)]


async def _open_stream(job: JobDep, context: ContextDep) -> AsyncIterator[Watch]:
    # This is a dependency, because its errors must become error responses. The endpoint itself runs
    # after the response has started.
    with context.watcher.stream(), context.watcher.watch() as watch:
        yield watch


@router.get("", responses=error_responses())
def list_requests(
    context: ContextDep,
    caller: CallerDep,
    status: Annotated[Status | None, Query(description="Only requests with this status.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None,
        Query(**_ID, description="`next_cursor` of the previous page."),
    ] = None,
) -> RequestList:
    """List the requests of the API key, newest first; an admin key lists those of all keys."""
    page = context.store.list(status=status, owner=caller.visible_owner, limit=limit, cursor=cursor)
    return RequestList(
        requests=[_status_body(job, context) for job in page.jobs], next_cursor=page.next_cursor
    )


@router.get("/{request_id}/status", responses=error_responses(404))
def request_status(job: JobDep, context: ContextDep) -> StatusBody:
    """Return the status of a request with its queue position and progress."""
    return _status_body(job, context)


@router.get("/{request_id}/result", responses=error_responses(404))
def request_result(job: JobDep, context: ContextDep) -> ResultBody:
    """Return the images and videos of a request; `outputs` is null until it has succeeded."""
    body = result_of(job, context.base_url)
    if body.error is not None:
        body.error = public_text(body.error)
    if body.outputs is not None and not context.settings.report_file_paths:
        for image in (*body.outputs.images, *body.outputs.videos):
            image.file_path = FilePath(image.file_path).name
    return body


@router.get(
    "/{request_id}/events",
    response_class=EventSourceResponse,
    responses=error_responses(404, 503, is_json=False),
)
async def request_events(
    job: JobDep,
    watch: Annotated[Watch, Depends(_open_stream)],
    context: ContextDep,
    previews: Annotated[
        bool, Query(description="Add a preview of the image in progress to the events.")
    ] = False,
    last_event_id: Annotated[
        int | None,
        Header(
            ge=0,
            le=2**63 - 1,
            description="Id of the last received event; browsers send it when they reconnect.",
        ),
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Stream the status as server-sent events: one per change, the last when the request has ended.

    The event id counts the changes. Each event is the complete status, so a client that
    reconnects with `Last-Event-ID` misses nothing.
    """
    sent_version = last_event_id or 0
    sent_waiting: tuple[int | None, str | None] = (None, None)
    position = await run_in_threadpool(context.store.queue_position, job.id)
    watch.add(job, position)
    while True:
        body = _status_body_at(job, position, context, previews)
        waiting = (body.queue_position, body.waiting_reason)
        if (
            job.status.final
            or (job.version > sent_version)
            or (waiting not in ((None, None), sent_waiting))
        ):
            yield ServerSentEvent(data=body, event="status", id=str(job.version))
            sent_version, sent_waiting = job.version, waiting
        if job.status.final or context.stopping.is_set():
            return
        await watch.changed()
        state = watch.state(job.id)
        job, position = state.job, state.position


@router.delete("/{request_id}", responses=error_responses(404))
def cancel_request(job: JobDep, context: ContextDep) -> StatusBody:
    """Cancel a request: a queued one at once, a running one after its current step.

    A request that has ended is not changed.
    """
    return _status_body(context.store.cancel(job.id), context)


@router.head("/{request_id}/images/{index}", include_in_schema=False)
@router.get(
    "/{request_id}/images/{index}",
    response_class=Response,
    responses=error_responses(404, 410, is_json=False)
    | {
        200: {"content": _IMAGES},
        206: {"description": "The part that the header `Range` asks for", "content": _IMAGES},
        416: {"description": "The range begins after the end of the file"},
    },
)
def request_image(
    job: JobDep,
    context: ContextDep,
    index: Annotated[int, Path(ge=0, le=10_000)],
    request: Request,
) -> Response:
    """Return the unmodified file of an image or video; the index is that of its prompt."""
    if index >= len(job.outputs):
        raise ImageNotFoundError(_IMAGE_NOT_FOUND_MESSAGES.get(job.status))
    output = job.outputs[index]
    content = content_of(context.images, output)
    name = FilePath(output.file_path).name
    headers = {
        "Content-Disposition": f'inline; filename="{name}"',
        "ETag": f'"{output.sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return ranged_response(content, request.headers, media_type(output.format), headers)


def _status_body(job: Job, context: ServerContext) -> StatusBody:
    queued = job.status is Status.IN_QUEUE
    position = context.store.queue_position(job.id) if queued else None
    return _status_body_at(job, position, context)


def _status_body_at(
    job: Job, position: int | None, context: ServerContext, with_preview: bool = False
) -> StatusBody:
    reason = (
        (public_text(context.unready_reason) or None) if job.status is Status.IN_QUEUE else None
    )
    body = status_of(job, position, waiting_reason=reason, with_preview=with_preview)
    if body.error is not None:
        body.error = public_text(body.error)
    return body
