"""What endpoints work with, and how they get it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from fidelora.adapters.cache import AdapterCache
from fidelora.adapters.source import AdapterSources
from fidelora.errors import ServerStoppingError
from fidelora.jobs.store import JobStore
from fidelora.server.keys import ApiKeys
from fidelora.server.metrics import Metrics
from fidelora.settings import Settings
from fidelora.work.local import LocalPool


@dataclass(frozen=True)
class Parts:
    """The parts of one server.

    Attributes:
        base_url: where clients reach it.
        numerics: by model id: the recipe fields that the server decides, such as `base_model` and the dtypes.
        pool: the workers; None if others work on the store.
        waited_for: of jobs that came by A1111's API and whose clients wait: by id, whose they are.
        stopping: set as soon as the server is told to stop.
    """

    settings: Settings
    store: JobStore
    cache: AdapterCache
    sources: AdapterSources
    keys: ApiKeys
    metrics: Metrics
    base_url: str
    numerics: Mapping[str, Mapping[str, Any]]
    pool: LocalPool | None = None
    waited_for: dict[str, str] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def refuse_if_stopping(self) -> None:
        """Raise `ServerStoppingError` if no new request is taken."""
        if self.stopping.is_set():
            raise ServerStoppingError


async def _parts(request: Request) -> Parts:
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


async def _owner(request: Request) -> str:
    return str(request.scope.get("fidelora_owner", ""))


PartsOf = Annotated[Parts, Depends(_parts)]
"""Parameter of an endpoint: the parts of its server."""
Owner = Annotated[str, Depends(_owner)]
"""Parameter of an endpoint: whose API key the request came with; empty on a server without keys."""
