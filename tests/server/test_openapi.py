"""The OpenAPI document is complete: a fuzzer finds no fault and no undocumented response."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from functools import partial
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.server.http_support import (
    MINIMAL,
    ManualWorker,
    client_of,
    context_in,
    jobs_succeeding,
    png_with_parameters,
    within_deadline,
)
from tests.support import GOLDEN_JOBS, LOKR

from fidelora.server import job_watcher
from fidelora.server.app import make_app
from fidelora.server.verifier import Outcome

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
HOST = {"Host": "127.0.0.1"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The schema of a server, its finished requests (succeeded, failed, canceled), its context."""
    context = context_in(tmp_path, queue_size=5)
    worker = ManualWorker(context)
    client = client_of(context)  # not entered, because its exit would stop the server
    ids = [client.post("/v1/inference", json=MINIMAL).json()["request_id"] for _ in range(3)]
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    client.delete(f"/v1/requests/{ids[2]}")
    vars(context)["verifier"] = ExplainedAtOnce()
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.002)
    with jobs_succeeding(worker, png_with_parameters()):  # some responses wait for images
        app = called_from_this_machine(make_app(context))
        yield schemathesis.openapi.from_asgi("/openapi.json", app), ids, context


class ExplainedAtOnce:
    """The verifier of a server, with the output of an explanation."""

    busy = False

    async def explain(self, *_: Any) -> Any:
        found = {
            "picture": "picture", "program": "ComfyUI", "version": "", "has_settings": True,
            "sample": {"step": 6, "index": 0, "chosen": "it looks similar", "base_model": "a"},
            "same": False, "explained": True, "distance_before": 9.0, "distance_after": 0.0,
            "differences": [
                {"cause": "steps", "theirs": "9", "ours": "8", "effect": 9.0, "in_file": True,
                 "always": False, "advice": ""},
            ],
            "nearest": {"steps": 9}, "nearest_there": None, "notes": [], "images": 5,
        }  # fmt: skip
        yield "progress: searching 1 of 40"
        for line in json.dumps({"job": "a", "pictures": [found]}, indent=2).splitlines():
            yield line
        yield Outcome(1, None)


def a_zipped_run() -> bytes:
    folder, packed = GOLDEN_JOBS / "lokr_full", io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return packed.getvalue()


def called_from_this_machine(app: Any) -> Any:
    """Return an application whose calls come from a loopback address; schemathesis sets none."""

    async def called(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["client"] = ("127.0.0.1", 50000)
        await app(scope, receive, send)

    return called


def test_generated_calls_get_documented_responses(server):
    schema, _, context = server
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 35
    for operation in operations:

        @settings(
            max_examples=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            within_deadline(lambda: case.call_and_validate(checks=CHECKS, headers=HOST), context)

        check()


def test_valid_calls_get_documented_success_responses(server):
    schema, ids, context = server
    called = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        for request_id in ids if "{request_id}" in operation.path else [""]:
            path = {"request_id": request_id, "index": 0, "name": "a.safetensors", "model": "sd15"}
            body, media_type = {}, None
            if operation.label == "POST /v1/inference":
                body, media_type = {"body": MINIMAL}, "application/json"
            if operation.label == "POST /v1/images/generations":
                body, media_type = (
                    {"body": {"prompt": "a ball", "loras": MINIMAL["loras"]}},
                    "application/json",
                )
            if operation.label == "POST /sdapi/v1/txt2img":
                body, media_type = {"body": {"prompt": "a ball <lora:sks:0.8>"}}, "application/json"
            if operation.label == "POST /v1/replay":
                body, media_type = {"body": {"image": png_with_parameters()}}, "multipart/form-data"
            if operation.label == "POST /v1/explain":
                files = {"picture": png_with_parameters(), "run": a_zipped_run()}
                body, media_type = {"body": files}, "multipart/form-data"
            if operation.label == "POST /sdapi/v1/png-info":
                encoded = base64.b64encode(png_with_parameters()).decode()
                body, media_type = {"body": {"image": encoded}}, "application/json"
            if operation.label == "POST /sdapi/v1/options":
                body, media_type = {"body": {"sd_model_checkpoint": "sd15"}}, "application/json"
            if operation.label == "POST /v1/loras":
                body, media_type = (
                    {"body": {"file": LOKR.read_bytes(), "name": "a.safetensors"}},
                    "multipart/form-data",
                )
            parameters = {
                name: value for name, value in path.items() if f"{{{name}}}" in operation.path
            }
            case = operation.Case(path_parameters=parameters, media_type=media_type, **body)
            answer = within_deadline(
                partial(case.call_and_validate, checks=CHECKS, headers=HOST), context
            )
            called.add((operation.label, answer.status_code))
    assert {label for label, status in called if status < 300} == {label for label, _ in called}, (
        "an operation never succeeded"
    )
