"""What endpoints work with, and how they get it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from fidelora.errors import ServerStoppingError
from fidelora.jobs.store import JobStore
from fidelora.loras.cache import AdapterCache
from fidelora.loras.resolve import AdapterResolver
from fidelora.server.api_keys import ApiKeys
from fidelora.server.metrics import Metrics
from fidelora.settings import Settings
from fidelora.workers.pool import WorkerPool


@dataclass(frozen=True)
class ServerContext:
    """The parts of one server.

    Attributes:
        base_url: where clients reach it.
        server_defaults: by model id: the recipe fields that the server decides, such as `base_model` and the dtypes; for a model
            that is not in it, none.
        pool: the workers; None if others work on the store.
        waited_for: of jobs that came by A1111's API and whose clients wait: by id, whose they are.
        stopping: set as soon as the server is told to stop.
    """

    settings: Settings
    store: JobStore
    cache: AdapterCache
    sources: AdapterResolver
    keys: ApiKeys
    metrics: Metrics
    base_url: str
    server_defaults: Mapping[str, Mapping[str, Any]]
    pool: WorkerPool | None = None
    waited_for: dict[str, str] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def refuse_if_stopping(self) -> None:
        """Raise `ServerStoppingError` if no new request is taken."""
        if self.stopping.is_set():
            raise ServerStoppingError


async def _parts(request: Request) -> ServerContext:
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


async def _owner(request: Request) -> str:
    return str(request.scope.get("fidelora_owner", ""))


ContextDep = Annotated[ServerContext, Depends(_parts)]
"""Parameter of an endpoint: the parts of its server."""
Owner = Annotated[str, Depends(_owner)]
"""Parameter of an endpoint: whose API key the request came with; empty on a server without keys."""
