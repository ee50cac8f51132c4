"""The order of the queue with many workers, in the simulation of `benchmarks/scale.py`."""

from __future__ import annotations

from benchmarks.scale import POLICIES, QUICK, Case, simulate


def test_64_workers_lose_little_time_to_reading_loras():
    case = Case(workers=64, loras=100, load=0.85, seconds=300)
    fifo, ours = simulate(case, "fifo"), simulate(case, "fidelora")
    assert ours.lost <= 0.10 < 0.25 < fifo.lost
    assert ours.reads_per_job <= 0.15 * fifo.reads_per_job
    assert max(ours.waits) <= max(fifo.waits)
    assert ours.served_part >= 0.98


def test_64_workers_read_half_as_often_with_1000_loras():
    case = Case(workers=64, loras=1000, load=0.8, seconds=150)
    fifo, ours = simulate(case, "fifo"), simulate(case, "fidelora")
    assert ours.reads_per_job <= 0.5 * fifo.reads_per_job
    assert max(ours.waits) <= max(fifo.waits)


def test_with_one_lora_each_worker_reads_it_at_most_once():
    for policy in POLICIES:
        for case in QUICK:
            made = simulate(Case(case.workers, 1, case.load, case.seconds), policy)
            assert made.reads <= case.workers
            assert made.served_part >= 0.98
