"""Submissions, lists, capacity and removal of jobs, for every store."""

from __future__ import annotations

import threading

import pytest
from tests.jobs.store_support import LEASE_S, NOW, OUTPUT, A, B, job, later, running

from fidelora import Recipe
from fidelora.errors import (
    CursorError,
    IdempotencyConflictError,
    JobError,
    LeaseLostError,
    QueueFullError,
)
from fidelora.jobs.job import Status, new_job
from fidelora.jobs.store import JobChanges, Submission


def test_peek_does_not_claim(store):
    assert store.peek() is None
    added = [store.add(job(A)), store.add(job(B))]
    for expected in added:
        assert store.peek() == expected == store.get(expected.id)
        store.claim("worker", NOW, LEASE_S)
    assert store.peek() is None


def test_the_same_submission_is_the_same_job(store):
    submission = Submission("key", "1" * 64)
    first = store.add(job(), submission=submission)
    assert store.add(job(), submission=submission) == first
    with pytest.raises(IdempotencyConflictError):
        store.add(job(), submission=Submission("key", "2" * 64))
    assert store.add(job(), submission=Submission("other", "1" * 64)).id != first.id
    assert len(store.list().jobs) == 2


def test_the_same_submission_is_found_in_a_full_queue_and_after_its_end(store):
    submission = Submission("key", "1" * 64)
    first = store.add(job(), submission=submission, capacity=1)
    assert store.add(job(), submission=submission, capacity=1) == first
    ended = store.cancel(first.id, NOW)
    assert store.add(job(), submission=submission, capacity=1) == ended


def test_submitted_finds_the_job_of_a_submission(store):
    submission = Submission("key", "1" * 64)
    assert store.submitted(submission) is None
    added = store.add(job(), submission=submission)
    assert store.submitted(submission) == added
    with pytest.raises(IdempotencyConflictError):
        store.submitted(Submission("key", "2" * 64))


def test_jobs_are_counted_by_status(store):
    for _ in range(3):
        store.add(job())
    store.claim("worker", NOW, LEASE_S)
    assert [
        store.count(status) for status in (Status.IN_QUEUE, Status.IN_PROGRESS, Status.FAILED)
    ] == [2, 1, 0]


def test_jobs_need_their_adapters_until_they_end(store):
    first, second = running(store, A), running(store, A, B)
    assert (store.needs_adapter(A), store.needs_adapter(B), store.needs_adapter("c" * 64)) == (
        True,
        True,
        False,
    )
    store.stop(second.id, second.epoch, NOW)
    assert (store.needs_adapter(A), store.needs_adapter(B)) == (True, False)
    store.succeed(first.id, first.epoch, [OUTPUT], {}, NOW)
    assert not store.needs_adapter(A)


def test_a_full_queue_refuses_jobs(store):
    for _ in range(3):
        store.add(job(), capacity=3)
    with pytest.raises(QueueFullError):
        store.add(job(), capacity=3)
    store.claim("worker", NOW, LEASE_S)
    store.add(job(), capacity=3)  # a running job is not in the queue


def test_lists_are_newest_first_in_pages(store):
    added = [store.add(job(prompt=str(number))) for number in range(5)]
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = store.list(limit=2, cursor=cursor)
        assert len(page.jobs) == size
        seen += [each.id for each in page.jobs]
        cursor = page.next_cursor
        store.add(job(prompt="new ones do not shift the pages"))
    assert cursor is None
    assert seen == [each.id for each in reversed(added)]
    with pytest.raises(JobError, match="begin again without it"):
        store.list(cursor="nonsense")


def test_lists_can_be_filtered_by_status(store):
    claimed = running(store)
    waiting = store.add(job())
    assert [each.id for each in store.list(status=Status.IN_PROGRESS).jobs] == [claimed.id]
    assert [each.id for each in store.list(status=Status.IN_QUEUE).jobs] == [waiting.id]
    assert store.list(status=Status.FAILED).jobs == ()


def test_several_jobs_are_read_at_once(store):
    jobs = [store.add(job(prompt=str(number))) for number in range(4)]
    ids = [one.id for one in jobs]
    claimed = store.claim("worker", NOW, LEASE_S)
    read = store.read_changes({ids[0]: 1, ids[1]: 0, ids[2]: 1, "0" * 32: 7})
    assert read.changed == {ids[0]: claimed, ids[1]: jobs[1]}  # the third is known
    assert read.positions == {ids[1]: 0, ids[2]: 1}
    assert read.missing == {"0" * 32}
    assert store.read_changes({}) == JobChanges({}, {}, frozenset())


def test_more_jobs_than_a_query_may_name_are_read(store):
    jobs = {one.id: one for one in (store.add(job()) for _ in range(3))}
    known = dict.fromkeys(jobs, 0) | {f"{number:032}": 0 for number in range(40_000)}
    read = store.read_changes(known)
    assert read.changed == jobs
    assert len(read.missing) == 40_000


def test_a_list_of_one_owner_has_no_other_jobs(store):
    owners = ["a", "b", "", "a"]
    jobs = [store.add(new_job((Recipe(prompt="a"),), NOW, owner=owner)) for owner in owners]
    assert [job.owner for job in jobs] == owners
    assert store.list(owner="a").jobs == (jobs[3], jobs[0])
    assert store.list(owner="").jobs == (jobs[2],)
    assert store.list(owner="c").jobs == ()
    assert len(store.list(owner=None).jobs) == 4
    first = store.list(owner="a", limit=1)
    assert store.list(owner="a", limit=1, cursor=first.next_cursor).jobs == (jobs[0],)
    with pytest.raises(CursorError):
        store.list(owner="a", cursor=jobs[1].id)  # an existing job of another owner
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed.owner == "a"
    assert store.list(owner="a", status=Status.IN_PROGRESS).jobs == (claimed,)
    assert store.list(owner="b", status=Status.IN_PROGRESS).jobs == ()


def test_old_jobs_are_removed_by_age_and_by_number(store):
    ended = []
    for number in range(5):
        added = store.add(job(), submission=Submission(f"key{number}", "1" * 64))
        ended.append(store.cancel(added.id, later(number)))
    waiting = store.add(job())
    assert [each.id for each in store.remove_finished(before=later(2), keep=100)] == [
        ended[1].id,
        ended[0].id,
    ]
    assert [each.id for each in store.remove_finished(before=NOW, keep=1)] == [
        ended[3].id,
        ended[2].id,
    ]
    assert {each.id for each in store.list().jobs} == {ended[4].id, waiting.id}
    # The keys of removed jobs can be used again.
    assert store.add(job(), submission=Submission("key0", "2" * 64)).status is Status.IN_QUEUE


def test_a_change_that_raises_keeps_the_job(store):
    claimed = running(store)
    with pytest.raises(LeaseLostError):
        store.succeed(claimed.id, 7, [OUTPUT], {}, NOW)
    assert store.get(claimed.id) == claimed


def test_every_change_is_a_new_version(store):
    added = store.add(job())
    versions = [added.version]
    claimed = store.claim("worker", NOW, LEASE_S)
    assert claimed is not None
    versions += [
        claimed.version,
        store.renew(added.id, 1, None, NOW, LEASE_S).version,
        store.cancel(added.id, NOW).version,
    ]
    assert versions == [1, 2, 3, 4]


def test_concurrent_claims_return_each_job_once(store):
    added = {store.add(job()).id for _ in range(40)}
    got: list[str] = []

    def work() -> None:
        while (claimed := store.claim("worker", NOW, LEASE_S)) is not None:
            got.append(claimed.id)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(got) == 40
    assert set(got) == added
