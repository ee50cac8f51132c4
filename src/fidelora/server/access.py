"""Rights of a caller: which requests and uploads it may read, use and change.

A key has access to its own requests and uploads, an admin key to those of all. LoRAs that the
operator put into the LoRA folder belong to every key. Without keys, every caller has access to
everything.
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
        """Only owner whose jobs and uploads it sees; None for those of all."""
        return None if self.is_admin else self.owner

    def sees(self, job: Job) -> bool:
        """True if it has access to this job."""
        return self.is_admin or (bool(self.key_id) and job.owner == self.key_id)


EVERYBODY = Caller(None, is_admin=True)
"""The caller of a server without keys."""
NOBODY = Caller("", is_admin=False)
"""A caller without a valid key, which has access only to the LoRA folder."""
