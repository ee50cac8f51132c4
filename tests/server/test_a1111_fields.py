"""Fields of AUTOMATIC1111's requests, and what they become in a recipe."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.server.a1111_support import recipes_for
from tests.server.http_support import (
    client_of,
    jobs_succeeding,
    png_with_parameters,
)
from tests.support import LORA, LORA_CONV

from fidelora.recipe import MAX_SEED, file_sha256

pytestmark = pytest.mark.usefixtures("no_pauses")

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def context_settings():
    return {"queue_size": 3}


@pytest.fixture
def client(context):
    """A client of the application in this process."""
    return client_of(context)


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
            "override_settings.face_restoration is not supported; the supported settings are",
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
