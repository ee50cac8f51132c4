"""Any sequence of calls gives the same results in the database as in memory."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.jobs.store_support import LEASE_S, NOW, OUTPUT, A, B, job, needs

from fidelora.errors import JobError
from fidelora.jobs.job import MAX_ATTEMPTS, Failure, Job, JobProgress, Status
from fidelora.jobs.memory import MemoryStore
from fidelora.jobs.sql import SqlStore
from fidelora.jobs.store import Submission, WorkerState


class SameResultsInBothStores(RuleBasedStateMachine):
    """Any sequence of calls has the same results in the database as in the memory store."""

    @initialize()
    def begin(self) -> None:
        self.memory, self.database = MemoryStore(), SqlStore("sqlite:///:memory:")
        self.ids: list[str] = []
        self.clock = NOW

    def both(self, call):
        answers = []
        for store in (self.memory, self.database):
            try:
                answers.append(call(store))
            except JobError as error:
                answers.append(type(error))
        assert answers[0] == answers[1]
        return answers[0]

    @rule(
        adapters=st.sets(st.sampled_from([A, B])),
        key=st.sampled_from([None, "k1", "k2"]),
        body=st.sampled_from("12"),
        owner=st.sampled_from(["", "a"]),
    )
    def add(self, adapters, key, body, owner):
        new = job(*sorted(adapters), owner=owner)
        submission = Submission(key, body * 64) if key else None
        added = self.both(
            lambda store: store.add(new, submission=submission, capacity=6, now=self.clock)
        )
        if isinstance(added, Job) and added.id not in self.ids:
            self.ids.append(added.id)

    @rule(
        loaded=st.sets(st.sampled_from([A, B])),
        merged=st.sets(st.sampled_from([A, B])),
        matches=st.sampled_from([None, needs(A), needs(B)]),
        hold_s=st.sampled_from([0.0, 2.0]),
    )
    def claim(self, loaded, merged, matches, hold_s):
        self.both(
            lambda store: store.claim(
                "worker", self.clock, LEASE_S, loaded, merged=merged, matches=matches, hold_s=hold_s
            )
        )

    @rule(name=st.sampled_from(["worker", "other"]), loaded=st.sets(st.sampled_from([A, B])))
    def report_worker(self, name, loaded):
        state = WorkerState(name, loaded=frozenset(loaded))
        self.both(lambda store: store.report_worker(state, self.clock))
        self.both(lambda store: store.workers(self.clock))

    @rule(
        which=st.integers(0, 30),
        epoch=st.integers(0, 4),
        what=st.sampled_from(["renew", "succeed", "fail", "stop", "release", "abandon", "cancel"]),
    )
    def report(self, which, epoch, what):
        if not self.ids:
            return
        job_id = self.ids[which % len(self.ids)]
        calls = {
            "renew": lambda store: store.renew(
                job_id, epoch, JobProgress(0, 1, epoch, 5), self.clock, LEASE_S
            ),
            "succeed": lambda store: store.succeed(
                job_id, epoch, [OUTPUT], {"total": 1.0}, self.clock
            ),
            "fail": lambda store: store.fail(job_id, epoch, Failure("X", "x"), self.clock),
            "stop": lambda store: store.stop(job_id, epoch, self.clock),
            "release": lambda store: store.release(job_id, epoch, self.clock),
            "abandon": lambda store: store.abandon(job_id, epoch, "it died", self.clock),
            "cancel": lambda store: store.cancel(job_id, self.clock),
        }
        self.both(calls[what])

    @rule(seconds=st.sampled_from([1, 20, 40]))
    def time_passes(self, seconds):
        self.clock += timedelta(seconds=seconds)
        self.both(lambda store: sorted(each.id for each in store.abandon_expired(self.clock)))

    @rule(keep=st.integers(0, 3))
    def remove(self, keep):
        self.both(lambda store: {each.id for each in store.remove_finished(before=NOW, keep=keep)})

    @invariant()
    def both_list_the_same_jobs(self):
        if not hasattr(self, "ids"):
            return
        listed = self.both(lambda store: store.list(limit=1000).jobs)
        for each in listed:
            assert (
                (each.lease_expires_at is not None)
                == (each.status is Status.IN_PROGRESS)
                == bool(each.worker)
            )
            assert (each.finished_at is not None) == each.status.final
            assert 0 <= each.attempts <= MAX_ATTEMPTS
            self.both(lambda store, job_id=each.id: store.queue_position(job_id))
        known = {each.id: 0 for each in listed}
        positions = self.both(lambda store: store.read_changes(known)).positions
        assert sorted(positions.values()) == list(range(len(positions)))
        first = self.both(lambda store: store.peek())
        assert first is None if not positions else positions[first.id] == 0

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()


TestSameResultsInBothStores = SameResultsInBothStores.TestCase
TestSameResultsInBothStores.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
