"""Requests that were accepted: where they are, what they made, and how to stop them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from fidelora.api import RequestList, ResultBody, StatusBody, result_of, status_of
from fidelora.errors import ImageNotFoundError
from fidelora.jobs.job import Job, Status
from fidelora.server.context import ContextDep, ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.problems import answers
from fidelora.server.submit import LOOK_EVERY_S

router = APIRouter(prefix="/v1/requests", tags=["requests"])

_IMAGES = {
    f"image/{name}": {"schema": {"type": "string", "format": "binary"}}
    for name in ("png", "jpeg", "webp")
}

RequestId = Annotated[str, Path(min_length=1, max_length=64)]


def _job(request_id: RequestId, context: ContextDep) -> Job:
    return context.store.get(request_id)


JobDep = Annotated[Job, Depends(_job)]


@router.get("", responses=answers())
def list_requests(
    context: ContextDep,
    status: Annotated[Status | None, Query(description="Only those in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None,
        Query(min_length=1, max_length=64, description="`next_cursor` of the page before."),
    ] = None,
) -> RequestList:
    """Requests, newest first."""
    page = context.store.list(status=status, limit=limit, cursor=cursor)
    return RequestList(
        requests=[_status(job, context) for job in page.jobs], next_cursor=page.next_cursor
    )


@router.get("/{request_id}/status", responses=answers(404))
def request_status(job: JobDep, context: ContextDep) -> StatusBody:
    """Where a request is: its state, its place in the queue, its progress."""
    return _status(job, context)


@router.get("/{request_id}/result", responses=answers(404))
def request_result(job: JobDep, context: ContextDep) -> ResultBody:
    """What a request made; `outputs` is null until it has succeeded."""
    return result_of(job, context.base_url)


@router.get(
    "/{request_id}/events",
    response_class=EventSourceResponse,
    responses=answers(404, is_json=False),
)
async def request_events(
    job: JobDep,
    context: ContextDep,
    previews: Annotated[
        bool, Query(description="Whether events carry a rough picture of what is being made.")
    ] = False,
    last_event_id: Annotated[
        int | None,
        Header(ge=0, le=2**63 - 1, description="As browsers send it when they connect again."),
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """The status as server-sent events: one whenever something changed, the last one when the request has ended.

    An event's id counts the changes. Each event is the whole status, so whoever connects again with `Last-Event-ID` misses nothing.
    """
    seen: tuple[int, int | None] = (last_event_id or 0, None)
    while True:
        body = await run_in_threadpool(_status, job, context, previews)
        if (
            job.status.final
            or (job.version > seen[0])
            or (body.queue_position not in (None, seen[1]))
        ):
            yield ServerSentEvent(data=body, event="status", id=str(job.version))
            seen = (job.version, body.queue_position)
        if job.status.final or context.stopping.is_set():
            return
        await asyncio.sleep(LOOK_EVERY_S)
        job = await run_in_threadpool(context.store.get, job.id)


@router.delete("/{request_id}", responses=answers(404))
def cancel_request(request_id: RequestId, context: ContextDep) -> StatusBody:
    """Stop a request: a waiting one at once, a running one after its current step. One that has ended stays as it is."""
    return _status(context.store.cancel(request_id, datetime.now(UTC)), context)


@router.get(
    "/{request_id}/images/{index}",
    response_class=Response,
    responses=answers(404, 410, is_json=False) | {200: {"content": _IMAGES}},
)
def request_image(job: JobDep, index: Annotated[int, Path(ge=0, le=10_000)]) -> Response:
    """An image's file, exactly as it was made."""
    if index >= len(job.outputs):
        raise ImageNotFoundError
    output = job.outputs[index]
    content = content_of(output)
    name = FilePath(output.file_path).name
    headers = {
        "Content-Disposition": f'inline; filename="{name}"',
        "ETag": f'"{output.sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return Response(content, media_type=f"image/{output.format}", headers=headers)


def _status(job: Job, context: ServerContext, with_preview: bool = False) -> StatusBody:
    waits = job.status is Status.IN_QUEUE
    return status_of(
        job, context.store.queue_position(job.id) if waits else None, with_preview=with_preview
    )
