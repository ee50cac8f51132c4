"""One poll of the store for all streams: its reads, its end, and the number of streams."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from tests.server.http_support import (
    MINIMAL,
    ManualWorker,
    client_of,
    in_thread,
    listening,
    now,
)
from tests.server.serve_support import until

from fidelora.errors import JobNotFoundError, JobStoreError, RecipeError, StreamsFullError
from fidelora.jobs.job import Status, new_job
from fidelora.recipe import Recipe
from fidelora.server import job_watcher

STREAMS = 40


@pytest.fixture(autouse=True)
def frequent_polls(monkeypatch):
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.002)


class Reads:
    """Counts the calls of a store's methods that read jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
        self.counts: dict[str, int] = {}
        self.known: list[dict[str, int]] = []
        for name in ("get", "queue_position", "read_changes"):
            monkeypatch.setattr(store, name, self._counted(name, getattr(store, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            if name == "read_changes":
                self.known.append(dict(values[0]))
            return call(*values)

        return counted


def queued(context: Any) -> Any:
    return context.store.add(new_job((Recipe(prompt="a"),), now()))


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_all_streams_share_one_read(context, monkeypatch):
    """The number of reads after the start does not depend on the number of streams."""
    job, worker = queued(context), ManualWorker(context)
    reads = Reads(monkeypatch, context.store)
    with client_of(context) as client:
        url = f"/v1/requests/{job.id}/events"
        streams = [in_thread(lambda: client.get(url)) for _ in range(STREAMS)]
        until(lambda: context.watcher._streams == STREAMS, 20)
        until(lambda: reads.counts.get("queue_position") == STREAMS, 20)
        start = dict(reads.counts)
        polls = len(reads.known)
        until(lambda: len(reads.known) > polls + 20, 20)
        assert reads.counts["get"] == start["get"] == STREAMS
        assert reads.counts["queue_position"] == start["queue_position"]
        assert reads.known[-1] == {job.id: 1}
        worker.succeed(worker.claim())
        answers = [stream.result(60).text for stream in streams]
    assert {events_of(text)[-1]["status"] for text in answers} == {"succeeded"}


def test_a_stream_has_every_state_that_a_poll_sees(context):
    first, second = queued(context), queued(context)
    worker = ManualWorker(context)
    with (
        listening(context) as url,
        httpx2.Client(timeout=60) as client,
        client.stream("GET", f"{url}/v1/requests/{second.id}/events") as answer,
    ):
        lines = answer.iter_lines()

        def event() -> dict[str, Any]:
            return next(events_of(line)[0] for line in lines if line.startswith("data: "))

        assert event()["queue_position"] == 1
        claimed = worker.claim()
        assert claimed.id == first.id
        moved = event()
        assert (moved["status"], moved["queue_position"]) == ("in_queue", 0)
        claimed = worker.claim()
        assert event()["status"] == "in_progress"
        worker.step(claimed, 3)
        assert event()["progress"]["step"] == 3
        worker.succeed(claimed)
        assert event()["status"] == "succeeded"
        assert list(events_of("\n".join(lines))) == []
    assert context.store.get(second.id).status is Status.SUCCEEDED


def test_streams_that_vanish_leave_nothing(context):
    job = queued(context)
    with listening(context) as url:
        with httpx2.Client(timeout=60, limits=httpx2.Limits(max_connections=None)) as client:
            open_streams = [
                client.send(
                    client.build_request("GET", f"{url}/v1/requests/{job.id}/events"), stream=True
                )
                for _ in range(STREAMS)
            ]
            (poll,) = context.watcher._polls.values()
            assert context.watcher._streams == STREAMS
            # The headers of a response are sent before its stream begins.
            until(lambda: len(poll._watches.get(job.id, ())) == STREAMS, 20)
            task = poll._task
            for stream in open_streams:
                stream.close()
        until(lambda: context.watcher._streams == 0, 20)
        until(lambda: poll._watches == {} == poll._states, 20)
        assert poll._task is None
        assert until(task.done, 20)


def test_the_number_of_streams_is_bounded(context, monkeypatch):
    monkeypatch.setattr(job_watcher, "MAX_STREAMS", 2)
    job = queued(context)
    with client_of(context) as client, context.watcher.stream():
        url = f"/v1/requests/{job.id}/events"
        stream = in_thread(lambda: client.get(url))
        until(lambda: context.watcher._streams == 2, 20)
        refused = client.get(url)
        assert refused.status_code == 503
        assert refused.json()["detail"]["error"]["code"] == "TOO_MANY_STREAMS"
        assert refused.headers["Retry-After"]
        assert client.get(f"/v1/requests/{job.id}/status").status_code == 200
        client.delete(f"/v1/requests/{job.id}")
        assert '"canceled"' in stream.result(60).text
        until(lambda: context.watcher._streams == 1, 20)
        assert client.get(url).status_code == 200
    with pytest.raises(StreamsFullError), context.watcher.stream(), context.watcher.stream():
        context.watcher.stream().__enter__()


def test_a_waiting_call_ends_with_its_client(context):
    """Calls that wait for their images use the same poll."""
    body = {"prompt": "a ball", "model": "sd15"}
    with listening(context) as url:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{url}/v1/images/generations", json=body, timeout=1)
        (job,) = context.store.list().jobs
        until(lambda: context.store.get(job.id).status is Status.CANCELED, 20)
        (poll,) = context.watcher._polls.values()
        until(lambda: poll._watches == {}, 20)


def test_a_removed_job_ends_its_watch(context):
    async def run() -> None:
        job = queued(context)
        context.store.cancel(job.id, now())
        with context.watcher.watch() as watch:
            watch.add(job)
            await watch.changed(60)
            assert watch.state(job.id).job.status is Status.CANCELED
            context.store.remove_finished(before=now() + timedelta(days=1), keep=0)
            await watch.changed(60)
            with pytest.raises(JobNotFoundError):
                watch.state(job.id)

    asyncio.run(run())


@pytest.mark.parametrize("error", [JobStoreError("locked"), RecipeError("of a newer version")])
def test_every_watch_gets_the_error_of_the_store(context, monkeypatch, error):
    read = context.store.read_changes

    async def run() -> None:
        job = queued(context)
        with context.watcher.watch() as one, context.watcher.watch() as other:
            one.add(job)
            other.add(job)
            monkeypatch.setattr(context.store, "read_changes", broken)
            for watch in (one, other):
                with pytest.raises(JobStoreError):
                    await watch.changed(60)
            monkeypatch.setattr(context.store, "read_changes", read)
            context.store.cancel(job.id, now())
            while not one.state(job.id).job.status.final:
                try:
                    await one.changed(60)
                except JobStoreError:  # of a poll before
                    continue

    def broken(known: object) -> None:
        raise error

    asyncio.run(run())


def test_a_change_of_the_server_wakes_every_watch(context):
    async def run() -> None:
        with context.watcher.watch() as watch:
            watch.add(queued(context), 0)
            await watch.changed(0)
            context.stopping.set()
            await watch.changed(None)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_polls_of_closed_event_loops_are_forgotten(context):
    async def run() -> None:
        with context.watcher.watch() as watch:
            watch.add(queued(context))

    for _ in range(3):
        asyncio.run(run())
    gc.collect()
    assert len(context.watcher._polls) <= 1


def test_the_first_event_is_sent_at_once_for_a_finished_job(context):
    with client_of(context) as client:
        request_id = client.post("/v1/inference", json=MINIMAL).json()["request_id"]
        ManualWorker(context).succeed(ManualWorker(context).claim())
        (event,) = events_of(client.get(f"/v1/requests/{request_id}/events").text)
    assert event["status"] == "succeeded"
