"""The order of the queue, for every store: retries, owners, adapters and limits."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from tests.jobs.store_support import LEASE_S, NOW, A, B, job, later, needs

from fidelora.jobs.job import MAX_ATTEMPTS, Job, Status
from fidelora.jobs.queue_order import MAX_PASSED_OVER
from fidelora.jobs.store import WORKER_ALIVE_S, JobStore, WorkerState


def abandoned(store: JobStore, at: datetime) -> Job:
    """Return a job back in the queue whose attempt failed at this time."""
    claimed = store.claim("worker", at, LEASE_S)
    assert claimed is not None
    return store.abandon(claimed.id, claimed.epoch, "it died", at)


def test_a_job_with_a_failed_attempt_follows_all_others(store):
    failed, *others = [store.add(job()) for _ in range(3)]
    assert abandoned(store, NOW).id == failed.id
    assert [store.queue_position(each.id) for each in (*others, failed)] == [0, 1, 2]
    assert store.peek().id == others[0].id
    claimed = [store.claim("worker", later(1000), LEASE_S).id for _ in range(3)]
    assert claimed == [each.id for each in (*others, failed)]


def test_the_pause_before_a_retry_grows(store):
    store.add(job())
    pauses, now = [], NOW
    for _ in range(MAX_ATTEMPTS - 1):
        back = abandoned(store, now)
        assert back.retry_at is not None
        pauses.append((back.retry_at - now).total_seconds())
        assert store.claim("worker", now + timedelta(seconds=pauses[-1] - 0.1), LEASE_S) is None
        assert store.peek().id == back.id
        now = back.retry_at
    assert pauses == [2, 20]


@pytest.mark.parametrize("matches", [False, True])
def test_a_retry_waits_for_a_limited_number_of_other_jobs(store, matches):
    failed = store.add(job(A))
    abandoned(store, NOW)
    others = [store.add(job(A)).id for _ in range(MAX_PASSED_OVER + 1)]
    claims = [
        store.claim("worker", later(5), LEASE_S, matches=needs(A) if matches else None)
        for _ in range(MAX_PASSED_OVER + 2)
    ]
    expected = [*others[:MAX_PASSED_OVER], failed.id, others[MAX_PASSED_OVER]]
    assert [each.id for each in claims] == expected


def test_many_jobs_that_kill_their_worker_do_not_hide_the_others(store):
    for number in range(120):  # more than a claim reads
        store.add(job(prompt=str(number)))
        abandoned(store, NOW)
    good = store.add(job())
    assert store.claim("worker", later(1), LEASE_S).id == good.id
    assert store.claim("worker", later(1), LEASE_S) is None


def test_a_retry_does_not_wait_for_a_clock_that_was_put_back(store):
    store.add(job())
    back = abandoned(store, later(86_400))
    assert store.claim("worker", NOW, LEASE_S).id == back.id


def test_a_released_retry_is_still_a_retry(store):
    retry = store.add(job())
    abandoned(store, NOW)
    claimed = store.claim("worker", later(2), LEASE_S)
    back = store.release(claimed.id, claimed.epoch, later(3))
    assert (back.attempts, back.retry_at) == (1, None)
    fresh = store.add(job())
    claims = [store.claim("worker", later(3), LEASE_S).id for _ in range(2)]
    assert claims == [fresh.id, retry.id]


def test_positions_are_the_order_of_claims_for_retries_and_owners(store):
    retry, *_ = [store.add(job(owner=owner)) for owner in ("", "a", "a", "b")]
    abandoned(store, NOW)
    ids = [each.id for each in store.list().jobs]
    read = store.read_changes(dict.fromkeys(ids, 0))
    assert read.positions == {each: store.queue_position(each) for each in ids}
    assert sorted(read.positions.values()) == [0, 1, 2, 3]
    assert read.positions[retry.id] == 3
    claims = [store.claim("worker", later(5), LEASE_S) for _ in range(4)]
    assert [read.positions[each.id] for each in claims] == [0, 1, 2, 3]


def test_owners_take_turns(store):
    many = [store.add(job(owner="a")) for _ in range(6)]
    assert store.claim("worker", NOW, LEASE_S).id == many[0].id
    few = [store.add(job(owner="b")) for _ in range(2)]
    claims = [store.claim("worker", NOW, LEASE_S).id for _ in range(7)]
    expected = [many[1], few[0], many[2], few[1], *many[3:]]
    assert claims == [each.id for each in expected]


def test_overdue_jobs_of_a_long_queue_wait_for_their_owners_turn(store):
    """Jobs of the long queue that are over their limit do not go before the turn of others."""
    for _ in range(4 * MAX_PASSED_OVER):
        store.add(job(owner="a"))
    for _ in range(2):
        store.claim("worker", NOW, LEASE_S)
    others = [store.add(job(owner="b")).id for _ in range(2 * MAX_PASSED_OVER)]
    claims = [store.claim("worker", NOW, LEASE_S).id for _ in range(4 * MAX_PASSED_OVER)]
    assert [each in others for each in claims] == [False, True] * (2 * MAX_PASSED_OVER)


def test_the_limit_grows_with_the_number_of_live_workers(store):
    for name in ("w1", "w2", "w3"):
        store.report_worker(WorkerState(name), NOW)
    store.report_worker(WorkerState("dead"), later(-WORKER_ALIVE_S))
    oldest = store.add(job(A), now=NOW)
    for _ in range(4 * MAX_PASSED_OVER):
        store.add(job(B), now=NOW)
    claims = [
        store.claim("w1", NOW, LEASE_S, loaded=[B]).id for _ in range(3 * MAX_PASSED_OVER + 1)
    ]
    assert claims.index(oldest.id) == 3 * MAX_PASSED_OVER


@pytest.mark.parametrize("adapters", [(A,), (A, B)])
def test_a_job_is_held_for_the_worker_that_has_its_adapters(store, adapters):
    store.add(job(*adapters), now=NOW)
    store.report_worker(WorkerState("home", loaded=frozenset(adapters)), NOW)
    store.report_worker(WorkerState("other", loaded=frozenset({"d" * 64})), NOW)
    assert store.claim("other", later(0.4), LEASE_S, hold_s=0.5) is None
    claimed = store.claim("home", later(0.4), LEASE_S, loaded=adapters, hold_s=0.5)
    assert claimed is not None


@pytest.mark.parametrize("why", ["time", "no_home", "home_is_dead", "own_home", "no_hold"])
def test_a_job_is_not_held_longer_or_for_a_dead_worker(store, why):
    store.add(job(A), now=NOW)
    seconds, home = 0.4, "other" if why == "own_home" else "home"
    if why == "time":
        seconds = 0.6
    if why != "no_home":
        at = later(-WORKER_ALIVE_S) if why == "home_is_dead" else NOW
        store.report_worker(WorkerState(home, loaded=frozenset({A})), at)
    hold_s = 0.0 if why == "no_hold" else 0.5
    assert store.claim("other", later(seconds), LEASE_S, hold_s=hold_s) is not None


def test_a_held_job_does_not_hold_the_others(store):
    store.report_worker(WorkerState("home", loaded=frozenset({A})), NOW)
    held, free = store.add(job(A), now=NOW), store.add(job(B), now=NOW)
    assert store.claim("other", NOW, LEASE_S, hold_s=0.5).id == free.id
    assert store.claim("other", NOW, LEASE_S, hold_s=0.5) is None
    assert store.claim("other", later(1), LEASE_S, hold_s=0.5).id == held.id


def test_jobs_with_loaded_adapters_go_first_up_to_the_limit(store):
    oldest = store.add(job(A))
    warm = [store.add(job(B)) for _ in range(MAX_PASSED_OVER + 3)]
    claimed = []
    for _ in range(MAX_PASSED_OVER + 2):
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert next_job is not None
        claimed.append(next_job.id)
    expected = [each.id for each in warm[:MAX_PASSED_OVER]] + [oldest.id, warm[MAX_PASSED_OVER].id]
    assert claimed == expected


def test_the_limit_holds_for_jobs_in_between(store):
    first, second = store.add(job(A)), store.add(job("d" * 64))
    warm = [store.add(job(B)) for _ in range(MAX_PASSED_OVER)]
    for each in warm:
        claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert claimed is not None
        assert claimed.id == each.id
    store.add(job(B))
    for expected in (first, second):
        claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
        assert claimed is not None
        assert claimed.id == expected.id


def test_a_job_is_preferred_only_if_all_its_adapters_are_loaded(store):
    oldest = store.add(job(A))
    store.add(job(A, B))
    store.add(job())
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[B])
    assert claimed is not None
    assert claimed.id == oldest.id


def test_jobs_for_exactly_the_merged_adapters_go_first(store):
    oldest = store.add(job(B))
    both, one = store.add(job(A, B)), store.add(job(A))
    store.add(job(B))

    def claimed() -> str:
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[A, B], merged=[A])
        assert next_job is not None
        return str(next_job.id)

    assert [claimed() for _ in range(3)] == [one.id, oldest.id, both.id]


def test_jobs_for_merged_adapters_go_first_up_to_the_limit(store):
    oldest = store.add(job(A))
    merged = [store.add(job(B)) for _ in range(MAX_PASSED_OVER + 1)]
    claimed = []
    for _ in range(MAX_PASSED_OVER + 2):
        next_job = store.claim("worker", NOW, LEASE_S, loaded=[A, B], merged=[B])
        assert next_job is not None
        claimed.append(next_job.id)
    assert claimed == [each.id for each in merged[:-1]] + [oldest.id, merged[-1].id]


def test_the_oldest_wanted_job_is_claimed(store):
    first, oldest, warm = (
        store.add(job(A)),
        store.add(job(B, prompt="the oldest")),
        store.add(job(B)),
    )
    claimed = store.claim("worker", NOW, LEASE_S, matches=needs(B))
    assert claimed is not None
    assert (claimed.id, claimed.status) == (oldest.id, Status.IN_PROGRESS)
    assert [store.get(each.id) for each in (first, warm)] == [first, warm]


def test_loaded_adapters_do_not_affect_the_choice_of_wanted_jobs(store):
    first, wanted = store.add(job(A)), store.add(job(A, B))
    store.add(job(B))
    claimed = store.claim("worker", NOW, LEASE_S, loaded=[B], matches=needs(B))
    assert claimed is not None
    assert claimed.id == wanted.id
    assert store.get(first.id) == first


def test_without_a_wanted_job_nothing_changes(store):
    assert store.claim("worker", NOW, LEASE_S, matches=needs(B)) is None
    added = [store.add(job(A)), store.add(job())]
    assert store.claim("worker", NOW, LEASE_S, loaded=[A], matches=needs(B)) is None
    assert [store.get(each.id) for each in added] == added


def test_the_limit_holds_for_wanted_jobs(store):
    first = store.add(job(A))
    for _ in range(MAX_PASSED_OVER):
        wanted = store.add(job(B))
        claimed = store.claim("worker", NOW, LEASE_S, matches=needs(B))
        assert claimed is not None
        assert claimed.id == wanted.id
    store.add(job(B))
    waiting = store.get(first.id)
    assert store.claim("worker", NOW, LEASE_S, matches=needs(B)) is None
    assert store.get(first.id) == waiting
    # The job at its limit can be claimed itself.
    claimed = store.claim("worker", NOW, LEASE_S, matches=needs(A))
    assert claimed is not None
    assert claimed.id == first.id
