"""OpenAI's Images API, called by the package `openai`: images, models, errors and keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from tests.server.http_support import (
    ManualWorker,
    client_of,
    context_in,
    in_thread,
    jobs_succeeding,
    listening,
    only_job,
    pixels,
)
from tests.server.openai_support import LORAS, official_client
from tests.server.serve_support import IMAGES_DEADLINE_S, Server, until

from fidelora.images.read import read_origin
from fidelora.jobs.job import Status

pytestmark = pytest.mark.usefixtures("no_pauses")

SMALL: dict[str, Any] = {"steps": 2, "loras": LORAS, "trigger_word": "sks"}


@pytest.fixture
def context_settings():
    return {"queue_size": 2, "model_aliases": "dall-e-3=sd15, gpt-image-1 = sdxl"}


@pytest.fixture
def client(openai_client):
    return openai_client


@pytest.fixture
def real(tiny_server: Server):
    """The official client of a server that makes real images."""
    with official_client(openai.OpenAI, tiny_server.url) as made:
        yield made


# --- with real images ---------------------------------------------------------------------------


def test_the_same_recipe_is_the_same_image_in_both_apis(real, tiny_server):
    extra = SMALL | {"seed": 7, "sampler": "euler_a", "negative_prompt": "b"}
    made = real.images.generate(
        model="sd15", prompt="a [trigger] ball", size="64x64", extra_body=extra
    )
    (image,) = made.data
    content = base64.b64decode(image.b64_json)
    recipe = read_origin(content).recipe
    assert recipe is not None
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed) == ("a sks ball", "b", 7)
    assert (recipe.steps, recipe.sampler) == (2, "euler_a")
    assert [(ref.name, ref.multiplier) for ref in recipe.adapters] == [("sks", 0.8)]
    assert (made.output_format, made.size, made.background) == ("png", "64x64", "opaque")
    assert (image.seed, image.sha256) == (7, hashlib.sha256(content).hexdigest())

    item = {"width": 64, "height": 64, "sample_steps": 2, "seed": 7, "sampler": "euler_a"}
    prompt = {"prompt": "a [trigger] ball", "neg": "b"} | item
    body = {"model": "sd15", "trigger_word": "sks", "loras": LORAS, "prompts": [prompt]}
    ours = str(tiny_server.call("/v1/inference", body)["request_id"])
    assert tiny_server.wait(ours, "succeeded", "failed")["status"] == "succeeded"
    (output,) = tiny_server.call(f"/v1/requests/{ours}/result")["outputs"]["images"]
    assert httpx2.get(output["url"], timeout=60).content == content
    assert (
        tiny_server.call(f"/v1/requests/{made.request_id}/result")["outputs"]["images"][0]["recipe"]
        == output["recipe"]
    )


def test_several_images_can_be_urls_in_another_format(real):
    made = real.images.generate(
        prompt="a ball",
        size="64x72",
        n=2,
        response_format="url",
        output_format="webp",
        extra_body=SMALL | {"seed": 5},
    )
    contents = [httpx2.get(image.url, timeout=60).content for image in made.data]
    origins = [read_origin(content) for content in contents]
    assert [origin.recipe.seed for origin in origins] == [5, 6]  # type: ignore[union-attr]
    assert {origin.format for origin in origins} == {"webp"}
    assert [image.b64_json for image in made.data] == [None, None]
    assert not np.array_equal(pixels(contents[0]), pixels(contents[1]))


def test_output_compression_sets_the_quality_of_the_file(real):
    def content(**fields: Any) -> bytes:
        made = real.images.generate(
            prompt="a ball",
            size="64x64",
            output_format="jpeg",
            extra_body=SMALL | {"seed": 5},
            **fields,
        )
        return base64.b64decode(made.data[0].b64_json)

    default, coarse = content(), content(output_compression=10)
    assert (read_origin(default).quality, read_origin(coarse).quality) == (None, 10)
    assert read_origin(default).recipe == read_origin(coarse).recipe
    with Image.open(io.BytesIO(default)) as fine, Image.open(io.BytesIO(coarse)) as rough:
        assert sum(fine.quantization[0]) < sum(rough.quantization[0])  # type: ignore[attr-defined]


def test_lora_seed_and_size_can_be_omitted(real):
    made = real.images.generate(prompt="a ball", n=2, extra_body={"steps": 1})
    recipes = [read_origin(base64.b64decode(image.b64_json)).recipe for image in made.data]
    assert [(recipe.width, recipe.height, recipe.adapters) for recipe in recipes if recipe] == [
        (512, 512, ())
    ] * 2
    assert recipes[0].seed != recipes[1].seed  # type: ignore[union-attr]
    assert [image.seed for image in made.data] == [recipe.seed for recipe in recipes if recipe]


def test_a_stream_ends_with_the_image(real):
    fields: dict[str, Any] = {
        "prompt": "a ball",
        "size": "64x64",
        "extra_body": SMALL | {"seed": 7},
    }
    with real.images.generate(stream=True, partial_images=1, **fields) as stream:
        events = list(stream)
    done = events[-1]
    assert done.type == "image_generation.completed"
    assert all(event.type == "image_generation.partial_image" for event in events[:-1])
    assert (done.output_format, done.size, done.quality, done.usage.total_tokens) == (
        "png",
        "64x64",
        "auto",
        0,
    )
    assert read_origin(base64.b64decode(done.b64_json)).recipe.seed == 7  # type: ignore[union-attr]


def test_the_asynchronous_client_gets_an_image(tiny_server):
    async def make() -> Any:
        async with official_client(openai.AsyncOpenAI, tiny_server.url) as client:
            return await client.images.generate(prompt="a ball", size="64x64", extra_body=SMALL)

    assert asyncio.run(make()).data[0].b64_json


# --- errors -------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(
        openai.NotFoundError, match="The model 'gpt-image-2' does not exist; use one of sd15"
    ) as caught:
        client.images.generate(model="gpt-image-2", prompt="a ball")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("path", ["../sks.safetensors", "/etc/passwd", "none.safetensors"])
def test_a_missing_lora_is_a_bad_request(client, path):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a ball", extra_body={"loras": [{"path": path}]})
    assert caught.value.code == "LORA_NOT_FOUND"


def test_a_full_queue_is_a_rate_limit_error(client, context):
    first = [in_thread(lambda: client.images.generate(prompt="a ball")) for _ in range(2)]
    until(lambda: context.store.count(Status.IN_QUEUE) == 2, 20)
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="a ball")
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert caught.value.response.headers["retry-after"] == "10"
    with jobs_succeeding(ManualWorker(context)):
        assert all(one.result(30).data for one in first)


def test_the_client_does_not_retry_a_failed_job(client, context, worker):
    waiting = in_thread(lambda: client.with_options(max_retries=2).images.generate(prompt="a ball"))
    only_job(context)
    worker.fail(worker.claim())
    with pytest.raises(openai.InternalServerError, match="The model produced NaN") as caught:
        waiting.result(30)
    assert (caught.value.code, caught.value.type) == ("NUMERICS", "server_error")
    assert len(context.store.list().jobs) == 1


def test_a_canceled_job_is_a_conflict_error(client, context):
    waiting = in_thread(lambda: client.with_options(max_retries=2).images.generate(prompt="a ball"))
    httpx2.delete(f"{client.base_url}requests/{only_job(context).id}")
    with pytest.raises(openai.ConflictError, match="was canceled"):
        waiting.result(30)
    assert len(context.store.list().jobs) == 1


def test_a_failure_in_a_stream_is_an_error_there(client, context, worker):
    with client.images.generate(prompt="a ball", stream=True) as stream:
        only_job(context)
        worker.fail(worker.claim())
        with pytest.raises(openai.APIError, match="The model produced NaN"):
            list(stream)


def test_a_wrong_api_key_is_an_authentication_error(tmp_path):
    context = context_in(tmp_path)
    key = context.keys.add("me")
    with listening(context) as url:
        with pytest.raises(openai.AuthenticationError) as caught:
            official_client(openai.OpenAI, url, "wrong").images.generate(prompt="a ball")
        assert (caught.value.code, caught.value.type) == (
            "invalid_api_key",
            "invalid_request_error",
        )
        with (
            official_client(openai.OpenAI, url, key) as client,
            jobs_succeeding(ManualWorker(context)),
        ):
            assert client.images.generate(prompt="a ball").data
            assert [model.id for model in client.models.list()] == ["sd15"]


def test_errors_have_openais_format_on_its_paths_only(tmp_path):
    context = context_in(tmp_path)
    client = client_of(context)
    for answer, status in (
        (client.post("/v1/images/edits", json={}), 404),
        (client.get("/v1/images/generations"), 405),
        (client.post("/v1/images/generations", json=[]), 400),
        (
            client.post(
                "/v1/images/generations", content=b"{", headers={"Content-Type": "application/json"}
            ),
            400,
        ),
        (client.post("/v1/images/generations", json={"prompt": "x" * 2**20}), 413),
        (
            client.post(
                "/v1/images/generations", json={"prompt": "x"}, headers={"Host": "evil.example"}
            ),
            400,
        ),
        (client.get("/v1/models/none"), 404),
    ):
        assert (answer.status_code, set(answer.json()), set(answer.json()["error"])) == (
            status, {"error"}, {"message", "type", "param", "code"}
        )  # fmt: skip
    answer = client.get("/v1/nothing").json()["detail"]["error"]
    assert answer["code"] == "NOT_FOUND"
    assert answer["message"] == (
        "Not Found. This path is not part of the API; /docs lists all routes."
    )
    context.stopping.set()
    answer = client.post("/v1/images/generations", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (
        503,
        "SERVER_STOPPING",
        "10",
    )


def test_calls_of_routes_that_do_not_exist_say_what_to_do(context):
    with listening(context) as url:
        with (
            official_client(openai.OpenAI, url) as client,
            pytest.raises(openai.NotFoundError, match="Of OpenAI's API, only models and POST /v1"),
        ):
            client.chat.completions.create(model="sd15", messages=[])
        with (
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
            pytest.raises(openai.NotFoundError, match="set base_url to the server's address and"),
        ):
            client.images.generate(prompt="a ball")
        answer = httpx2.get(f"{url}/v1/v1/models", timeout=IMAGES_DEADLINE_S)
        assert "address without /v1" in answer.json()["detail"]["error"]["message"]
        answer = httpx2.get(f"{url}/gradio_api/info", timeout=IMAGES_DEADLINE_S)
        assert "use POST /v1/inference" in answer.json()["detail"]["error"]["message"]


# --- models -------------------------------------------------------------------------------------


def test_models_are_listed_in_both_formats(client):
    (model,) = client.models.list().data  # without those that are not downloaded
    assert (model.id, model.object, model.owned_by, model.created) == (
        "sd15",
        "model",
        "fidelora",
        0,
    )
    assert client.models.retrieve("sd15") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("<b>none")
    assert caught.value.code == "model_not_found"
    answer = httpx2.get(f"{client.base_url}models").json()
    assert set(answer) == {"models", "object", "data"}
