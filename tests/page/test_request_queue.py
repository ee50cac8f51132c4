"""Following and canceling the requests of one visitor, on a store in memory."""

from __future__ import annotations

import asyncio
import html

import pytest
from tests.server.http_support import ManualWorker, context_in, now

from fidelora.jobs.job import Status, new_job
from fidelora.recipe import Recipe
from fidelora.server import job_watcher
from fidelora.server.access import UNRESTRICTED
from fidelora.server.page.html import button_number
from fidelora.server.page.request_queue import RequestQueue, Session
from fidelora.server.page.visitor import acting_for


@pytest.fixture(autouse=True)
def without_keys():
    """Run the handlers for the visitor of a server without keys."""
    with acting_for(UNRESTRICTED):
        yield


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.002)
    return context_in(tmp_path)


@pytest.fixture
def queue(context):
    return RequestQueue(context.store, context.watcher)


def session_with(context, *prompts):
    """Queue a job for each prompt; returns a session that follows them."""
    jobs = [context.store.add(new_job((Recipe(prompt=one),), now())) for one in prompts]
    return Session(pending=[job.id for job in jobs])


async def until_end(queue, session, act):
    updates = []
    async for update in queue.follow(session):
        updates.append(update)
        act(len(updates))
    return updates


def test_each_change_yields_the_state_of_all_requests(queue, context):
    session, worker = session_with(context, "first", "<second>"), ManualWorker(context)
    jobs = {}

    def act(count):
        if count == 1:
            jobs["first"] = worker.claim()
        elif count == 2:
            worker.step(jobs["first"], 3, preview="abc")
        elif count == 3:
            worker.fail(jobs["first"])
            worker.succeed(worker.claim())

    updates = asyncio.run(until_end(queue, session, act))
    texts = [html.unescape(update.progress) for update in updates]
    waiting = [html.unescape(update.waiting) for update in updates]
    assert "Next in the queue. <span>“first” · seed 42 · no LoRA</span> <button" in waiting[0]
    assert "Queued, 1 request before it. <span>“<second>”" in waiting[0]
    assert "“first”" not in waiting[1]
    assert waiting[1] == waiting[2]
    assert waiting[-1] == ""
    assert "“first”" in texts[1]
    assert "Starting." in texts[1]
    assert "Step 3 of 25" in texts[2]
    assert "base64,abc" in updates[2].previews
    assert "The model produced NaN." in texts[-1]
    assert "Done in" in texts[-1]
    assert updates[-1].previews == ""
    # The last three changes are made at once; the poll may see only some of them first.
    assert [len(update.succeeded) for update in updates[:3]] == [0, 0, 0]
    assert sum(len(update.succeeded) for update in updates) == 1
    assert session.pending == []
    assert not session.followed


def test_only_one_handler_follows_a_session(queue, context):
    session = session_with(context, "first")

    async def run():
        following = queue.follow(session)
        await anext(following)
        assert [update async for update in queue.follow(session)] == []
        await following.aclose()
        assert not session.followed
        second = queue.follow(session)
        await anext(second)
        await second.aclose()

    asyncio.run(run())


def test_a_request_sent_in_the_meantime_is_followed_too(queue, context):
    session = session_with(context, "first")

    def act(count):
        if count == 1:
            session.pending += session_with(context, "second").pending
        if session.pending:
            context.store.cancel(session.pending[0], now())

    updates = asyncio.run(until_end(queue, session, act))
    assert updates[-1].progress.count("Canceled") == 2


def test_removed_requests_are_forgotten(queue, context):
    session = Session(pending=["gone", *session_with(context, "first").pending])
    context.store.cancel(session.pending[1], now())
    asyncio.run(until_end(queue, session, lambda count: None))
    assert session.pending == []


def test_a_late_cancel_does_not_hit_the_next_request(queue, context):
    """The running request ends between the update that shows it and the click on Cancel."""
    session, worker = session_with(context, "first", "second"), ManualWorker(context)
    jobs = {}

    def act(count):
        if count == 1:
            jobs["first"] = worker.claim()
        elif count == 2:
            worker.succeed(jobs["first"])
            jobs["second"] = worker.claim()
            queue.cancel(session)
            assert not context.store.get(jobs["second"].id).cancel_requested
            worker.succeed(jobs["second"])

    asyncio.run(until_end(queue, session, act))
    assert context.store.get(jobs["second"].id).status is Status.SUCCEEDED


def test_cancel_ends_the_running_request_and_cancel_all_every_one(queue, context):
    session, worker = session_with(context, "first", "second", "third"), ManualWorker(context)

    def states():
        return [context.store.get(one).status for one in session.pending]

    queue.cancel(session)
    assert states() == [Status.CANCELED, Status.IN_QUEUE, Status.IN_QUEUE]
    running = worker.claim()
    queue.cancel(session)
    assert context.store.get(running.id).cancel_requested
    assert states() == [Status.CANCELED, Status.IN_PROGRESS, Status.IN_QUEUE]
    queue.cancel_one(session, None)
    other = session_with(context, "other")
    queue.cancel_one(session, button_number(other.pending[0]))
    assert context.store.get(other.pending[0]).status is Status.IN_QUEUE
    queue.cancel_one(other, button_number(other.pending[0]))
    assert context.store.get(other.pending[0]).status is Status.CANCELED
    session.pending.append("gone")
    queue.cancel_all(session)
    session.pending.remove("gone")
    assert states() == [Status.CANCELED, Status.IN_PROGRESS, Status.CANCELED]
