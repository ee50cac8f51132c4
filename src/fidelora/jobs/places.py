"""Places of jobs in the queue of a database; see `queue_order.py`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fidelora.jobs.job import Job
from fidelora.jobs.queries import Queries
from fidelora.jobs.queue_order import due_of, turn_of_new_job
from fidelora.jobs.transactions import Database


@dataclass(frozen=True)
class Place:
    """Place of a new job.

    Attributes:
        columns: values of its row.
        before: number of queued jobs before it.
    """

    columns: dict[str, int | float]
    before: int


class Places:
    """Computes the places of jobs that enter the queue."""

    def __init__(self, database: Database, queries: Queries) -> None:
        self._database = database
        self._queries = queries

    def of_new_job(self, connection: sa.Connection, job: Job, now: datetime | None) -> Place:
        """Return the place of a new job."""
        place = self._read(connection, job, now)
        turn = turn_of_new_job(place.head, place.last_of_owner)
        before = connection.execute(self._queries.count_before, {"turn": turn}).scalar_one()
        due = due_of(place.claims, before, place.workers)
        return Place({"turn": turn, "due": due, "queued_at_s": place.now_s}, before)

    def due_of_retry(self, connection: sa.Connection, job: Job, now: datetime) -> int:
        """Return the number of claims after which a job with a failed attempt is due."""
        place = self._read(connection, job, now)
        return due_of(place.claims, 0, place.workers)

    def _read(self, connection: sa.Connection, job: Job, now: datetime | None) -> Any:
        given = self._database.now(now) | {"owner": job.owner}
        return connection.execute(self._queries.places, given).one()
