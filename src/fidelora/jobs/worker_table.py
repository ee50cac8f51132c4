"""The table of the workers, and of the adapters that each of them has loaded."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from fidelora.jobs.job import Job
from fidelora.jobs.queries import COMPLETE_SETS, Queries
from fidelora.jobs.queue_order import adapter_key
from fidelora.jobs.rows import WORKER_ADAPTERS, WORKERS, time_of
from fidelora.jobs.store import WorkerState
from fidelora.jobs.transactions import Database

_FORGET_WORKERS_S = 3600.0  # seconds after the last report of a worker until its row is removed


class WorkerTable:
    """Reports of workers in a database."""

    def __init__(self, database: Database, queries: Queries) -> None:
        self._database = database
        self._queries = queries

    def report(self, state: WorkerState, now: datetime | None) -> None:
        """See `JobStore.report_worker`."""
        with self._database.writing() as connection:
            now_s = connection.execute(
                sa.select(self._queries.now_s), self._database.now(now)
            ).scalar_one()
            row = {
                "name": state.name,
                "device": state.device,
                "version": state.version,
                "loaded": " ".join(sorted(state.loaded)),
                "merged": " ".join(sorted(state.merged)),
                "models": " ".join(state.models),
                "idle_since_s": state.idle_since and state.idle_since.timestamp(),
                "reported_at_s": now_s,
            }
            stored = self._database.insert(WORKERS).values(row)
            connection.execute(stored.on_conflict_do_update(index_elements=["name"], set_=row))
            given = {"loaded": sorted(state.loaded)}
            held = {*connection.execute(COMPLETE_SETS, given).scalars(), *state.loaded}
            if state.merged:
                held.add(adapter_key(state.merged))
            own = WORKER_ADAPTERS.c.worker == state.name
            known = set(
                connection.execute(sa.select(WORKER_ADAPTERS.c.adapters).where(own)).scalars()
            )
            if gone := known - held:
                connection.execute(
                    sa.delete(WORKER_ADAPTERS).where(own, WORKER_ADAPTERS.c.adapters.in_(gone))
                )
            if new := sorted(held - known):
                connection.execute(
                    sa.insert(WORKER_ADAPTERS),
                    [{"worker": state.name, "adapters": key} for key in new],
                )
            forgotten = WORKERS.c.reported_at_s < now_s - _FORGET_WORKERS_S
            names = sa.select(WORKERS.c.name).where(forgotten)
            connection.execute(
                sa.delete(WORKER_ADAPTERS).where(WORKER_ADAPTERS.c.worker.in_(names))
            )
            connection.execute(sa.delete(WORKERS).where(forgotten))

    def remove(self, name: str) -> None:
        """See `JobStore.remove_worker`."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(WORKER_ADAPTERS).where(WORKER_ADAPTERS.c.worker == name))
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.name == name))

    def live(self, now: datetime | None) -> tuple[WorkerState, ...]:
        """See `JobStore.workers`."""
        with self._database.reading() as connection:
            rows = connection.execute(self._queries.live_workers, self._database.now(now)).all()
        return tuple(
            WorkerState(
                row.name,
                row.device,
                row.version,
                frozenset(row.loaded.split()),
                frozenset(row.merged.split()),
                time_of(row.idle_since_s),
                time_of(row.reported_at_s),
                tuple(row.models.split()),
            )
            for row in rows
        )

    def idle(
        self, connection: sa.Connection, job: Job, count: int, now: datetime | None
    ) -> tuple[str, ...]:
        """Return the names of live workers without a job, at most `count`.

        Those that have the adapters of the job loaded come first, then those with the fewest loaded
        adapters. Workers whose device is not of the kind that the job needs are left out.
        """
        given = self._database.now(now) | {
            "adapters": adapter_key(job.adapters),
            "device_kind": job.device_kind,
            "count": count,
        }
        return tuple(connection.execute(self._queries.idle_workers, given).scalars())
