"""AUTOMATIC1111's API, called by the package `webuiapi`, and field by field."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from typing import Any

import httpx2
import pytest
import webuiapi
from requests.adapters import HTTPAdapter
from tests.server.http_support import (
    ManualWorker,
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
from tests.support import LORA, LORA_CONV

import fidelora
from fidelora.images.read import read_origin
from fidelora.jobs.job import Status
from fidelora.recipe import MAX_SEED, file_sha256
from fidelora.server import job_watcher
from fidelora.server.context import ServerContext

TENSORS_SHA256 = hashlib.sha256(
    LORA.read_bytes()[8 + int.from_bytes(LORA.read_bytes()[:8], "little") :]
).hexdigest()
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.005)


@pytest.fixture
def context(tmp_path) -> ServerContext:
    return context_in(tmp_path, queue_size=3)


@pytest.fixture
def worker(context) -> ManualWorker:
    return ManualWorker(context)


@pytest.fixture
def client(context):
    """A client of the application in this process."""
    return client_of(context)


@pytest.fixture
def url(context):
    with listening(context) as found:
        yield found


class _Timeouts(HTTPAdapter):
    """Gives calls of `webuiapi`, which sets no timeouts, a deadline."""

    def send(self, *args: Any, **given: Any) -> Any:
        return super().send(*args, **given | {"timeout": IMAGES_DEADLINE_S})


def api_of(url: str, **given: Any) -> webuiapi.WebUIApi:
    api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", sampler="Euler a", steps=2, **given)
    api.session.mount("http://", _Timeouts())
    return api


def recipes_for(client: Any, context: ServerContext, **fields: Any) -> Any:
    """Return the recipes of the request's job."""
    with jobs_succeeding(ManualWorker(context), png_with_parameters()):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"} | fields)
    assert answer.status_code == 200, answer.text
    return context.store.list().jobs[0].recipes


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


# --- the fields ---------------------------------------------------------------------------------


def test_defaults_are_those_of_the_web_ui(client, context):
    (recipe,) = recipes_for(client, context)
    assert (recipe.steps, recipe.guidance_scale, recipe.width, recipe.height, recipe.sampler) == (
        50,
        7.0,
        512,
        512,
        "euler",
    )
    assert (recipe.adapters, recipe.noise, recipe.base_model, recipe.negative_prompt) == (
        (),
        "modern",
        "tiny",
        "",
    )
    assert recipes_for(client, context)[0].seed != recipe.seed


def test_null_is_the_default(client, context):
    fields = (
        "negative_prompt",
        "seed",
        "steps",
        "cfg_scale",
        "width",
        "height",
        "sampler_name",
        "batch_size",
        "send_images",
    )
    (recipe,) = recipes_for(client, context, **dict.fromkeys(fields))
    assert (recipe.steps, recipe.guidance_scale, recipe.width, recipe.sampler) == (
        50,
        7.0,
        512,
        "euler",
    )


def test_every_field_reaches_its_recipe(client, context):
    (context.settings.loras / "people").mkdir()
    shutil.copyfile(LORA_CONV, context.settings.loras / "people" / "a b.safetensors")
    recipes = recipes_for(
        client,
        context,
        prompt="<lora:sks:0.5> a ball, <lora:a b:-1>grass",
        negative_prompt="bad",
        seed=9,
        steps=3,
        cfg_scale=25,
        width=101,
        height=128,
        sampler_name="LMS",
        scheduler="Karras",
        n_iter=3,
    )
    assert [recipe.seed for recipe in recipes] == [9, 10, 11]
    first = recipes[0]
    assert (first.prompt, first.negative_prompt, first.steps, first.guidance_scale) == (
        "a ball,grass",
        "bad",
        3,
        25,
    )
    assert (first.width, first.height, first.sampler, first.adapter_mode) == (
        96,
        128,
        "k_lms",
        "merged",
    )
    assert [(ref.sha256, ref.multiplier) for ref in first.adapters] == [
        (file_sha256(LORA), 0.5),
        (file_sha256(LORA_CONV), -1),
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sampler_name": "Euler", "scheduler": "SGM Uniform"}, ("euler", "sgm_uniform", None)),
        ({"scheduler": "sgm_uniform"}, ("euler", "sgm_uniform", None)),
        (
            {"sampler_name": "DPM++ 2M", "scheduler": "SGM Uniform"},
            ("dpmsolver++", "sgm_uniform", None),
        ),
        ({"sampler_name": "DDIM", "scheduler": "Trailing"}, ("ddim", "trailing", None)),
        ({"sampler_name": "DDIM", "eta": 0.5}, ("ddim", "default", 0.5)),
        ({"sampler_name": "tcd", "eta": 1}, ("tcd", "default", 1.0)),
        ({"sampler_name": "tcd", "scheduler": "trailing"}, ("tcd", "trailing", None)),
        ({"sampler_name": "Euler", "eta": 0.5}, ("euler", "default", None)),
    ],
)
def test_spacing_and_eta_are_fields_of_the_recipe(client, context, fields, expected):
    (recipe,) = recipes_for(client, context, **fields)
    assert (recipe.sampler, recipe.timestep_spacing, recipe.eta) == expected


def test_images_can_be_left_out_of_the_response(client, context, worker):
    with jobs_succeeding(worker, png_with_parameters()):
        answer = client.post(
            "/sdapi/v1/txt2img",
            json={"prompt": "a ball", "send_images": False, "save_images": True},
        ).json()
    assert answer["images"] == []
    assert json.loads(answer["info"])["infotexts"] == [
        "a ball\nSteps: 2, Sampler: ddpm, Seed: 1, Size: 64x64"
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "enable_hr": False,
            "denoising_strength": 0.7,
            "hr_scale": 2,
            "hr_upscaler": "Latent",
            "hr_prompt": "x",
        },
        {"subseed": 77, "subseed_strength": 0, "seed_resize_from_h": 0, "seed_resize_from_w": -1},
        {
            "styles": [],
            "restore_faces": False,
            "tiling": False,
            "comments": {},
            "refiner_checkpoint": "",
            "refiner_switch_at": 0.8,
        },
        {"eta": 1.0, "sampler_name": "Euler a"},
        {"eta": 0.0, "sampler_name": "DDIM"},
        {"eta": 0.3, "sampler_name": "Euler"},
        {"s_churn": 0, "s_tmin": 0, "s_tmax": 0, "s_noise": 1},
        {"script_name": None, "script_args": [], "alwayson_scripts": {}},
        {"styles": ["None", ""]},
        {"styles": [""], "clip_skip": 1, "unknown": None, "other": [], "another": False},
        {  # the bodies of SillyTavern and of Forge's clients
            "url": "http://localhost:7860",
            "auth": "user:secret",
            "clip_skip": 1,
            "hr_additional_modules": ["Use same choices"],
            "distilled_cfg_scale": 3.5,
            "hr_cfg": 1,
            "save_image": True,
            "firstpass_image": "",
        },
        {
            "override_settings": {
                "sd_model_checkpoint": "sd15",
                "CLIP_stop_at_last_layers": 1,
                "sd_vae": "Automatic",
            }
        },
        {"alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": [False, False]}}},
        {
            "override_settings": {
                "sd_model_checkpoint": None,
                "emphasis": None,
                "samples_format": None,
                "sd_vae": "None",
                "forge_additional_modules": [],
                "face_restoration": False,
            }
        },
        {"override_settings": {"emphasis": [], "samples_format": [""], "sd_vae": {}}},
        {"override_settings": {"emphasis": {}, "sd_model_checkpoint": [""]}},
        {"prompt": "(b:1.2) [x|y]", "override_settings": {"emphasis": "None"}},
        {
            "override_settings_restore_afterwards": False,
            "do_not_save_grid": True,
            "do_not_save_samples": True,
        },
    ],
)
def test_fields_without_effect_are_accepted(client, context, fields):
    assert len(recipes_for(client, context, **fields)) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"enable_hr": True}, "enable_hr cannot be true"),
        ({"restore_faces": True}, "restore_faces cannot be true"),
        ({"tiling": True}, "tiling cannot be true"),
        ({"styles": ["anime"]}, 'styles cannot be ["anime"]'),
        ({"subseed_strength": 0.5}, "subseed_strength cannot be 0.5"),
        ({"s_noise": 1.1}, "s_noise cannot be 1.1"),
        ({"script_name": "X/Y/Z plot"}, "script_name cannot be"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, "alwayson_scripts"),
        ({"override_settings": {"sd_vae": ["x"]}}, "override_settings.sd_vae cannot be"),
        ({"refiner_checkpoint": "xl"}, "refiner_checkpoint cannot be"),
        ({"infotext": "a"}, "infotext cannot be"),
        ({"eta": 0.5, "sampler_name": "Euler a"}, "eta must be 1 for Euler a, not 0.5"),
        ({"init_images": ["x"]}, "init_images is not a field of txt2img"),
        ({"s_noise": 0}, "s_noise cannot be 0"),  # it would remove the noise
        ({"unknown": 0}, "unknown is not a field of txt2img"),
        ({"clip_skip": 2}, "clip_skip cannot be 2; leave it out, or send 0 or 1"),
        ({"styles": ["", "anime"]}, 'styles cannot be ["", "anime"]'),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 2}},
            "CLIP_stop_at_last_layers cannot be 2: it is always 1",
        ),
        (
            {"override_settings": {"sd_model_checkpoint": "other"}},
            'override_settings.sd_model_checkpoint cannot be "other"; use one of sd15, sdxl,',
        ),
        (
            {"override_settings": {"samples_format": "tiff"}},
            'override_settings.samples_format cannot be "tiff"; use one of png, jpg,',
        ),
        (
            {"override_settings": {"face_restoration": 1}},
            "override_settings.face_restoration cannot be 1: the supported settings are",
        ),
        ({"prompt": "a (b:1.2)"}, "changes word weights"),
        ({"negative_prompt": "[a:b:0.5]"}, "switches words during sampling"),
        ({"prompt": "<lora:sks:1:0.5>"}, "two multipliers"),
        ({"prompt": "<lora:sks:6>"}, "from -5 to 5"),
        ({"prompt": "<hypernet:x:1>"}, "is not a LoRA"),
        ({"prompt": "<lora:sks:1>" * 65}, "names 65 LoRAs; the maximum is 64"),
        ({"prompt": "<lora:none:1>"}, "The adapter 'none' is not in"),
        ({"prompt": "<lora:../sks:1>"}, "The adapter '../sks' is not in"),
        ({"prompt": "<lora:../../../etc/passwd:1>"}, "is not in the adapter folder"),
        ({"prompt": "<lora:/etc/passwd:1>"}, "is not in the adapter folder"),
    ],
)
def test_unsupported_fields_are_rejected_by_name(client, context, fields, named):
    context.stopping.set()  # or a request that is accepted by mistake would wait for its images
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"} | fields)
    assert answer.status_code == 400
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    assert named in body["detail"]
    assert context.store.list().jobs == ()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"steps": 151}, "steps"),
        ({"width": 32}, "width"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"sampler_name": "UniPC"}, "sampler_name"),
        ({"sampler_name": "Euler a", "scheduler": "Exponential"}, "scheduler"),
        ({"sampler_name": "LMS", "scheduler": "SGM Uniform"}, "scheduler"),
        ({"sampler_name": "DDIM", "eta": 1.5}, "eta"),
        ({"sampler_name": "LCM", "steps": 60}, "steps"),
        ({"batch_size": 8, "n_iter": 9}, "n_iter"),
        ({"seed": MAX_SEED, "n_iter": 2}, "seed"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_values_out_of_range_have_fastapis_error_format(client, fields, place):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a ball"} | fields)
    assert answer.status_code == 422
    (entry,) = answer.json()["detail"]
    assert entry["loc"] == ["body", place]
    if place == "sampler_name":
        assert "use one of Euler, Euler a, LMS" in entry["msg"]


def test_loras_of_one_name_are_named_with_their_folders(client, context):
    for folder in ("a", "b"):
        (context.settings.loras / folder).mkdir()
        shutil.copyfile(LORA, context.settings.loras / folder / "x.safetensors")
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "<lora:x:1>"})
    assert (
        "Several adapters are called 'x'; use one of the names a/x, b/x" in answer.json()["detail"]
    )
    assert [lora["name"] for lora in client.get("/sdapi/v1/loras").json()] == ["a/x", "b/x", "sks"]
    assert len(recipes_for(client, context, prompt="<lora:b/x:1>")[0].adapters) == 1


def test_hostile_text_is_not_interpreted(client, context, worker):
    (context.settings.loras / f"{HOSTILE.replace('/', '')}.safetensors").write_bytes(
        LORA.read_bytes()
    )
    listed = {lora["path"]: lora["name"] for lora in client.get("/sdapi/v1/loras").json()}
    name = listed[f"{HOSTILE.replace('/', '')}.safetensors"]
    assert not set("<>:") & set(name)  # they have a meaning in tags
    with jobs_succeeding(worker, png_with_parameters(HOSTILE)):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": HOSTILE})
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.json()["info"])["all_prompts"] == [HOSTILE]


# --- settings -----------------------------------------------------------------------------------


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


def test_lists_of_models_samplers_and_loras(client):
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
        "requests of the other APIs are not interrupted"
    )
    context.store.stop(job.id, job.epoch, job.created_at)
    with pytest.raises(RuntimeError, match="REQUEST_CANCELED"):
        waiting.result(30)
    assert context.clients.a1111.jobs("") == []
    assert api.get_progress()["state"]["job_count"] == 0


def test_a_disconnected_client_cancels_its_job(url, context):
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "a ball"}, timeout=0.3)
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
        ), "Basic authentication works on A1111's paths only"

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
