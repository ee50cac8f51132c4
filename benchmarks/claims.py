"""Efficiency of claims: real processes that claim jobs from one PostgreSQL server.

    python benchmarks/claims.py [--workers 2,8,32] [--jobs JOBS] [--work-s 0.2] [--read-s 0]

Starts a PostgreSQL server on this machine, with commits synced to disk (or uses an empty database,
`--store`). Each worker is a process that claims a job, sleeps for `work-s` instead of making an
image, and stores the result, until all jobs are done (by default 20 per worker). It runs one job
before the measurement, so that its queries are compiled. The jobs need 40 adapters with a Zipf
distribution; a worker keeps 8 of them, and sleeps for `read-s` to read another one.

Prints for each number of workers:

* efficiency: `jobs x work / (workers x time)`, from the first claim to the last result
* claim: median and 99th percentile of the time of a claim that returned a job
* processor: milliseconds of processor time per job in the workers' processes, without PostgreSQL's
* statements: number of statements that a worker executes per job, without BEGIN and COMMIT
* empty: number of claims that returned no job before the queue was empty (lost races)
* reads: number of adapters that a worker did not have, per job
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.postgres import postgres_server

from fidelora import AdapterRef, Recipe
from fidelora.jobs.job import Job, Output, Status, new_job
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import WorkerState

ADAPTERS = [f"{number:064x}" for number in range(1, 41)]
SLOTS = 8  # adapters that a worker keeps
LEASE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="2,8,32")
    parser.add_argument("--jobs", type=int, default=0, help="number of jobs; 20 per worker if 0")
    parser.add_argument("--work-s", type=float, default=0.2)
    parser.add_argument("--read-s", type=float, default=0.0)
    parser.add_argument("--store", default="")
    parser.add_argument("--as-worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_worker:
        _work(options)
        return
    server: Any = nullcontext() if options.store else postgres_server(is_synced=True)
    with server as started:
        url = options.store or started.url
        SqlStore(url).close()
        for count in map(int, options.workers.split(",")):
            _measure(url, count, options)


def _measure(url: str, count: int, options: argparse.Namespace) -> None:
    store = SqlStore(url)
    draw = random.Random(count)
    total = options.jobs or 20 * count
    _add(store, draw, count)  # one for each worker, before the measurement
    command = [
        *(sys.executable, __file__, "--store", url, "--work-s", str(options.work_s)),
        *("--read-s", str(options.read_s)),
    ]
    processes = [
        subprocess.Popen(
            [*command, "--as-worker", f"worker-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    _add(store, draw, total)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in processes]
    done = [result for result in results if result["claims"]]
    elapsed = max(one["end"] for one in done) - min(one["start"] for one in done)
    claims = sorted(seconds for one in done for seconds in one["claims"])
    assert len(claims) == total, f"{len(claims)} jobs were done, {total} were added"
    assert store.count(Status.SUCCEEDED) == total + count
    efficiency = total * options.work_s / (count * elapsed)
    p99 = claims[int(len(claims) * 0.99)]
    processor_s = sum(one["processor_s"] for one in results) / total
    statements = sum(one["statements"] for one in results)
    empty = sum(one["empty"] for one in results)
    reads = sum(one["reads"] for one in results)
    print(
        f"{count:3d} workers: efficiency {efficiency:.1%}, {total} jobs in {elapsed:.1f} s; "
        f"claim median {1000 * statistics.median(claims):.1f} ms, p99 {1000 * p99:.1f} ms; "
        f"processor {1000 * processor_s:.1f} ms, {statements / total:.1f} statements per job; "
        f"{empty} empty claims; {reads / total:.2f} reads per job",
        flush=True,
    )
    store.remove_finished(before=datetime.now(UTC), keep=0)
    store.close()


def _add(store: SqlStore, draw: random.Random, number: int) -> None:
    weights = [1 / rank for rank in range(1, len(ADAPTERS) + 1)]
    for _ in range(number):
        adapter = draw.choices(ADAPTERS, weights)[0]
        recipe = Recipe(prompt="a picture of [trigger]", adapters=(AdapterRef(adapter),))
        store.add(new_job((recipe,), datetime.now(UTC)))


def _succeed(store: SqlStore, job: Job, work_s: float) -> None:
    output = Output(f"{job.id}.png", "png", 512, 512, 42, "0" * 64, 1)
    store.succeed(job.id, job.epoch, [output], {"denoise": work_s})


def _work(options: argparse.Namespace) -> None:
    store = SqlStore(options.store)
    name = options.as_worker
    store.report_worker(WorkerState(name))
    first = store.claim(name, None, LEASE_S)
    assert first is not None
    _succeed(store, first, options.work_s)
    store.count(Status.IN_QUEUE)
    statements = 0

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def on_execute(*_details: Any) -> None:
        nonlocal statements
        statements += 1

    print("ready", flush=True)
    sys.stdin.readline()
    loaded: OrderedDict[str, None] = OrderedDict()
    merged: tuple[str, ...] = ()
    claims: list[float] = []
    reads = empty = 0
    start = end = time.time()
    processor_s = time.process_time()
    while True:
        before = time.perf_counter()
        job = store.claim(name, None, LEASE_S, list(loaded), merged=merged)
        if job is None:
            if store.count(Status.IN_QUEUE) == 0:
                break
            empty += 1
            continue
        claims.append(time.perf_counter() - before)
        for adapter in sorted(job.adapters):
            if adapter not in loaded:
                reads += 1
                time.sleep(options.read_s)
            loaded[adapter] = None
            loaded.move_to_end(adapter)
            if len(loaded) > SLOTS:
                loaded.popitem(last=False)
        merged = tuple(job.adapters)
        time.sleep(options.work_s)
        _succeed(store, job, options.work_s)
        end = time.time()
    processor_s = time.process_time() - processor_s
    store.remove_worker(name)
    store.close()
    result = {
        "start": start,
        "end": end,
        "claims": claims,
        "empty": empty,
        "reads": reads,
        "statements": statements,
        "processor_s": processor_s,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
