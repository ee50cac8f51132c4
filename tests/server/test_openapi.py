"""The OpenAPI document is complete and true: a fuzzer that believes it finds no fault and no answer that it does not tell of."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.server.http_support import MINIMAL, ByHand, an_image, at_work, client_of, context_in
from tests.support import LOKR

from fidelora.server import submit
from fidelora.server.app import make_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
HOST = {"Host": "127.0.0.1"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The description of a server, and its requests that ended: one succeeded, one failed, one canceled."""
    context = context_in(tmp_path, queue_size=5)
    worker = ByHand(context)
    client = client_of(context)  # not entered: its end would stop the server
    ids = [client.post("/v1/inference", json=MINIMAL).json()["request_id"] for _ in range(3)]
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    client.delete(f"/v1/requests/{ids[2]}")
    monkeypatch.setattr(submit, "LOOK_EVERY_S", 0.002)
    with at_work(worker, an_image()):  # some answers wait for images
        yield schemathesis.openapi.from_asgi("/openapi.json", make_app(context)), ids


def test_no_answer_to_nonsense_is_a_fault_or_a_surprise(server):
    schema, _ = server
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 27
    for operation in operations:

        @settings(
            max_examples=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers_as_described(case):
            case.call_and_validate(checks=CHECKS, headers=HOST)

        answers_as_described()


def test_every_answer_to_sense_is_as_described(server):
    schema, ids = server
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
                body, media_type = {"body": {"image": an_image()}}, "multipart/form-data"
            if operation.label == "POST /sdapi/v1/options":
                body, media_type = {"body": {"sd_model_checkpoint": "sd15"}}, "application/json"
            if operation.label == "POST /v1/loras":
                body, media_type = (
                    {"body": {"file": LOKR.read_bytes(), "name": "a.safetensors"}},
                    "multipart/form-data",
                )
            wanted = {
                name: value for name, value in path.items() if f"{{{name}}}" in operation.path
            }
            answer = operation.Case(
                path_parameters=wanted, media_type=media_type, **body
            ).call_and_validate(checks=CHECKS, headers=HOST)
            called.add((operation.label, answer.status_code))
    assert {label for label, status in called if status < 300} == {label for label, _ in called}, (
        "each was seen to succeed"
    )
