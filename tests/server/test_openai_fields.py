"""Fields of OpenAI's requests, and what they become in a recipe."""

from __future__ import annotations

import openai
import pytest
from tests.server.http_support import jobs_succeeding, only_job
from tests.server.openai_support import LORAS
from tests.support import LORA

from fidelora.recipe import MAX_SEED, file_sha256

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def context_settings():
    return {"queue_size": 2, "model_aliases": "dall-e-3=sd15, gpt-image-1 = sdxl"}


@pytest.fixture
def client(openai_client):
    return openai_client


def test_every_field_reaches_its_recipe(client, context, worker):
    with jobs_succeeding(worker):
        client.images.generate(
            model="sd15",
            prompt="[trigger]",
            n=2,
            size="256x512",
            output_format="jpeg",
            output_compression=80,
            quality="hd",
            style="natural",
            background="opaque",
            moderation="low",
            user="me",
            extra_body={
                "loras": LORAS,
                "trigger_word": "sks",
                "negative_prompt": "bad",
                "seed": MAX_SEED - 1,
                "steps": 9,
                "guidance_scale": 3.5,
                "sampler": "ddim",
                "fidelity": "fast",
            },
        )
    job = only_job(context)
    assert (job.image_format, job.image_quality) == ("jpeg", 80)
    assert [recipe.seed for recipe in job.recipes] == [MAX_SEED - 1, MAX_SEED]
    first = job.recipes[0]
    assert (first.prompt, first.negative_prompt, first.width, first.height) == (
        "sks",
        "bad",
        256,
        512,
    )
    assert (first.steps, first.guidance_scale, first.sampler, first.fidelity) == (
        9,
        3.5,
        "ddim",
        "fast",
    )
    assert [(ref.sha256, ref.multiplier) for ref in first.adapters] == [(file_sha256(LORA), 0.8)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"size": "huge"}, "size"),
        ({"quality": "best"}, "quality"),
        ({"style": "loud"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"frame_count": 3}, "frame_count"),
        ({"complexity": "high"}, "complexity"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"extra_body": {"steps": 151}}, "steps"),
        ({"extra_body": {"guidance_scale": 21}}, "guidance_scale"),
        ({"extra_body": {"sampler": "best"}}, "sampler"),
        ({"extra_body": {"sampler": "lcm", "steps": 60}}, "steps"),
        ({"extra_body": {"neg": "x"}}, "neg"),
        (
            {"extra_body": {"loras": [{"path": "sks.safetensors", "strength": 1}]}},
            "loras[0].strength",
        ),
        (
            {"extra_body": {"loras": [{"path": "sks.safetensors", "network_multiplier": 6}]}},
            "loras.0.network_multiplier",
        ),
    ],
)
def test_unsupported_fields_are_rejected_by_name(client, context, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a ball", **fields)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert context.store.list().jobs == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "32x512"}, "size: width and height have to be from 64 to 4096"),
        ({"output_compression": 50}, "output_compression: not supported for png"),
        (
            {"n": 2, "extra_body": {"seed": MAX_SEED}},
            "seed: the last image's seed would exceed",
        ),
        ({"partial_images": 2}, "partial_images: supported only in a stream"),
        (
            {"stream": True, "response_format": "url"},
            "response_format: a stream supports only b64_json",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(client, fields, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a ball", **fields)
    assert caught.value.response.json()["error"]["message"].startswith(message)


def test_fixed_model_names_of_clients_are_mapped_to_models(client, context, worker):
    with jobs_succeeding(worker):
        client.images.generate(model="dall-e-3", prompt="a ball", style="vivid")
    assert only_job(context).recipes[0].model == "sd15"
    assert context.settings.aliases_of_models["gpt-image-1"] == "sdxl"
