"""Simulation of many workers on one queue, with the rules of `fidelora.jobs.queue_order`.

    python -m benchmarks.scale [--quick]

`python -m benchmarks.claims` measures real processes on a real PostgreSQL server.

Jobs arrive at random (a Poisson process), each with one LoRA of a Zipf distribution (s = 1). A
worker keeps the `SLOTS` LoRAs that it used last. A job takes `WORK_S`, plus `READ_S` if the worker
does not have its LoRA, plus `SWITCH_S` if another LoRA is merged. The load is the share of the
workers' time that the work alone would take. When a job arrives, the idle workers try to claim it
in random order; they also try every `POLL_S`. At each try, a worker reports the LoRAs that it has.

The policies are `fifo` (order of arrival), `bound` (loaded LoRAs first, and no job is delayed by
more than `MAX_PASSED_OVER` claims per worker) and `fidelora` (the same, and a job is held for a
worker that has its LoRA). Columns:

* reads, switches: number per claimed job
* lost: share of the workers' time that reads and switches take
* served: share of the jobs that were claimed before the last one arrived
* wait: median and longest time from arrival to claim, in seconds; a job that is left counts with
  its wait so far
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from fidelora.jobs.job import Job
from fidelora.jobs.queue_order import Queued, choose, due_of, turn_of_new_job
from fidelora.workers.process import POLL_S
from fidelora.workers.worker import MAX_HOLD_S

WORK_S, READ_S, SWITCH_S = 1.0, 0.5, 0.1
SLOTS = 8
POLICIES = ("fifo", "bound", "fidelora")


@dataclass(frozen=True)
class Case:
    """One simulated situation; `load` is 1 if the work alone takes all the workers' time."""

    workers: int
    loras: int
    load: float
    seconds: float


CASES = (
    Case(1, 100, 0.6, 2000),
    Case(8, 1, 0.85, 600),
    Case(8, 100, 0.85, 600),
    Case(64, 100, 0.85, 300),
    Case(64, 1000, 0.8, 300),
    Case(64, 5000, 0.7, 300),
    Case(256, 1000, 0.8, 150),
    Case(256, 5000, 0.7, 150),
)
QUICK = (Case(8, 50, 0.85, 60), Case(32, 100, 0.85, 30))


@dataclass(frozen=True)
class Result:
    """Sums of one simulation. `waits` has one item per job, in seconds."""

    case: Case
    reads: int
    switches: int
    served: int
    waits: list[float]

    @property
    def served_part(self) -> float:
        """Share of the jobs that were claimed."""
        return self.served / len(self.waits)

    @property
    def reads_per_job(self) -> float:
        """Number of reads per claimed job."""
        return self.reads / self.served

    @property
    def lost(self) -> float:
        """Share of the workers' time that reads and switches take."""
        seconds = self.reads * READ_S + self.switches * SWITCH_S
        return seconds / (self.case.workers * self.case.seconds)


@dataclass(eq=False)
class _SimulatedJob:
    """The part of a `Job` that the rules read."""

    adapters: frozenset[str]
    arrival_s: float


@dataclass(eq=False)
class _Worker:
    loaded: OrderedDict[str, None] = field(default_factory=OrderedDict)
    merged: frozenset[str] = frozenset()
    reported: frozenset[str] = frozenset()
    hold_s: float = 0.0  # duration of its last read, as in `Worker`
    has_read: bool = False
    is_idle: bool = True
    next_event: int = -1  # number of the event at which it claims again


class Simulation:
    """Workers and a queue under one policy."""

    def __init__(self, case: Case, policy: str) -> None:
        self._case, self._policy = case, policy
        self._random = random.Random(7)  # order in which idle workers claim a new job
        self._workers = [_Worker() for _ in range(case.workers)]
        self._queue: list[Queued] = []
        self._claims = 0
        self._homes: Counter[str] = Counter()  # number of workers that reported each LoRA
        self._events: list[tuple[float, int, _Worker]] = []  # next claim of each worker
        self._numbers = itertools.count()
        self._reads = self._switches = 0
        self._waits: list[float] = []

    def run(self) -> Result:
        """Run until the last job has arrived."""
        for arrival_s, lora in _arrivals(self._case):
            while self._events and self._events[0][0] <= arrival_s:
                at_s, number, worker = heapq.heappop(self._events)
                if number == worker.next_event:
                    self._try_claim(worker, at_s)
            self._add(_SimulatedJob(frozenset([lora]), arrival_s))
            idle = [worker for worker in self._workers if worker.is_idle]
            self._random.shuffle(idle)
            for worker in idle:
                if self._queue:
                    self._try_claim(worker, arrival_s)
        served = len(self._waits)
        left = [arrival_s - _simulated(one.job).arrival_s for one in self._queue]
        return Result(self._case, self._reads, self._switches, served, self._waits + left)

    def _add(self, job: _SimulatedJob) -> None:
        turns = [one.turn for one in self._queue[:1] + self._queue[-1:]]
        turn = turn_of_new_job(turns[0] if turns else None, turns[-1] if turns else None)
        due = due_of(self._claims, len(self._queue), self._case.workers)
        self._queue.append(Queued(cast(Job, job), turn, due))

    def _try_claim(self, worker: _Worker, now_s: float) -> None:
        """Claim the next job for a worker that is idle or has ended its job."""
        if worker.has_read:
            worker.hold_s, worker.has_read = min(READ_S, MAX_HOLD_S), False
        job = self._choose(worker, now_s)
        reported = frozenset(worker.loaded)
        self._homes.subtract(worker.reported)
        self._homes.update(reported)
        worker.reported = reported
        worker.is_idle = job is None
        if job is None:
            self._plan_claim(worker, now_s + POLL_S)
            return
        self._claims += 1
        self._queue = [one for one in self._queue if _simulated(one.job) is not job]
        self._waits.append(now_s - job.arrival_s)
        end_s = now_s + WORK_S
        if not job.adapters <= worker.loaded.keys():
            self._reads += 1
            worker.has_read = True
            end_s += READ_S
        if job.adapters != worker.merged:
            self._switches += 1
            worker.merged = job.adapters
            end_s += SWITCH_S
        for lora in job.adapters:
            worker.loaded[lora] = None
            worker.loaded.move_to_end(lora)
        while len(worker.loaded) > SLOTS:
            worker.loaded.popitem(last=False)
        self._plan_claim(worker, end_s)

    def _plan_claim(self, worker: _Worker, at_s: float) -> None:
        worker.next_event = next(self._numbers)
        heapq.heappush(self._events, (at_s, worker.next_event, worker))

    def _choose(self, worker: _Worker, now_s: float) -> _SimulatedJob | None:
        if not self._queue:
            return None
        if self._policy == "fifo":
            return _simulated(self._queue[0].job)

        def is_held(job: Job) -> bool:
            one = _simulated(job)
            if self._policy == "bound" or one.arrival_s <= now_s - worker.hold_s:
                return False
            return any(self._homes[lora] > (lora in worker.reported) for lora in one.adapters)

        loaded = worker.loaded.keys()
        job = choose(self._queue, (), self._claims, loaded, merged=worker.merged, is_held=is_held)
        return None if job is None else _simulated(job)


def simulate(case: Case, policy: str) -> Result:
    """Simulate one of `POLICIES`; each one has the same jobs."""
    return Simulation(case, policy).run()


def _simulated(job: Job) -> _SimulatedJob:
    return cast(_SimulatedJob, job)


def _arrivals(case: Case) -> Iterator[tuple[float, str]]:
    """Yield the time and the LoRA of each job."""
    draw = random.Random(f"{case.workers} {case.loras}")
    names = [f"{number:064x}" for number in range(case.loras)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, case.loras + 1)))
    rate = case.load * case.workers / WORK_S
    now_s = draw.expovariate(rate)
    while now_s < case.seconds:
        yield now_s, draw.choices(names, cum_weights=weights)[0]
        now_s += draw.expovariate(rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small cases, in seconds")
    options = parser.parse_args()
    print("| workers | LoRAs | load | policy | reads | switches | lost | served | wait |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in QUICK if options.quick else CASES:
        for policy in POLICIES:
            made = simulate(case, policy)
            print(
                f"| {case.workers} | {case.loras:,} | {case.load:g} | {policy} "
                f"| {made.reads_per_job:.3f} | {made.switches / made.served:.3f} "
                f"| {made.lost:.1%} | {made.served_part:.1%} "
                f"| {statistics.median(made.waits):.2f} / {max(made.waits):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
