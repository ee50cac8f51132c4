"""The table of the sets of adapters that jobs need."""

from __future__ import annotations

from collections import OrderedDict

import sqlalchemy as sa

from fidelora.jobs.job import Job
from fidelora.jobs.queue_order import adapter_key
from fidelora.jobs.rows import ADAPTER_SETS, FINAL_STATUSES, JOBS
from fidelora.jobs.transactions import Database

_MAX_KNOWN_SETS = 10_000  # adapter sets that this process has stored; each takes about 0.1 kB


class AdapterSets:
    """Sets of adapters in a database, and the keys of those that this process has stored."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known_sets: OrderedDict[str, None] = OrderedDict()

    def store(self, connection: sa.Connection, job: Job) -> None:
        """Store the adapters of a job, unless this process has stored the same ones before."""
        key = adapter_key(job.adapters)
        if not key or key in self._known_sets:
            return
        rows = [
            {"sha256": sha256, "adapters": key, "size": len(job.adapters)}
            for sha256 in sorted(job.adapters)
        ]
        connection.execute(self._database.insert(ADAPTER_SETS).on_conflict_do_nothing(), rows)

    def stored(self, job: Job) -> None:
        """Record that the transaction that stored the adapters of a job was committed."""
        self._known_sets[adapter_key(job.adapters)] = None
        if len(self._known_sets) > _MAX_KNOWN_SETS:
            self._known_sets.popitem(last=False)

    def is_needed(self, connection: sa.Connection, sha256: str) -> bool:
        """True if an unfinished job needs this adapter."""
        sets = sa.select(ADAPTER_SETS.c.adapters).where(ADAPTER_SETS.c.sha256 == sha256)
        query = sa.select(JOBS.c.seq).where(
            JOBS.c.status.not_in(FINAL_STATUSES), JOBS.c.adapters.in_(sets)
        )
        return connection.execute(query.limit(1)).first() is not None
