"""Rights of a caller: which requests and uploads it may read, use and change.

A key has access to its own requests and uploads; an admin key has access to those of every key.
LoRAs that the operator put into the LoRA folder are available to every key. On a server without
keys, every caller has access to everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from fidelora.jobs.job import Job


@dataclass(frozen=True)
class Caller:
    """The client of one call.

    Attributes:
        key_id: id of its API key; None on a server without keys.
        is_admin: True if it has access to the requests and uploads of all keys.
    """

    key_id: str | None
    is_admin: bool

    @property
    def owner(self) -> str:
        """Owner of the jobs and uploads that it makes; empty on a server without keys."""
        return self.key_id or ""

    @property
    def visible_owner(self) -> str | None:
        """Owner whose jobs and uploads it may access; None for those of every owner."""
        return None if self.is_admin else self.owner

    def can_access(self, job: Job) -> bool:
        """True if it has access to this job."""
        return self.is_admin or (bool(self.key_id) and job.owner == self.key_id)


UNRESTRICTED = Caller(None, is_admin=True)
"""Caller on a server without keys, which has access to everything."""
ANONYMOUS = Caller("", is_admin=False)
"""Caller without a valid key, which has access only to the LoRA folder."""
