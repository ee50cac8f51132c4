"""State of a server's clients: API keys, logins of browsers, and AUTOMATIC1111's settings.

It is kept in a file and in memory by default, and in the database if several servers share one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fidelora.jobs.api_keys import ApiKeys, FileKeys

SESSION_S = 7 * 24 * 3600.0
"""Lifetime of a session: one week, in seconds."""
MAX_SESSIONS = 10_000
"""Number of sessions to keep; the oldest are dropped first."""


class Sessions(Protocol):
    """Sessions of browsers that have logged in with an API key. All methods are thread-safe."""

    @property
    def is_local(self) -> bool:
        """True if no method waits for a database."""
        ...

    def start(self, token_sha256: str, key_sha256: str) -> None:
        """Start a session, which lasts `SESSION_S` seconds.

        Args:
            token_sha256: hash of the session's cookie.
            key_sha256: hash of the API key.
        """
        ...

    def key_of(self, token_sha256: str) -> str | None:
        """Return the hash of a session's API key; None if the session does not exist."""
        ...

    def end(self, token_sha256: str) -> None:
        """End a session, if it exists."""
        ...


class A1111State(Protocol):
    """State of the clients of AUTOMATIC1111's API: the model that they have set, and their jobs.

    An owner is the id of an API key, as in `Job.owner`. All methods are thread-safe.
    """

    def model(self, owner: str) -> str | None:
        """Return the model that the owner has set for later requests."""
        ...

    def set_model(self, owner: str, model: str) -> None:
        """Set the model of the owner's later requests."""
        ...

    def begin(self, job_id: str, owner: str) -> None:
        """Add a job that a client waits for."""
        ...

    def end(self, job_id: str) -> None:
        """Remove a job that no client waits for any more."""
        ...

    def jobs(self, owner: str) -> list[str]:
        """Return the ids of the owner's jobs, oldest first; some of them may have ended."""
        ...


@dataclass(frozen=True)
class ClientState:
    """State of the clients of one server, or of all servers with the same database."""

    keys: ApiKeys
    sessions: Sessions
    a1111: A1111State


def local_state(keys_file: Path) -> ClientState:
    """Return the state of one server, which keeps the API keys in a file and the rest in memory."""
    return ClientState(FileKeys(keys_file), MemorySessions(), MemoryA1111State())


class MemorySessions:
    """Sessions in the memory of one server. Implements `Sessions`."""

    is_local = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # hash of the cookie -> (hash of the key, end of the session)
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def start(self, token_sha256: str, key_sha256: str) -> None:
        with self._lock:
            self._sessions[token_sha256] = (key_sha256, time.monotonic() + SESSION_S)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def key_of(self, token_sha256: str) -> str | None:
        with self._lock:
            key_sha256, end = self._sessions.get(token_sha256, (None, 0.0))
        return key_sha256 if time.monotonic() < end else None

    def end(self, token_sha256: str) -> None:
        with self._lock:
            self._sessions.pop(token_sha256, None)


class MemoryA1111State:
    """State of AUTOMATIC1111's API in the memory of one server. Implements `A1111State`."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}
        self._owners: dict[str, str] = {}  # by job id, oldest first

    def model(self, owner: str) -> str | None:
        return self._models.get(owner)

    def set_model(self, owner: str, model: str) -> None:
        self._models[owner] = model

    def begin(self, job_id: str, owner: str) -> None:
        self._owners[job_id] = owner

    def end(self, job_id: str) -> None:
        self._owners.pop(job_id, None)

    def jobs(self, owner: str) -> list[str]:
        return [job_id for job_id, its_owner in list(self._owners.items()) if its_owner == owner]
