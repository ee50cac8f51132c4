"""Limits of bodies and texts, a stopping server, and errors of every route."""

from __future__ import annotations

from tests.server.http_support import MINIMAL, client_of, context_in, error, submit, upload
from tests.support import LORA

from fidelora.errors import JobStoreError


def test_bodies_have_a_limit_with_and_without_content_length(client):
    large = b" " * (2**20 + 1)
    headers = {"content-type": "application/json"}
    assert error(client.post("/v1/inference", content=large, headers=headers)) == (
        413,
        "BODY_TOO_LARGE",
    )
    announced = client.post(
        "/v1/inference", content=b"{}", headers=headers | {"content-length": str(2**30)}
    )
    assert error(announced) == (413, "BODY_TOO_LARGE")  # before any of it was received
    pieces = (large[:100_000] for _ in range(20))
    assert error(client.post("/v1/inference", content=pieces, headers=headers)) == (
        413,
        "BODY_TOO_LARGE",
    )


def test_the_trigger_word_is_not_inserted_into_too_long_prompts(client, context):
    """The text would have 1.6 GB."""
    long = MINIMAL | {"trigger_word": "x" * 40_000, "prompts": [{"prompt": "[trigger]" * 40_000}]}
    answer = client.post("/v1/inference", json=long)
    assert answer.status_code == 422
    assert "With the trigger word in 40,000 places" in answer.text
    assert context.store.list().jobs == ()


def test_errors_are_short(client):
    many = MINIMAL | {"prompts": [{"prompt": "a", "steps" + "x" * 60: 1, "width": 1}] * 64}
    for body in (many, MINIMAL | {"loras": [{"path": "x" * 5_000}] * 50}):
        answer = client.post("/v1/inference", json=body)
        assert answer.status_code == 422
        assert len(answer.content) < 20_000
        assert len(answer.json()["detail"]) <= 20
    answer = client.post("/v1/inference", json=MINIMAL | {"x" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 5_000


def test_loras_times_prompts_have_a_limit(client, context):
    lora = MINIMAL["loras"][0]
    body = MINIMAL | {"loras": [lora] * 33, "prompts": [{"prompt": "a ball"}] * 32}
    answer = client.post("/v1/inference", json=body)
    assert answer.status_code == 422
    assert "33 LoRAs and 32 prompts; LoRAs times prompts must be at most 1,024" in answer.text
    assert context.store.list().jobs == ()


def test_uploads_have_a_limit_of_their_own(tmp_path):
    with client_of(context_in(tmp_path, lora_max_mb=1)) as client:
        assert upload(client, LORA.read_bytes()).status_code == 201
        assert error(upload(client, bytes(3 * 2**20))) == (413, "BODY_TOO_LARGE")


def test_a_stopping_server_rejects_new_requests_only(client, context):
    request_id = submit(client, **{"Idempotency-Key": "mine"})
    context.stopping.set()
    answer = client.post("/v1/inference", json=MINIMAL)
    assert error(answer) == (503, "SERVER_STOPPING")
    assert int(answer.headers["retry-after"]) > 0
    assert submit(client, **{"Idempotency-Key": "mine"}) == request_id
    assert client.get(f"/v1/requests/{request_id}/status").json()["status"] == "in_queue"
    assert (client.get("/ready").status_code, client.get("/ready").json()["status"]) == (
        503,
        "stopping",
    )
    assert client.get("/health").status_code == 200


def test_an_unavailable_store_is_503_and_a_bug_is_500(client, context, monkeypatch):
    def broken(*_args, **_kwargs):
        raise JobStoreError

    def faulty(*_args, **_kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(context.store, "list", broken)
    assert error(client.get("/v1/requests")) == (503, "STORE_UNAVAILABLE")
    monkeypatch.setattr(context.store, "list", faulty)
    answer = client.get("/v1/requests")
    assert error(answer) == (500, "INTERNAL")
    assert "a bug" not in answer.text


def test_unknown_paths_and_methods_are_404_and_405(client):
    assert error(client.get("/nothing")) == (404, "NOT_FOUND")
    answer = client.put("/v1/inference")
    assert error(answer) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST"


def test_calls_have_an_id(client):
    assert (
        client.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    made = client.get("/health", headers={"X-Request-ID": "no\tid"}).headers["x-request-id"]
    assert made not in ("no\tid", "")
