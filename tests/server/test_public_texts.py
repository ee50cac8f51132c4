"""No absolute path of the server reaches a client, and no error text is longer than 2 kB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.server.http_support import (
    MINIMAL,
    SERVER_DEFAULTS,
    ManualWorker,
    client_of,
    context_in,
    in_thread,
    now,
    only_job,
)
from tests.support import LORA

from fidelora import errors
from fidelora.errors import FideloraError, RequestFailedError, RequestFieldError
from fidelora.jobs.job import Failure, new_job
from fidelora.recipe import Recipe
from fidelora.server.app import make_app
from fidelora.server.page.html import notice
from fidelora.server.problem_formats import openai_error, problem_response
from fidelora.server.problems import _STATUS_AND_CODE, problem_of
from fidelora.server.public_texts import ROOTS, public_text

SECRET = "/srv/secret place/models"
LONG = "x" * 2**20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'/etc/my dir/a.safetensors' is outside.", "'a.safetensors' is outside."),
        ('"/etc/my dir/a" is bad', '"a" is bad'),
        (f"The folder {SECRET}/sub is not writable.", "The folder sub is not writable."),
        (f"The folder {SECRET} is not writable.", "The folder models is not writable."),
        (f"The folder {SECRET}.", "The folder models."),
        ("/root/.cache/hub/x.bin: no", "x.bin: no"),
        ("[Errno 2] No such file: '/home/me/x'", "[Errno 2] No such file: 'x'"),
        ("sd15=/bases/v1-5.safetensors is bad", "sd15=v1-5.safetensors is bad"),
        ("sqlite:////var/lib/jobs.sqlite cannot be used", "jobs.sqlite cannot be used"),
        ("file:///var/lib/x.json", "x.json"),
        ("error:/var/lib/x (/usr/lib/y.py)", "error:x (y.py)"),
        ("/no/such/folder/of/this/machine", "machine"),
        ("GET /v1/models and /docs", "GET /v1/models and /docs"),
        ("https://example.com/root/x", "https://example.com/root/x"),
        ("https://root/x/y", "https://root/x/y"),
        ("width / height, and/or 1/2", "width / height, and/or 1/2"),
        ("uploads/key-1/x.safetensors", "uploads/key-1/x.safetensors"),
        ("hf:owner/name/x.safetensors", "hf:owner/name/x.safetensors"),
        ("", ""),
    ],
)
def test_only_paths_of_the_server_are_removed(text, expected, context):
    ROOTS.set([SECRET])
    assert public_text(text) == expected


@pytest.mark.parametrize("text", [LONG, "ä" * 2**20, "/" * 2**20, "/root/a" * 2**17, "'/" * 2**19])
def test_a_text_for_clients_is_short(text):
    assert len(public_text(text).encode()) <= 2048


KINDS: list[type[FideloraError]] = [kind for kind, _, _ in _STATUS_AND_CODE]


@pytest.mark.parametrize("path", ["/v1/requests", "/sdapi/v1/txt2img", "/v1/images/generations"])
@pytest.mark.parametrize("text", [f"{SECRET}/x cannot be read.", LONG], ids=["path", "1 MB"])
def test_no_error_response_has_a_path_or_a_long_text(path, text, context):
    ROOTS.set([SECRET])
    found = [kind(text) for kind in KINDS]
    found += [RequestFailedError(text, code="X"), RequestFieldError(text, loc=("body",))]
    found += [errors.AdaptersMissingError(text, missing=[("0" * 64, f"{SECRET}/x{LONG}")])]
    details = {"a": f"{SECRET}/x", "b": {"c": [f"{SECRET}/x", LONG]}}
    found += [errors.RequestError(text, details=details)]
    for error in found:
        answer = bytes(problem_response(problem_of(error), path).body)
        assert b"secret place" not in answer, error
        assert len(answer) < 8192, error
        assert "secret place" not in json.dumps(openai_error(problem_of(error)))


def a_failed_job(context: Any, message: str) -> str:
    context.store.add(new_job((Recipe(prompt="a"),), now()))
    job = context.store.claim("worker", now(), 60)
    context.store.fail(job.id, job.epoch, Failure("OUTPUT_FAILED", message), now())
    return str(job.id)


@pytest.mark.parametrize("text", ["{secret}/x.png could not be written.", LONG])
def test_the_error_of_a_request_has_no_path(client, context, text):
    secret = context.settings.outputs
    job_id = a_failed_job(context, text.format(secret=secret))
    for path in ("status", "result", "events"):
        answer = client.get(f"/v1/requests/{job_id}/{path}")
        assert answer.status_code == 200
        assert str(context.settings.data_dir) not in answer.text
        assert len(answer.content) < 4096
    assert str(context.settings.data_dir) not in client.get("/v1/requests").text


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_the_error_of_a_waiting_call_has_no_path(client, context, path):
    body = {"prompt": "a", "model": "sd15"} if "images" in path else {"prompt": "a", "steps": 1}
    call = in_thread(lambda: client.post(path, json=body))
    only_job(context)
    job = context.store.claim("worker", now(), 60)
    message = f"{context.settings.outputs}/x.png could not be written."
    context.store.fail(job.id, job.epoch, Failure("OUTPUT_FAILED", message), now())
    answer = call.result(60)
    assert answer.status_code == 500
    assert "x.png could not be written" in answer.text
    assert str(context.settings.data_dir) not in answer.text


class Pool:
    """Workers that cannot start."""

    def __init__(self, trouble: str) -> None:
        self.unready_reason = trouble
        self.ready = False
        self.process_ids: tuple[int, ...] = ()
        self.restarts = 0


def test_the_reason_of_an_unready_server_has_no_path(context):
    context.store.add(new_job((Recipe(prompt="a"),), now()))
    trouble = f"The base model {context.settings.data_dir}/base is incomplete."
    object.__setattr__(context, "pool", Pool(trouble))
    client = TestClient(
        make_app(context), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)
    )
    (job,) = context.store.list().jobs
    for answer in (
        client.get("/ready"),
        client.get("/v1/requests"),
        client.get(f"/v1/requests/{job.id}/status"),
        client.post("/v1/inference", json=MINIMAL),
        client.post("/sdapi/v1/txt2img", json={"prompt": "a"}),
    ):
        assert "base is incomplete" in answer.text
        assert str(context.settings.data_dir) not in answer.text
    assert client.get("/health").json() == {"status": "healthy"}


def test_the_base_model_of_the_server_has_only_its_name(context):
    defaults = dict.fromkeys(["sd15"], SERVER_DEFAULTS | {"base_model": f"{SECRET}/base"})
    object.__setattr__(context, "server_defaults", defaults)
    with client_of(context) as client:
        texts = [
            client.get(path).text
            for path in ("/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/options", "/openapi.json")
        ]
        recipe = Recipe(prompt="a", base_model="other", base_sha256="0" * 64).to_dict()
        texts.append(client.post("/v1/replay", json={"recipe": recipe}).text)
    assert not any("secret place" in text for text in texts)


def test_lists_and_errors_of_files_have_no_path(client, context):
    loras = context.settings.loras
    (loras / "broken.safetensors").write_bytes(b"<html>")
    (loras / "empty.safetensors").write_bytes(b"")
    (loras / "circle.safetensors").symlink_to(loras / "circle.safetensors")
    (loras / "out.safetensors").symlink_to(LORA)
    (loras / "folder.safetensors").mkdir()
    answers = [client.get("/v1/loras"), client.get("/sdapi/v1/loras")]
    for name in ("broken", "empty", "circle", "out", "folder", "none"):
        for path in (f"{name}.safetensors", str(loras / f"{name}.safetensors")):
            body = MINIMAL | {"loras": [{"path": path}]}
            answers.append(client.post("/v1/inference", json=body))
    for answer in answers:
        assert answer.status_code < 500
        assert str(context.settings.data_dir) not in answer.text
        assert str(LORA.parent) not in answer.text


@pytest.mark.parametrize("reported", [True, False])
def test_the_path_of_an_image_can_be_switched_off(tmp_path, reported):
    context = context_in(tmp_path, report_file_paths=reported)
    with client_of(context) as client:
        request_id = client.post("/v1/inference", json=MINIMAL).json()["request_id"]
        job = ManualWorker(context).succeed(ManualWorker(context).claim())
        (image,) = client.get(f"/v1/requests/{request_id}/result").json()["outputs"]["images"]
        path = Path(job.outputs[0].file_path)
        assert image["file_path"] == (str(path) if reported else path.name)
        assert str(tmp_path) not in json.dumps(image | {"file_path": ""})
        assert client.get(f"/v1/requests/{request_id}/images/0").content == b"an image"
        assert str(tmp_path) not in str(client.get(f"/v1/requests/{request_id}/images/0").headers)


# --- the page -------------------------------------------------------------------------------------


def test_messages_of_the_page_have_no_path_and_are_short():
    ROOTS.set([SECRET])
    assert "secret" not in notice(f"{SECRET}/x is bad.", "error")
    assert len(notice(LONG)) < 4096


def test_gradio_sends_and_takes_an_alias_of_the_folder(context):
    app = make_app(context, with_page=True)
    data_dir = str(context.settings.data_dir)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
        assert data_dir not in client.get("/").text
        uploaded = client.post("/gradio_api/upload", files={"files": ("a.png", b"content")})
        (path,) = uploaded.json()
        assert path.startswith("/page-files/")
        assert data_dir not in uploaded.text
        assert client.get(f"/gradio_api/file={path}").content == b"content"
        for outside in ("/page-files/../../jobs.sqlite", "/page-files-of-others/x", "/etc/passwd"):
            assert client.get(f"/gradio_api/file={outside}").status_code in (403, 404)
        for name in ("a" * 300, "a/" * 3000 + "b"):
            answer = client.get(f"/gradio_api/file=/page-files/{name}")
            assert 400 <= answer.status_code < 500
            assert 400 <= client.get(f"/assets/{name}").status_code < 500
            assert 400 <= client.get(f"/static/{name}").status_code < 500
            assert 400 <= client.get(f"/reports/{name}").status_code < 500
