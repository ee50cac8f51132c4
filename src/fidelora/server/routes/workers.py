"""The workers of all machines."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter

from fidelora.api.responses import WorkerBody, WorkerList
from fidelora.errors import AdminKeyRequiredError
from fidelora.server.context import CallerDep, ContextDep
from fidelora.server.problems import error_responses

router = APIRouter(prefix="/v1/workers", tags=["operations"])


@router.get("", responses=error_responses())
def list_workers(context: ContextDep, caller: CallerDep) -> WorkerList:
    """List the live workers of all machines by name, for admin keys only."""
    if not caller.is_admin:
        raise AdminKeyRequiredError("Only an admin key can list the workers.")
    states = context.store.workers()
    requests = {job.worker: job.id for job in context.store.running("")}
    now = datetime.now(UTC)
    return WorkerList(
        workers=[
            WorkerBody(
                name=state.name,
                device=state.device,
                version=state.version,
                request_id=requests.get(state.name),
                idle_s=None
                if state.idle_since is None
                else max(0.0, round((now - state.idle_since).total_seconds(), 1)),
                models=list(state.models),
                adapters=sorted(state.loaded),
                merged_adapters=sorted(state.merged),
                reported_at=state.reported_at,
            )
            for state in states
        ]
    )
