"""`/v1/requests`: lists, cancellation, events and images, and keys for repeated calls."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.server.http_support import (
    MINIMAL,
    client_of,
    context_in,
    error,
    submit,
    with_prompt,
)

from fidelora.jobs.job import Status
from fidelora.jobs.sql import SqlStore
from fidelora.server.app import context_with_store

SECRET = "hf_do_not_tell"


def test_requests_are_listed_newest_first_page_by_page(client, worker):
    ids = [submit(client) for _ in range(5)]
    worker.fail(worker.claim())
    first = client.get("/v1/requests", params={"limit": 2}).json()
    second = client.get("/v1/requests", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    third = client.get("/v1/requests", params={"limit": 2, "cursor": second["next_cursor"]}).json()
    assert [
        entry["request_id"] for page in (first, second, third) for entry in page["requests"]
    ] == ids[::-1]
    assert third["next_cursor"] is None
    failed = client.get("/v1/requests", params={"status": "failed"}).json()["requests"]
    assert [entry["request_id"] for entry in failed] == ids[:1]
    assert error(client.get("/v1/requests", params={"cursor": "unknown"})) == (
        400,
        "CURSOR_NOT_KNOWN",
    )
    assert client.get("/v1/requests", params={"limit": 0}).status_code == 422


def test_queued_and_running_requests_can_be_canceled(client, worker):
    queued, running, done = submit(client), submit(client), submit(client)
    assert client.delete(f"/v1/requests/{queued}").json()["status"] == "canceled"
    job = worker.claim()
    assert job.id == running
    assert client.delete(f"/v1/requests/{running}").json()["status"] == "in_progress"
    assert worker.step(job, 1).cancel_requested
    worker.succeed(worker.claim())
    assert client.delete(f"/v1/requests/{done}").json()["status"] == "succeeded"
    assert error(client.delete("/v1/requests/unknown")) == (404, "REQUEST_NOT_FOUND")


def test_an_idempotency_key_returns_the_same_request(client, context):
    key = {"Idempotency-Key": "mine"}
    random = with_prompt(seed=-1)
    first = submit(client, random, **key)
    assert submit(client, random, **key) == first
    # The token is not part of the compared request.
    assert submit(client, random | {"hf_token": SECRET}, **key) == first
    (context.settings.loras / "sks.safetensors").unlink()
    assert submit(client, random, **key) == first  # found before any LoRA is read
    assert error(client.post("/v1/inference", json=with_prompt(seed=1), headers=key)) == (
        409,
        "IDEMPOTENCY_KEY_REUSED",
    )
    assert (
        client.post(
            "/v1/inference", json=random, headers={"Idempotency-Key": "x" * 256}
        ).status_code
        == 422
    )
    assert context.store.count(Status.IN_QUEUE) == 1


def test_a_hundred_duplicates_at_once_make_one_request(tmp_path):
    seed = context_in(tmp_path)
    context = context_with_store(
        SqlStore(f"sqlite:///{tmp_path}/jobs.sqlite"), seed.settings, {}, seed.base_url
    )
    with client_of(context) as client, ThreadPoolExecutor(20) as threads:
        ids = set(threads.map(lambda _: submit(client, **{"Idempotency-Key": "mine"}), range(100)))
        assert len(ids) == 1
        assert context.store.count(Status.IN_QUEUE) == 1


def test_a_full_queue_sends_retry_after(tmp_path):
    with client_of(context_in(tmp_path, queue_size=2)) as client:
        submit(client)
        key = {"Idempotency-Key": "second"}
        second = submit(client, **key)
        answer = client.post("/v1/inference", json=MINIMAL)
        assert error(answer) == (429, "QUEUE_FULL")
        assert int(answer.headers["retry-after"]) > 0
        assert submit(client, **key) == second  # a queued request is still found


def events(lines: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return (id, data) of each event of a finished stream."""
    fields = [
        dict(line.split(": ", 1) for line in block.split("\n") if line[:1] != ":")
        for block in lines.strip().split("\n\n")
    ]
    return [(int(event["id"]), json.loads(event["data"])) for event in fields if "id" in event]


def test_events_end_with_the_request(client, worker):
    request_id = submit(client)
    job = worker.claim()
    threading.Timer(0.3, lambda: worker.succeed(worker.step(job, 3))).start()
    answer = client.get(f"/v1/requests/{request_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert [data["status"] for _, data in seen] == ["in_progress", "succeeded"]
    assert [number for number, _ in seen] == sorted({number for number, _ in seen})
    assert seen[-1][1]["progress"]["step"] == 3

    again = client.get(
        f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": str(seen[0][0])}
    )
    assert events(again.text) == seen[-1:]
    assert error(client.get("/v1/requests/unknown/events")) == (404, "REQUEST_NOT_FOUND")


def test_a_reconnecting_client_gets_only_new_events(client, worker, context):
    request_id = submit(client)
    job = worker.step(worker.claim(), 3)
    threading.Timer(0.3, lambda: worker.succeed(job)).start()
    answer = client.get(
        f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": str(job.version)}
    )
    assert [data["status"] for _, data in events(answer.text)] == ["succeeded"]


def test_events_carry_previews_on_request(client, worker):
    request_id = submit(client)
    job = worker.step(worker.claim(), 3, preview="cGljdHVyZQ==")
    threading.Timer(0.3, lambda: worker.succeed(job)).start()
    seen = events(client.get(f"/v1/requests/{request_id}/events", params={"previews": True}).text)
    assert [data["preview"] for _, data in seen] == ["cGljdHVyZQ==", None]
    assert client.get(f"/v1/requests/{request_id}/status").json()["preview"] is None
    assert "preview" not in client.get(f"/v1/requests/{request_id}/status").json()["progress"]


def test_events_end_with_the_server(client, context):
    request_id = submit(client)
    threading.Timer(0.3, context.stopping.set).start()
    assert [
        data["status"] for _, data in events(client.get(f"/v1/requests/{request_id}/events").text)
    ] == ["in_queue"]


def test_missing_image_error_names_the_status(client, worker):
    def message(request_id: str) -> str:
        answer = client.get(f"/v1/requests/{request_id}/images/0")
        assert error(answer) == (404, "IMAGE_NOT_FOUND")
        return str(answer.json()["detail"]["error"]["message"])

    request_id = submit(client)
    assert "in the queue" in message(request_id)
    job = worker.claim()
    assert "in progress" in message(request_id)
    worker.fail(job)
    assert "failed" in message(request_id)
    canceled = submit(client)
    client.delete(f"/v1/requests/{canceled}")
    assert "canceled" in message(canceled)


def test_missing_images_are_404_or_410(client, worker):
    request_id = submit(client)
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (404, "IMAGE_NOT_FOUND")
    done = worker.succeed(worker.claim())
    assert error(client.get(f"/v1/requests/{request_id}/images/1")) == (404, "IMAGE_NOT_FOUND")
    assert client.get(f"/v1/requests/{request_id}/images/-1").status_code == 422
    from pathlib import Path

    Path(done.outputs[0].file_path).write_bytes(b"another")
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (410, "IMAGE_GONE")
    Path(done.outputs[0].file_path).unlink()
    assert error(client.get(f"/v1/requests/{request_id}/images/0")) == (410, "IMAGE_GONE")
