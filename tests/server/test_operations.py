"""Metrics, the list of workers, and the removal of old requests."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.http_support import MINIMAL, ManualWorker, client_of, context_in, now, submit

from fidelora.jobs.store import WorkerState
from fidelora.server.app import clean


def test_metrics_count_requests_attempts_and_responses(client, context):
    from fidelora.workers.attempt import AttemptReport

    submit(client)
    client.get("/v1/requests/unknown/status")
    timings = {"load": 0.2, "adapters": 0.1, "denoise": 5.0, "decode": 0.1}
    context.metrics.attempt_ended(
        AttemptReport("a", "succeeded", "", 3.0, 2, 50, timings, 1, 2, claim_s=0.004)
    )
    context.metrics.attempt_ended(AttemptReport("b", "failed", "TIMEOUT", None, 0, 0, {}, 1, 0))
    lines = dict(
        line.rsplit(" ", 1)
        for line in client.get("/metrics").text.splitlines()
        if not line.startswith("#")
    )
    assert float(lines['fidelora_requests{status="in_queue"}']) == 1
    assert float(lines["fidelora_images_total"]) == 2
    assert float(lines['fidelora_failures_total{code="TIMEOUT"}']) == 1
    assert float(lines["fidelora_queue_wait_seconds_sum"]) == 3
    assert float(lines['fidelora_claim_seconds_bucket{le="0.005"}']) == 1
    assert float(lines["fidelora_claim_seconds_count"]) == 1
    assert 0 < float(lines["fidelora_queue_age_seconds"]) < 3600
    free, size = (
        float(lines[f'fidelora_disk_{one}_bytes{{folder="data"}}']) for one in ("free", "size")
    )
    assert 0 < free <= size
    assert float(lines["fidelora_step_seconds_sum"]) == pytest.approx(0.1)
    assert float(lines["fidelora_adapter_switch_seconds_sum"]) == pytest.approx(0.1)
    assert (
        float(lines['fidelora_adapter_cache_total{result="hit"}']),
        float(lines['fidelora_adapter_cache_total{result="miss"}']),
    ) == (2, 2)
    route = 'method="GET",route="/v1/requests/{request_id}/status",status="404"'
    assert float(lines[f"fidelora_http_requests_total{{{route}}}"]) == 1


def test_a_lora_that_a_request_names_many_times_is_read_once(client, context, monkeypatch):
    resolve, resolved = context.resolver.resolve, []

    async def count(path: str, **given: Any) -> Any:
        resolved.append(path)
        return await resolve(path, **given)

    monkeypatch.setattr(context.resolver, "resolve", count)
    loras = [{"path": "sks.safetensors", "network_multiplier": each / 100} for each in range(100)]
    request_id = submit(client, MINIMAL | {"loras": loras})
    (recipe,) = context.store.get(request_id).recipes
    assert [ref.multiplier for ref in recipe.adapters] == [each / 100 for each in range(100)]
    assert resolved == ["sks.safetensors"]


def test_workers_are_listed_with_their_requests(client, context):
    assert client.get("/v1/workers").json() == {"workers": []}
    worker = ManualWorker(context)
    request_id = submit(client)
    job = worker.claim()
    busy = WorkerState(
        job.worker or "", "cuda:0", "1.2", loaded=frozenset("ba"), models=("sdxl", "sd15")
    )
    context.store.report_worker(busy)
    context.store.report_worker(WorkerState("z", "cpu", "1.2", idle_since=now()))
    first, second = client.get("/v1/workers").json()["workers"]
    assert (first["device"], first["request_id"], first["idle_s"]) == ("cuda:0", request_id, None)
    assert (first["adapters"], first["merged_adapters"]) == (["a", "b"], [])
    assert first["models"] == ["sdxl", "sd15"]
    assert (second["name"], second["request_id"]) == ("z", None)
    assert second["idle_s"] < 60


def test_old_requests_are_removed_with_their_images(tmp_path):
    from datetime import timedelta
    from pathlib import Path

    context = context_in(tmp_path, keep_days=1, keep_requests=2)
    worker = ManualWorker(context)
    with client_of(context) as client:
        ids = [submit(client) for _ in range(5)]
        waiting = ids[-1]
        done = [worker.succeed(worker.claim()) for _ in range(4)]
        clean(context)
        left = {entry["request_id"] for entry in client.get("/v1/requests").json()["requests"]}
        assert left == {done[2].id, done[3].id, waiting}
        assert [Path(job.outputs[0].file_path).exists() for job in done] == [
            False,
            False,
            True,
            True,
        ]
        context.store.remove_finished(before=now() + timedelta(days=1), keep=10)
        assert [entry["request_id"] for entry in client.get("/v1/requests").json()["requests"]] == [
            waiting
        ]
