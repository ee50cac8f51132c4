"""Bodies as real programs send them, with their default settings.

Sources, November 2026: Open WebUI `routers/images.py`, SillyTavern's extension `stable-diffusion`,
LibreChat's tools `StableDiffusion` and `OpenAIImageTools`, the documents of `ai-toolkit-inference`.
`webuiapi` and `openai` are called themselves in `test_a1111_api.py` and `test_openai_api.py`.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from tests.server.http_support import (
    ManualWorker,
    client_of,
    context_in,
    jobs_succeeding,
    png_with_parameters,
)

pytestmark = pytest.mark.usefixtures("no_pauses")

MAPPED = "dall-e-2=sd15,dall-e-3=sd15,gpt-image-1=sd15"


@pytest.fixture
def context(tmp_path) -> Any:
    return context_in(tmp_path, model_aliases=MAPPED)


@pytest.fixture
def client(context) -> Any:
    return client_of(context)


def made(client: Any, context: Any, path: str, body: Any, **given: Any) -> Any:
    """Return the answer to a request for an image."""
    with jobs_succeeding(ManualWorker(context), png_with_parameters()):
        answer = client.post(path, json=body, **given)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- AUTOMATIC1111's API --------------------------------------------------------------------------

SILLYTAVERN_ALWAYS = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": "a red ball, sks \\(cartoon\\), best quality",
    "negative_prompt": "lowres, bad anatomy",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
SILLYTAVERN = [
    SILLYTAVERN_ALWAYS | {"override_settings": {"CLIP_stop_at_last_layers": 1}},
    SILLYTAVERN_ALWAYS
    | {
        "seed": 7,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "forge_additional_modules": []},
    },
    SILLYTAVERN_ALWAYS  # an older release
    | {
        "n_iter": 1,
        "s_churn": 0.0,
        "s_min_uncond": 0.0,
        "s_noise": 1.0,
        "s_tmax": None,
        "s_tmin": 0.0,
        "seed": "-1",
        "hr_upscaler": "none",
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_model_checkpoint": "sd15"},
    },
]
EMPTY_BASIC = {"Authorization": "Basic "}


@pytest.mark.parametrize("body", SILLYTAVERN, ids=["plain", "forge", "older"])
def test_sillytavern_makes_an_image(client, context, body):
    answer = made(client, context, "/sdapi/v1/txt2img", body, headers=EMPTY_BASIC)
    assert base64.b64decode(answer["images"][0]).startswith(b"\x89PNG")
    (recipe,) = context.store.list().jobs[0].recipes
    assert recipe.prompt == "a red ball, sks (cartoon), best quality"
    assert recipe.sampler == "euler_a"


@pytest.mark.parametrize("auth", ["Basic ", "Basic Og=="])  # of an empty text, and of ":"
def test_the_lists_that_sillytavern_requests_exist(client, auth):
    headers = {"Authorization": auth}
    assert client.get("/sdapi/v1/options", headers=headers).json()["sd_model_checkpoint"] == "sd15"
    names = {
        path: [one[key] for one in client.get(f"/sdapi/v1/{path}", headers=headers).json()]
        for path, key in (
            ("upscalers", "name"),
            ("latent-upscale-modes", "name"),
            ("sd-vae", "model_name"),
            ("sd-modules", "model_name"),
            ("samplers", "name"),
            ("schedulers", "name"),
            ("sd-models", "title"),
        )
    }
    assert "Euler a" in names["samplers"]
    assert names["upscalers"] == ["None"]
    assert names["sd-models"] == ["sd15"]
    chosen = {"sd_model_checkpoint": "sdxl"}
    assert client.post("/sdapi/v1/options", json=chosen, headers=headers).status_code == 200
    idle = client.get("/sdapi/v1/progress", headers=headers).json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


OPEN_WEBUI = {"prompt": "a red ball", "batch_size": 1, "width": 512, "height": 512, "steps": 50}


@pytest.mark.parametrize(
    "more", [{}, {"negative_prompt": "bad"}, {"cfg_scale": 6, "sampler_name": "Euler"}]
)
def test_open_webui_makes_an_image(client, context, more):
    headers = {"authorization": "Basic "}
    options = client.get("/sdapi/v1/options", headers=headers).json()
    assert client.post("/sdapi/v1/options", json=options, headers=headers).status_code == 200
    answer = made(client, context, "/sdapi/v1/txt2img", OPEN_WEBUI | more, headers=headers)
    assert len(answer["images"]) == 1
    assert json.loads(answer["info"])["all_seeds"]


def test_librechat_makes_an_image(client, context):
    body = {
        "prompt": "photo of a red ball, 8k",
        "negative_prompt": "cgi, sketch",
        "cfg_scale": 4.5,
        "steps": 22,
        "width": 1024,
        "height": 1024,
    }
    answer = made(client, context, "/sdapi/v1/txt2img", body)
    info = json.loads(answer["info"])
    assert (info["width"], info["height"], info["seed"]) == (1024, 1024, info["all_seeds"][0])
    assert info["infotexts"][0].split("\n")[-1].startswith("Steps: ")


# --- OpenAI's API ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {
            "model": "dall-e-2",
            "n": 1,
            "size": "512x512",
            "response_format": "b64_json",
        },  # Open WebUI
        {"model": "gpt-image-1", "n": 1, "size": "auto"},
        {  # LibreChat
            "model": "gpt-image-1",
            "n": 1,
            "background": "auto",
            "output_format": "webp",
            "output_compression": 100,
            "quality": "auto",
            "size": "auto",
        },
        {"model": "gpt-image-1", "output_format": "png", "output_compression": 100},
        {  # LibreChat's tool for DALL-E
            "model": "dall-e-3",
            "n": 1,
            "quality": "standard",
            "style": "vivid",
            "size": "1024x1024",
        },
    ],
    ids=["open-webui", "open-webui-auto", "librechat", "uncompressed-png", "librechat-dalle"],
)
def test_clients_of_openai_make_an_image(client, context, body):
    answer = made(client, context, "/v1/images/generations", {"prompt": "a red ball"} | body)
    assert answer["data"][0]["b64_json"]
    assert context.store.list().jobs[0].recipes[0].model == "sd15"


def test_the_error_for_an_unmapped_model_names_the_setting(tmp_path):
    client = client_of(context_in(tmp_path))
    body = {"model": "dall-e-3", "prompt": "a ball"}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 404
    assert "FIDELORA_MODEL_ALIASES" in answer.text


# --- ai-toolkit-inference -------------------------------------------------------------------------


def test_the_scripts_of_the_reference_server_run(client, context):
    """The request of its page for SD 1.5, and its loop of polling."""
    body = {
        "model": "sd15",
        "trigger_word": "sks",
        "prompts": [
            {
                "prompt": "[trigger] a photo of a person",
                "width": 1024,
                "height": 1024,
                "seed": 42,
                "sample_steps": 25,
                "guidance_scale": 6.0,
                "neg": "",
            }
        ],
        "loras": [{"path": "sks.safetensors", "network_multiplier": 1.0}],
    }
    job = client.post("/v1/inference", json=body)
    assert job.status_code in (200, 202), job.text
    assert set(job.json()) >= {"request_id", "status", "status_url", "result_url", "created_at"}
    request_id = job.json()["request_id"]
    assert client.get(f"/v1/requests/{request_id}/status").json()["status"] == "in_queue"
    worker = ManualWorker(context)
    worker.succeed(worker.claim(), png_with_parameters())
    assert client.get(f"/v1/requests/{request_id}/status").json()["status"] == "succeeded"
    result = client.get(f"/v1/requests/{request_id}/result").json()
    (image,) = result["outputs"]["images"]
    assert {"format", "width", "height", "file_path", "seed"} <= set(image)
    (recipe,) = context.store.list().jobs[0].recipes
    assert recipe.prompt == "sks a photo of a person"
    assert (recipe.width, recipe.height, recipe.seed, recipe.steps) == (1024, 1024, 42, 25)
