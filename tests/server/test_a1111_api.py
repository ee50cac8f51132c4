"""AUTOMATIC1111's API, called by the package `webuiapi`: images, progress, errors and keys."""

from __future__ import annotations

import base64
import hashlib
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import webuiapi
from requests.adapters import HTTPAdapter
from tests.server.http_support import (
    client_of,
    context_in,
    in_thread,
    jobs_succeeding,
    listening,
    only_job,
    pixels,
    png_with_parameters,
)
from tests.server.serve_support import IMAGES_DEADLINE_S, Server, until
from tests.support import LORA

import fidelora
from fidelora.images.read import read_origin
from fidelora.jobs.job import Status

pytestmark = pytest.mark.usefixtures("no_pauses")

TENSORS_SHA256 = hashlib.sha256(
    LORA.read_bytes()[8 + int.from_bytes(LORA.read_bytes()[:8], "little") :]
).hexdigest()


@pytest.fixture
def context_settings():
    return {"queue_size": 3}


@pytest.fixture
def client(context):
    """A client of the application in this process."""
    return client_of(context)


class _Timeouts(HTTPAdapter):
    """Gives calls of `webuiapi`, which sets no timeouts, a deadline."""

    def send(self, *args: Any, **given: Any) -> Any:
        return super().send(*args, **given | {"timeout": IMAGES_DEADLINE_S})


def api_of(url: str, **given: Any) -> webuiapi.WebUIApi:
    api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", sampler="Euler a", steps=2, **given)
    api.session.mount("http://", _Timeouts())
    return api


# --- with a client of the web UI, and real images -----------------------------------------------


def test_the_client_of_the_web_ui_makes_images(tiny_server: Server):
    api = api_of(tiny_server.url)
    result = api.txt2img(
        prompt="a ball <lora:sks:0.8>",
        negative_prompt="bad",
        seed=5,
        width=64,
        height=72,
        cfg_scale=4,
        batch_size=2,
        n_iter=2,
    )
    assert [image.size for image in result.images] == [(64, 72)] * 4
    assert result.info["all_seeds"] == [5, 6, 7, 8]
    assert result.info["seed"] == 5
    assert result.info["all_prompts"] == ["a ball <lora:sks:0.8>"] * 4
    assert (result.info["sampler_name"], result.info["cfg_scale"], result.info["steps"]) == (
        "Euler a",
        4,
        2,
    )
    assert (result.parameters["cfg_scale"], result.parameters["batch_size"]) == (4, 2)
    assert [image.info["parameters"] for image in result.images] == result.info["infotexts"]
    assert result.info["infotexts"][1] == (
        "a ball <lora:sks:0.8>\nNegative prompt: bad\n"
        "Steps: 2, Sampler: Euler a, Schedule type: Automatic, CFG scale: 4, Seed: 6, "
        "Size: 64x72, Model: tiny-sd15, "
        f'Lora hashes: "sks: {TENSORS_SHA256[:12]}", Version: Fidelora {fidelora.__version__}'
    )


def test_the_same_recipe_is_the_same_image_in_both_apis(tiny_server: Server):
    made = tiny_server.call(
        "/sdapi/v1/txt2img",
        {
            "prompt": "a ball <lora:people/conv:0.5>",
            "seed": 7,
            "steps": 2,
            "width": 64,
            "height": 64,
            "sampler_name": "DDIM",
        },
    )
    content = base64.b64decode(made["images"][0])
    prompt = {
        "prompt": "a ball",
        "seed": 7,
        "sample_steps": 2,
        "width": 64,
        "height": 64,
        "sampler": "ddim",
        "guidance_scale": 7,
    }
    lora = {"path": "people/conv.safetensors", "network_multiplier": 0.5}
    ours = str(
        tiny_server.call("/v1/inference", {"model": "sd15", "loras": [lora], "prompts": [prompt]})[
            "request_id"
        ]
    )
    assert tiny_server.wait(ours, "succeeded", "failed")["status"] == "succeeded"
    (output,) = tiny_server.call(f"/v1/requests/{ours}/result")["outputs"]["images"]
    assert httpx2.get(output["url"], timeout=60).content == content
    assert read_origin(content).recipe is not None


def test_the_client_reads_models_samplers_loras_and_progress(tiny_server: Server):
    api = api_of(tiny_server.url)
    assert api.util_get_model_names() == ["sd15"]
    assert api.util_get_current_model() == "sd15"
    assert "Euler a" in api.util_get_sampler_names()
    assert api.util_get_scheduler_names() == [
        "automatic",
        "karras",
        "sgm_uniform",
        "trailing",
        "uniform",
    ]
    assert sorted(lora["name"] for lora in api.get_loras()) == ["conv", "sks"]
    assert api.get_progress()["progress"] == 0
    assert api.interrupt() == {}
    api.util_set_model("sd15")


def test_a_setting_of_the_request_selects_the_image_format(tiny_server: Server):
    body = {
        "prompt": "a ball",
        "steps": 1,
        "width": 64,
        "height": 64,
        "override_settings": {"samples_format": "jpg"},
    }
    (image,) = tiny_server.call("/sdapi/v1/txt2img", body)["images"]
    assert read_origin(base64.b64decode(image)).format == "jpeg"


# --- waiting ------------------------------------------------------------------------------------


def test_progress_and_interrupt_concern_the_clients_own_request(url, context, worker):
    api = api_of(url)
    body = {"model": "sd15", "loras": [{"path": "sks.safetensors"}], "prompts": [{"prompt": "x"}]}
    others = httpx2.post(f"{url}/v1/inference", json=body)
    waiting = in_thread(lambda: api.txt2img(prompt="a ball", steps=20, n_iter=1))
    until(lambda: context.clients.a1111.jobs(""), 20)
    assert api.get_progress()["textinfo"] == "1 requests are ahead of this one"
    foreign = worker.claim()
    assert foreign.id == others.json()["request_id"]
    job = worker.claim()
    worker.step(job, 5, 20, "preview")
    found = api.get_progress()
    assert (found["progress"], found["eta_relative"], found["current_image"]) == (
        0.25,
        1.5,
        "preview",
    )
    state = {
        "job": "txt2img",
        "job_count": 1,
        "job_no": 0,
        "sampling_step": 5,
        "sampling_steps": 20,
        "interrupted": False,
    }
    assert state.items() <= found["state"].items()
    assert (
        httpx2.get(f"{url}/sdapi/v1/progress?skip_current_image=true").json()["current_image"]
        is None
    )

    api.interrupt()
    assert api.get_progress()["state"]["interrupted"]
    assert not context.store.get(foreign.id).cancel_requested, (
        "a request of another API was interrupted"
    )
    context.store.stop(job.id, job.epoch, job.created_at)
    with pytest.raises(RuntimeError, match="REQUEST_CANCELED"):
        waiting.result(30)
    assert context.clients.a1111.jobs("") == []
    assert api.get_progress()["state"]["job_count"] == 0


def test_a_disconnected_client_cancels_its_job(url, context):
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        client.sendall(
            b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 20\r\n\r\n"
            b'{"prompt": "a ball"}'
        )
        job = only_job(context)
    assert until(lambda: context.store.get(job.id).status is Status.CANCELED, 20)
    assert until(lambda: not context.clients.a1111.jobs(""), 20) is True


def test_a_failed_job_and_a_full_queue_are_errors(url, context, worker):
    api = api_of(url)
    waiting = in_thread(lambda: api.txt2img(prompt="a ball"))
    worker.fail(until(worker.claim_one, 20))
    with pytest.raises(RuntimeError, match="The model produced NaN"):
        waiting.result(30)
    others = [in_thread(lambda: api.txt2img(prompt="a ball")) for _ in range(3)]
    until(lambda: context.store.count(Status.IN_QUEUE) == 3, 20)
    answer = httpx2.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "a ball"})
    assert (answer.status_code, answer.json()["error"], answer.headers["retry-after"]) == (
        429,
        "QUEUE_FULL",
        "10",
    )
    with jobs_succeeding(worker, png_with_parameters()):
        assert [len(one.result(30).images) for one in others] == [1, 1, 1]


def test_keys_are_required_and_accepted_as_basic_or_bearer(tmp_path):
    context = context_in(tmp_path)
    keys = {name: context.keys.add(name) for name in ("me", "you")}
    with listening(context) as url:
        answer = httpx2.get(f"{url}/sdapi/v1/options")
        assert (answer.status_code, answer.headers["www-authenticate"], answer.json()["error"]) == (
            401,
            "Basic",
            "UNAUTHORIZED",
        )
        for password in ("me", "me:no", "me:", "\xff"):
            wrong = "Basic " + base64.b64encode(password.encode("latin-1")).decode()
            assert (
                httpx2.get(f"{url}/sdapi/v1/options", headers={"Authorization": wrong}).status_code
                == 401
            )
        assert (
            httpx2.get(f"{url}/sdapi/v1/options", headers={"Authorization": "Basic !"}).status_code
            == 401
        )
        for key in keys.values():
            assert (
                httpx2.get(
                    f"{url}/sdapi/v1/options", headers={"Authorization": f"Bearer {key}"}
                ).status_code
                == 200
            )
        for user in ("größe".encode("latin-1"), "größe".encode()):
            basic = "Basic " + base64.b64encode(user + f":{keys['me']}".encode()).decode()
            answer = httpx2.get(f"{url}/sdapi/v1/options", headers={"Authorization": basic})
            assert answer.status_code == 200
        empty = httpx2.get(f"{url}/sdapi/v1/options", headers={"Authorization": "Basic"})
        assert empty.status_code == 401
        basic = base64.b64encode(f"me:{keys['me']}".encode()).decode()
        assert (
            httpx2.get(
                f"{url}/v1/requests", headers={"Authorization": f"Basic {basic}"}
            ).status_code
            == 401
        ), "Basic authentication worked outside A1111's paths"

        mine, yours = (api_of(url, username="any", password=keys[name]) for name in ("me", "you"))
        waiting = in_thread(lambda: mine.txt2img(prompt="a ball"))
        job = only_job(context)
        until(lambda: context.clients.a1111.jobs(job.owner), 20)
        yours.interrupt()
        assert context.store.get(job.id).status is Status.IN_QUEUE
        assert yours.get_progress()["state"]["job"] == ""
        mine.interrupt()
        with pytest.raises(RuntimeError, match="REQUEST_CANCELED"):
            waiting.result(30)


def test_unknown_paths_have_the_web_uis_error_format(client):
    answer = client.post("/sdapi/v1/img2img", json={})
    assert (answer.status_code, set(answer.json())) == (404, {"error", "detail", "body", "errors"})
    assert "img2img, upscaling and ControlNet are not supported" in answer.json()["detail"]


def test_the_pixels_of_the_answer_are_those_of_the_file(client, context, worker):
    with jobs_succeeding(worker, png_with_parameters()):
        (image,) = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"}).json()["images"]
    assert (pixels(base64.b64decode(image)) == pixels(png_with_parameters())).all()
