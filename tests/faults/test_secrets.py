"""Secrets of the server and of requests appear in no response, log, file or database row."""

from __future__ import annotations

import base64

import pytest
from tests.faults.fault_support import HUB_TOKEN, REQUEST_TOKEN, SMALL, FaultServer
from tests.faults.hostile_adapters import SOUND
from tests.server.http_support import png_with_parameters

from fidelora.images.read import read_origin
from fidelora.jobs.job import Status


def test_secrets_appear_nowhere(server: FaultServer):
    """Requests that are accepted, refused and failing, each with all secrets that it can have."""
    (server.loras / "sound.safetensors").write_bytes(SOUND)
    body = {
        "model": "sd15",
        "loras": [{"path": "sound.safetensors"}],
        "prompts": [{"prompt": "a ball", **SMALL}],
        "hf_token": REQUEST_TOKEN,
    }
    accepted = server.post("/v1/inference", body).json()["request_id"]
    refused = [
        body | {"hf_token": [REQUEST_TOKEN]},
        body | {"hf_token": {"token": REQUEST_TOKEN}},
        body | {"model": "none"},
        body | {"loras": [{"path": "hf:a/b/c.safetensors"}]},
        body | {"loras": [{"path": "https://files.example/a.safetensors"}]},
        body | {"loras": [{"path": "nothing.safetensors"}]},
        body | {"prompts": [{"prompt": "a", "sampler": "none"}]},
    ]
    for one in refused:
        assert 400 <= server.post("/v1/inference", one).status_code < 500
    for path in ("/v1/images/generations", "/v1/replay"):
        given = {"prompt": "a", "hf_token": REQUEST_TOKEN, "loras": [{"path": "none"}]}
        assert 400 <= server.post(path, given).status_code < 500
    assert server.post("/sdapi/v1/txt2img", {"prompt": "<lora:none:1>"}).status_code == 400
    assert (
        server.post("/v1/replay", files={"image": ("a.png", png_with_parameters())}).status_code
        == 200
    )
    server.post("/sdapi/v1/png-info", {"image": base64.b64encode(png_with_parameters()).decode()})
    basic = base64.b64encode(f"a:{server.key}".encode()).decode()
    headers = {"Authorization": f"Basic {basic}"}
    for path in ("/sdapi/v1/options", "/sdapi/v1/loras", "/sdapi/v1/progress", "/v1/models"):
        server.call("GET", path, headers=headers if path.startswith("/sdapi") else None)
    for path in ("/health", "/ready", "/metrics", "/v1/loras", "/v1/requests", "/openapi.json"):
        server.call("GET", path)
    done = server.run_jobs()
    assert Status.SUCCEEDED in {job.status for job in done}
    assert server.call("GET", f"/v1/requests/{accepted}/result").status_code == 200
    (job,) = (job for job in done if job.id == accepted)
    image = server.call("GET", f"/v1/requests/{accepted}/images/0").content
    assert read_origin(image).recipe == job.recipes[0]
    assert server.logs
    server.check_secrets()


def test_a_secret_that_is_stored_is_found(server: FaultServer):
    """The check itself works."""
    path = server.folder / "data" / "outputs" / "leak.txt"
    path.write_text(f"a {HUB_TOKEN}")
    with pytest.raises(AssertionError, match="a secret is in"):
        server.check_secrets()
    path.unlink()
    with pytest.raises(AssertionError, match="a secret is in"):
        server.assert_without_secrets(f"a {server.key}")
