"""API keys of Gradio's sessions, so that no key can use the session of another."""

from __future__ import annotations

from collections import OrderedDict

from fidelora.server.access import Caller

_MAX_SESSIONS = 10_000
"""Number of sessions to keep, each about 0.2 kB; the least recently used are dropped first."""


class SessionKeys:
    """Owner of each session of the page, by the hash that the browser draws at each page load."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, str] = OrderedDict()

    def allows(self, session_hash: object, caller: Caller) -> bool:
        """True if the session is new or belongs to the caller; a new one is then the caller's."""
        if not isinstance(session_hash, str) or not session_hash:
            return True  # without a session: Gradio refuses the call, or the call needs none
        owner = self._owners.setdefault(session_hash, caller.owner)
        self._owners.move_to_end(session_hash)
        while len(self._owners) > _MAX_SESSIONS:
            self._owners.popitem(last=False)
        return owner == caller.owner
