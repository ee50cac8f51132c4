"""Order of the queue: owners take turns, and jobs with loaded adapters may go first for a while.

Each queued job has a place, which is fixed when the job enters the queue:

* `turn` orders jobs without a failed attempt. The jobs of one owner have consecutive turns, and the
  first of them has the turn of the job that is at the head of the queue. So the queue contains one
  job of each owner per turn, however many jobs one owner has added.
* `due` is a number of claims. Once the store has made this many claims, the job is claimed before
  any job whose adapters are loaded, if it is at the head of the queue or had a failed attempt.

`MemoryStore` uses the functions of this module; `queries.py` states the same rules in SQL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fidelora.jobs.job import Job

MAX_PASSED_OVER = 8
"""Number of claims per live worker by which a job may be delayed, because other jobs need adapters
that are loaded or can share a batch. Bounds the wait of jobs with rare adapters."""


@dataclass(frozen=True)
class Queued:
    """A queued job and its place in the queue."""

    job: Job
    turn: int
    due: int


def adapter_key(adapters: Collection[str]) -> str:
    """Return a short text that is the same for equal sets of adapters; empty for no adapters."""
    distinct = sorted(set(adapters))
    if len(distinct) < 2:
        return "".join(distinct)
    return hashlib.sha256(" ".join(distinct).encode()).hexdigest()


def turn_of_new_job(head: int | None, last_of_owner: int | None) -> int:
    """Return the turn of a new job.

    Args:
        head: turn of the job at the head of the queue; None if the queue is empty.
        last_of_owner: turn of the last queued job of the same owner; None if there is none.
    """
    first = head or 0
    return first if last_of_owner is None else max(first, last_of_owner + 1)


def due_of(claims: int, before: int, live_workers: int) -> int:
    """Return the number of claims after which a job is due.

    Args:
        claims: number of claims so far.
        before: number of queued jobs before the job.
        live_workers: number of workers whose last report is recent (`WORKER_ALIVE_S`).
    """
    return claims + before + MAX_PASSED_OVER * max(1, live_workers)


def choose(
    fresh: Sequence[Queued],
    retries: Sequence[Queued],
    claims: int,
    loaded: Collection[str] = (),
    *,
    merged: Collection[str] = (),
    matches: Callable[[Job], bool] | None = None,
    is_held: Callable[[Job], bool] = lambda job: False,
) -> Job | None:
    """Return the job that `JobStore.claim` takes, or None.

    Args:
        fresh: queued jobs without a failed attempt, by turn and then by arrival.
        retries: queued jobs with a failed attempt whose pause is over, by arrival.
        claims: number of claims so far.
        is_held: returns True for jobs that wait for a worker with their adapters.
    """
    overdue = sorted((one for one in retries if one.due <= claims), key=lambda one: one.due)
    overdue += [one for one in fresh[:1] if one.due <= claims]
    if overdue:
        job = overdue[0].job
        return job if matches is None or matches(job) else None
    jobs = [one.job for one in fresh]
    rest = [one.job for one in retries]
    if matches is not None:
        return next((job for job in [*jobs, *rest] if matches(job)), None)
    loaded, merged = frozenset(loaded), frozenset(merged)
    with_adapters = [job for job in jobs if job.adapters]
    preferred = [
        *(job for job in with_adapters if job.adapters == merged),
        *(job for job in with_adapters if job.adapters <= loaded),
        *(job for job in jobs if not is_held(job)),
        *rest,
    ]
    return next(iter(preferred), None)
