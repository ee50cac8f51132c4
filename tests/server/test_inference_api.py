"""`POST /v1/inference`, as `ai-toolkit-inference` documents it, and its errors."""

from __future__ import annotations

import json

import pytest
from tests.server.http_support import (
    MINIMAL,
    error,
    submit,
    with_prompt,
)
from tests.support import LOKR, LORA

from fidelora.families import all_families
from fidelora.jobs.job import Status
from fidelora.jobs.store import WorkerState
from fidelora.recipe import file_sha256


def test_the_models_and_the_health_of_the_server_are_returned(client):
    assert client.get("/health").json() == {"status": "healthy"}
    assert [client.head(path).status_code for path in ("/health", "/ready")] == [200, 200]
    answer = client.get("/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["sd15"]  # the configured ones
    models = answer["models"]
    assert [model["configured"] for model in models] == [model["id"] == "sd15" for model in models]
    assert [model["id"] for model in models] == list(all_families())
    assert models[0] == {
        "id": "sd15",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "resolution_divisor": 8,
        "default_steps": 25,
        "default_guidance_scale": 6.0,
        "requires_control_image": False,
        "is_video_model": False,
        "default_num_frames": None,
        "default_fps": None,
        "configured": True,
    }


def test_a_request_is_followed_from_its_acceptance_to_its_image(client, worker, context):
    answer = client.post("/v1/inference", json=MINIMAL).json()
    request_id = answer["request_id"]
    url = f"http://127.0.0.1:8000/v1/requests/{request_id}"
    assert set(answer) == {"request_id", "status", "status_url", "result_url", "created_at"}
    assert (answer["status"], answer["status_url"], answer["result_url"]) == (
        "queued",
        f"{url}/status",
        f"{url}/result",
    )

    status = client.get(f"/v1/requests/{request_id}/status").json()
    assert (status["status"], status["queue_position"], status["started_at"], status["error"]) == (
        "in_queue",
        0,
        None,
        None,
    )
    assert client.get(f"/v1/requests/{request_id}/result").json()["outputs"] is None

    job = worker.claim()
    worker.step(job, 5)
    status = client.get(f"/v1/requests/{request_id}/status").json()
    assert status["status"] == "in_progress"
    assert status["progress"] == {
        "image": 0,
        "images": 1,
        "step": 5,
        "steps": 25,
        "fraction": 0.2,
        "eta_s": 1.5,
    }

    done = worker.succeed(job)
    result = client.get(f"/v1/requests/{request_id}/result").json()
    (image,) = result["outputs"]["images"]
    assert (result["status"], result["error"], result["outputs"]["videos"]) == (
        "succeeded",
        None,
        [],
    )
    assert result["metadata"]["model"] == "sd15"
    assert result["metadata"]["timings"] == {"denoise": 1.0}
    assert (image["format"], image["width"], image["height"], image["seed"]) == (
        "png",
        512,
        512,
        42,
    )
    assert (image["file_path"], image["sha256"]) == (
        done.outputs[0].file_path,
        done.outputs[0].sha256,
    )
    assert image["recipe"]["prompt"] == "a photo of sks"
    assert image["recipe"]["adapters"] == [
        {"sha256": file_sha256(LORA), "multiplier": 1.0, "name": "sks"}
    ]
    assert (image["recipe"]["width"], image["recipe"]["height"], image["recipe"]["base_model"]) == (
        1024,
        1024,
        "tiny",
    )

    picture = client.get(image["url"])
    assert picture.content == b"an image"
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert picture.headers["etag"] == f'"{image["sha256"]}"'


def test_a_failure_has_a_message(client, worker):
    request_id = submit(client)
    worker.fail(worker.claim())
    for part in ("status", "result"):
        answer = client.get(f"/v1/requests/{request_id}/{part}").json()
        assert (answer["status"], answer["error"]) == ("failed", "The model produced NaN.")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (with_prompt(wdth=5), "prompts[0].wdth does not exist; the field is called width."),
        (MINIMAL | {"fidelty": "fast"}, "fidelty does not exist; the field is called fidelity."),
        (MINIMAL | {"steps": 5}, "sd15 does not support steps; leave it out."),
        (
            MINIMAL | {"loras": []},
            "At least one LoRA is required. POST /v1/images/generations needs none.",
        ),
    ],
)
def test_a_refused_request_says_what_to_send_instead(client, body, message):
    answer = client.post("/v1/inference", json=body)
    assert answer.json()["detail"]["error"]["message"] == message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (MINIMAL | {"model": "gpt"}, "MODEL_NOT_FOUND"),
        (MINIMAL | {"loras": []}, "LORA_FILE_REQUIRED"),
        (MINIMAL | {"loras": [{"path": "none.safetensors"}]}, "LORA_NOT_FOUND"),
        (
            MINIMAL | {"loras": [{"path": "sks.safetensors", "transformer": "low"}]},
            "MOE_FORMAT_NOT_SUPPORTED",
        ),
        (with_prompt(ctrl_img="a.png"), "FIELD_NOT_SUPPORTED"),
        (with_prompt(num_frames=5), "FIELD_NOT_SUPPORTED"),
        (with_prompt(fps=5), "FIELD_NOT_SUPPORTED"),
        (with_prompt(wdth=5), "FIELD_NOT_SUPPORTED"),
        (MINIMAL | {"steps": 5}, "FIELD_NOT_SUPPORTED"),
        (with_prompt(network_multiplier=[1, 1]), "MULTIPLIERS_DO_NOT_MATCH"),
        (MINIMAL | {"loras": [{"path": "sks.safetensors", "sha256": "0" * 64}]}, "LORA_CHANGED"),
    ],
)
def test_unsupported_requests_are_400_with_a_code(client, context, body, code):
    assert error(client.post("/v1/inference", json=body)) == (400, code)
    assert context.store.count(Status.IN_QUEUE) == 0


def test_a_body_that_is_not_json_is_named(client):
    for content, headers, message in (
        (b'{"model": "sd15"}', {}, "sent with the header `Content-Type: application/json`"),
        (b"[]", {"Content-Type": "application/json"}, "The body must be a JSON object"),
        (b'{"model"', {"Content-Type": "application/json"}, "not valid JSON: Expecting ':'"),
    ):
        answer = client.post("/v1/inference", content=content, headers=headers)
        assert answer.status_code == 422
        assert message in answer.json()["detail"][0]["msg"]


def test_an_unknown_model_error_lists_the_models(client):
    answer = client.post("/v1/inference", json=MINIMAL | {"model": "gpt"}).json()
    assert answer["detail"]["error"]["details"] == {"supported_models": list(all_families())}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "model"]),
        (MINIMAL | {"prompts": []}, ["body", "prompts"]),
        ({key: value for key, value in MINIMAL.items() if key != "loras"}, ["body", "loras"]),
        *((with_prompt(**{field: value}), ["body", "prompts", 0, field]) for field, value in [
            ("width", 63), ("width", 4097), ("height", 63), ("height", 4097),
            ("guidance_scale", -0.1), ("guidance_scale", 20.1),
            ("sample_steps", 0), ("sample_steps", 151), ("seed", -2), ("sampler", "dpm++"),
            ("prompt", "x" * 10_001), ("neg", "x" * 10_001), ("prompt", "\ud800"),
            ("network_multiplier", 5.1),
        ]),
        (
            MINIMAL | {"loras": [{"path": "a.safetensors", "network_multiplier": -5.1}]},
            ["body", "loras", 0, "network_multiplier"],
        ),
        (MINIMAL | {"output_format": "gif"}, ["body", "output_format"]),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_422_and_named(client, context, body, place):
    answer = client.post(
        "/v1/inference", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert place in [entry["loc"][: len(place)] for entry in answer.json()["detail"]]
    assert context.store.count(Status.IN_QUEUE) == 0


def test_an_unknown_sampler_error_lists_the_samplers(client):
    (entry,) = client.post("/v1/inference", json=with_prompt(sampler="dpm++")).json()["detail"]
    assert "euler_a" in entry["msg"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[]",
        b"\xff",
        b'{"model": NaN}',
        b'{"prompts": [{"width": Infinity}]}',
        b"[" * 100_000,
    ],
)
def test_malformed_bodies_are_rejected(client, content):
    assert client.post(
        "/v1/inference", content=content, headers={"content-type": "application/json"}
    ).status_code in (400, 422)


def test_the_trigger_word_of_the_lora_is_reported(client, worker):
    note = "[trigger] is 'sks', the trigger word in the metadata of the LoRA sks."
    body = {name: value for name, value in MINIMAL.items() if name != "trigger_word"}
    queued = client.post("/v1/inference", json=body).json()
    assert queued["notes"] == [note]
    worker.succeed(worker.claim())
    result = client.get(f"/v1/requests/{queued['request_id']}/result").json()
    assert result["notes"] == [note]
    assert result["outputs"]["images"][0]["recipe"]["prompt"] == "a photo of sks"
    assert "notes" not in client.post("/v1/inference", json=MINIMAL).json()


def test_a_request_can_name_the_kind_of_device(context, client):
    request = MINIMAL | {"device": "cuda"}
    assert "notes" not in client.post("/v1/inference", json=request).json()  # no worker is known
    context.store.report_worker(WorkerState("w", "cpu"))
    answer = client.post("/v1/inference", json=request).json()
    assert answer["notes"] == [
        "No worker has a device of the kind cuda at the moment (only cpu), so the request "
        "waits for one."
    ]
    assert context.store.get(answer["request_id"]).device_kind == "cuda"
    assert context.store.claim("w", None, 60, device_kind="cpu") is None
    refused = client.post("/v1/inference", json=MINIMAL | {"device": "tpu"})
    assert refused.status_code == 422


def test_prompts_have_defaults_and_can_set_seed_and_trigger_word(client, context):
    prompts = [
        {"prompt": "[trigger]"},
        {"prompt": "[trigger]", "trigger_word": "xyz", "seed": 7, "width": 519},
        {"prompt": "a", "seed": -1},
    ]
    first, second, third = context.store.get(submit(client, MINIMAL | {"prompts": prompts})).recipes
    assert (first.prompt, first.seed, first.steps, first.guidance_scale, first.sampler) == (
        "sks",
        42,
        25,
        6.0,
        "ddpm",
    )
    assert (second.prompt, second.seed, second.width) == ("xyz", 7, 512)
    assert 0 <= third.seed < 2**32


def test_noise_matches_the_trainer_of_the_lora(client, context, tmp_path):
    from safetensors.numpy import load_file, save_file

    software = json.dumps({"name": "ai-toolkit", "version": "0.7.1"})
    save_file(load_file(LORA), context.settings.loras / "old.safetensors", {"software": software})
    (old,) = context.store.get(
        submit(client, MINIMAL | {"loras": [{"path": "old.safetensors"}]})
    ).recipes
    (new,) = context.store.get(submit(client)).recipes
    assert (old.noise, new.noise) == ("legacy", "modern")


def test_each_prompt_can_have_its_own_multipliers_of_the_loras(client, context):
    (context.settings.loras / "b.safetensors").write_bytes(LOKR.read_bytes())
    loras = [{"path": "sks.safetensors", "network_multiplier": 0.5}, {"path": "b.safetensors"}]
    prompts = [{"prompt": "a"}, {"prompt": "b", "network_multiplier": [1.5, -1]}]
    first, second = context.store.get(
        submit(client, MINIMAL | {"loras": loras, "prompts": prompts})
    ).recipes
    assert [ref.multiplier for ref in first.adapters] == [0.5, 1.0]
    assert [ref.multiplier for ref in second.adapters] == [1.5, -1.0]
    assert {first.adapter_mode, second.adapter_mode} == {"live"}
