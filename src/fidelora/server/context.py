"""Context of the server: settings, stores and services that endpoints use.

Endpoints receive it as a parameter of type `ContextDep`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from fastapi import Depends, Request

from fidelora.errors import JobNotFoundError, ServerNotReadyError, ServerStoppingError
from fidelora.families import all_families
from fidelora.jobs.api_keys import ApiKeys
from fidelora.jobs.client_state import ClientState
from fidelora.jobs.job import Job
from fidelora.jobs.store import JobStore
from fidelora.loras.cache import AdapterCache
from fidelora.loras.resolve import AdapterResolver
from fidelora.loras.upload_folder import UploadFolder
from fidelora.server.access import ANONYMOUS, Caller
from fidelora.server.base_models import BaseModels
from fidelora.server.job_watcher import JobWatcher
from fidelora.server.metrics import Metrics
from fidelora.server.retention_clock import RetentionClock
from fidelora.server.size_limits import SizeLimits
from fidelora.server.verifier import Verifier, hub_environment
from fidelora.settings import Settings
from fidelora.storage.images import ImageStore
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.pool import WorkerPool


@dataclass(frozen=True)
class ServerContext:
    """Settings, stores and services of one server.

    Attributes:
        base_url: URL at which clients reach the server.
        server_defaults: recipe fields that the server sets, such as `base_model` and the dtypes,
            by model id. For a model without an entry, the server sets no fields.
        base_models: content hashes of the base models in `server_defaults`.
        limits: limits of what one request may ask for.
        clients: API keys, sessions of browsers, and the state of AUTOMATIC1111's API.
        pool: workers of this server; None if other processes run the jobs.
        retention_clock: clock for the removal of old data.
        stopping: event that is set as soon as the server begins to stop.
        failed: event that is set if the server stops because of an internal error.
    """

    settings: Settings
    store: JobStore
    cache: AdapterCache
    resolver: AdapterResolver
    uploads: UploadFolder
    images: ImageStore
    clients: ClientState
    metrics: Metrics
    base_url: str
    server_defaults: Mapping[str, Mapping[str, Any]]
    base_models: BaseModels
    limits: SizeLimits
    pool: WorkerPool | None = None
    retention_clock: RetentionClock = field(default_factory=RetentionClock)
    stopping: threading.Event = field(default_factory=threading.Event)
    failed: threading.Event = field(default_factory=threading.Event)

    @property
    def keys(self) -> ApiKeys:
        """The API keys."""
        return self.clients.keys

    @cached_property
    def watcher(self) -> JobWatcher:
        """Watches of jobs, which also wake when the server stops or `unready_reason` changes."""
        return JobWatcher(self.store, lambda: (self.stopping.is_set(), self.unready_reason))

    @cached_property
    def verifier(self) -> Verifier:
        """Runs verifications and explanations, one at a time in this process."""
        settings = self.settings
        # A server without workers verifies training runs on its CPU.
        device = settings.devices[0] if settings.devices else "cpu"
        return Verifier(device, settings.inference_timeout_s, hub_environment(settings))

    @property
    def default_model(self) -> str:
        """Model of requests that do not name one: the first with a configured base model."""
        return self.configured_models[0]

    @property
    def configured_models(self) -> list[str]:
        """Models with a configured base model; without any, the first model family."""
        return list(self.settings.base_models) or [next(iter(all_families()))]

    def attempt_ended(self, report: AttemptReport) -> None:
        """Count an attempt of a worker, and update the estimate of the workers' speed."""
        self.metrics.attempt_ended(report)
        self.limits.attempt_ended(report)

    def job(self, job_id: str, caller: Caller) -> Job:
        """Return a job that the caller has access to.

        Raises:
            JobNotFoundError: the job does not exist, or belongs to another API key.
        """
        job = self.store.get(job_id)
        if not caller.can_access(job):
            raise JobNotFoundError
        return job

    def refuse_if_stopping(self) -> None:
        """Raise `ServerStoppingError` if the server accepts no new requests."""
        if self.stopping.is_set():
            raise ServerStoppingError

    @property
    def unready_reason(self) -> str:
        """Reason why a worker could not start or pauses.

        Empty if another worker is ready, or if all workers are still starting.
        """
        return "" if self.pool is None or self.pool.ready else self.pool.unready_reason

    def refuse_if_unavailable(self) -> None:
        """Raise an error if the server accepts no new requests for images.

        Raises:
            ServerStoppingError: the server is stopping.
            ServerNotReadyError: no worker is ready, and one could not start or pauses, for example
                because the disk is full.
        """
        self.refuse_if_stopping()
        if reason := self.unready_reason:
            raise ServerNotReadyError(f"The server cannot make images at the moment: {reason}")


async def _context_of(request: Request) -> ServerContext:
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


def caller_of(request: Request) -> Caller:
    """Return the caller that the access control found for this call."""
    caller = request.scope.get("fidelora_caller")
    return caller if isinstance(caller, Caller) else ANONYMOUS


async def _caller_of(request: Request) -> Caller:
    return caller_of(request)


ContextDep = Annotated[ServerContext, Depends(_context_of)]
"""Type of the endpoint parameter that receives the server's context."""
CallerDep = Annotated[Caller, Depends(_caller_of)]
"""Type of the endpoint parameter that receives the caller and its rights."""
