"""AUTOMATIC1111's settings and lists, and its syntax in prompts."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from tests.server.a1111_support import recipes_for
from tests.server.http_support import (
    ManualWorker,
    client_of,
    context_in,
    jobs_succeeding,
    png_with_parameters,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def context_settings():
    return {"queue_size": 3}


@pytest.fixture
def client(context):
    """A client of the application in this process."""
    return client_of(context)


def test_the_model_can_be_set_for_later_requests_of_a_key(client, context):
    keys = [{"Authorization": f"Bearer {context.keys.add(name)}"} for name in ("one", "two")]
    options = client.get("/sdapi/v1/options", headers=keys[0]).json()
    changed = options | {"sd_model_checkpoint": "sdxl"}  # Open WebUI sends all settings back
    assert client.post("/sdapi/v1/options", json=changed, headers=keys[0]).status_code == 200
    for key, model in zip(keys, ("sdxl", "sd15"), strict=True):
        assert client.get("/sdapi/v1/options", headers=key).json()["sd_model_checkpoint"] == model
        with jobs_succeeding(ManualWorker(context), png_with_parameters()):
            answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"}, headers=key)
        assert answer.status_code == 200, answer.text
        assert context.store.list().jobs[0].recipes[0].model == model


def test_other_settings_cannot_be_changed(client):
    options = client.get("/sdapi/v1/options").json()
    assert options == {
        "sd_model_checkpoint": "sd15",
        "sd_vae": "Automatic",
        "samples_format": "png",
        "emphasis": "None",
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
    }
    assert client.post("/sdapi/v1/options", json=options).json() is None
    empty: list[Any] = [None, [], [""], {}]
    for nothing in empty:
        answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": nothing})
        assert answer.json() is None
    assert client.get("/sdapi/v1/options").json() == options
    for change in (
        {"sd_model_checkpoint": "other"},
        {"samples_format": "jpg"},
        {"live_previews_enable": True},
    ):
        answer = client.post("/sdapi/v1/options", json=change)
        assert (answer.status_code, answer.json()["error"]) == (400, "FIELD_NOT_SUPPORTED")
        assert next(iter(change)) in answer.json()["detail"]
    assert client.post("/sdapi/v1/refresh-loras").json() is None


def test_models_samplers_and_loras_are_listed_as_in_the_web_ui(client):
    samplers = client.get("/sdapi/v1/samplers").json()
    assert {
        "name": "DPM++ 2M",
        "aliases": ["dpmsolver++", "k_dpmpp_2m", "k_dpmpp_2m_ka", "k_dpmsolver++"],
        "options": {},
    } in samplers
    (model,) = client.get("/sdapi/v1/sd-models").json()  # without those that are not downloaded
    assert model == {
        "title": "sd15",
        "model_name": "sd15",
        "hash": None,
        "sha256": None,
        "filename": "tiny",
        "config": None,
    }
    (lora,) = client.get("/sdapi/v1/loras").json()
    assert (lora["name"], lora["alias"], lora["path"]) == (
        "sks",
        "lora_linear_f32",
        "sks.safetensors",
    )
    assert lora["metadata"]["ss_output_name"] == "lora_linear_f32"


def test_lists_without_entries_and_refreshes_answer(client):
    for path in ("latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks", "script-info"):
        assert client.get(f"/sdapi/v1/{path}").json() == []
    (upscaler,) = client.get("/sdapi/v1/upscalers").json()
    assert upscaler["name"] == "None"
    assert client.get("/sdapi/v1/embeddings").json() == {"loaded": {}, "skipped": {}}
    assert client.get("/sdapi/v1/scripts").json() == {"txt2img": [], "img2img": []}
    assert client.get("/sdapi/v1/cmd-flags").json() == {}
    for path in ("refresh-checkpoints", "refresh-vae", "refresh-embeddings", "skip"):
        assert client.post(f"/sdapi/v1/{path}").json() is None


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_png_info_returns_the_parameters_of_an_image(client, prefix):
    encoded = base64.b64encode(png_with_parameters()).decode()
    answer = client.post("/sdapi/v1/png-info", json={"image": prefix + encoded}).json()
    assert answer["info"].startswith("a ball")
    assert answer["items"] == {"parameters": answer["info"]}
    assert client.post("/sdapi/v1/png-info", json={"image": "nonsense"}).status_code == 422


def test_escaped_brackets_are_brackets(client, context):
    prompts = {"prompt": r"sks \(cartoon\) \\", "negative_prompt": r"\[x\]"}
    (recipe,) = recipes_for(client, context, **prompts)
    assert (recipe.prompt, recipe.negative_prompt) == ("sks (cartoon) \\", "[x]")
    (recipe,) = recipes_for(client, context, **prompts, override_settings={"emphasis": "None"})
    assert (recipe.prompt, recipe.negative_prompt) == tuple(prompts.values())


def test_the_first_configured_model_is_the_default(tmp_path):
    context = context_in(tmp_path, base_model="sdxl=/bases/xl,sd15=/bases/a")
    client = client_of(context)
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "sdxl"
    (recipe,) = recipes_for(client, context)
    assert recipe.model == "sdxl"
    with jobs_succeeding(ManualWorker(context), png_with_parameters()):
        answer = client.post("/v1/images/generations", json={"prompt": "a ball"})
    assert answer.status_code == 200, answer.text
    assert context.store.list().jobs[0].recipes[0].model == "sdxl"


def test_an_address_that_ends_with_a_slash_is_accepted(client, context):
    assert client.get("http://127.0.0.1:8000//sdapi/v1/options").status_code == 200
    key = {"Authorization": f"Bearer {context.keys.add('one')}"}
    assert client.get("http://127.0.0.1:8000//sdapi/v1/options").status_code == 401
    assert client.get("http://127.0.0.1:8000//sdapi/v1/options", headers=key).status_code == 200


EMPHASIS = ["Original", "No norm", "Ignore"]


@pytest.mark.parametrize("value", EMPHASIS)
def test_emphasis_is_computed_if_a_request_asks_for_it(client, context, value):
    prompts = {"prompt": r"(a:1.2) \(b\) BREAK c", "negative_prompt": "[x]"}
    settings = {"emphasis": value}
    (recipe,) = recipes_for(client, context, **prompts, override_settings=settings)
    assert recipe.emphasis == value.lower().replace(" ", "_")
    assert (recipe.prompt, recipe.negative_prompt) == tuple(prompts.values())


def test_emphasis_can_be_the_default_of_a_server(tmp_path):
    context = context_in(tmp_path, emphasis="original")
    client = client_of(context)
    (recipe,) = recipes_for(client, context, prompt="(a:1.2)")
    assert recipe.emphasis == "original"
    (recipe,) = recipes_for(
        client, context, prompt="(a:1.2)", override_settings={"emphasis": "None"}
    )
    assert recipe.emphasis == "none"
    assert client.get("/sdapi/v1/options").json()["emphasis"] == "Original"
    assert client.post("/sdapi/v1/options", json={"emphasis": "Original"}).status_code == 200
    assert client.post("/sdapi/v1/options", json={"emphasis": "None"}).status_code == 400


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "a AND b", "[a|b]"])
def test_prompt_editing_is_refused_with_emphasis(client, prompt):
    answer = client.post(
        "/sdapi/v1/txt2img",
        json={"prompt": prompt, "override_settings": {"emphasis": "Original"}},
    )
    assert answer.status_code == 422
    assert "not supported; remove it" in answer.text


def test_empty_credentials_are_accepted_on_a_server_without_keys(client):
    for value in ("Basic ", "Basic", "Basic Og==", "Bearer "):
        answer = client.get("/sdapi/v1/options", headers={"Authorization": value})
        assert answer.status_code == 200, value


def test_a_stored_model_of_another_version_is_not_used(client, context):
    before = client.get("/sdapi/v1/options").json()
    context.clients.a1111.set_model("", "a_model_of_a_newer_version")
    assert client.get("/sdapi/v1/options").json() == before
